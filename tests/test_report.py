"""eval.py --report: what a page holds (plain Python), and that it works in a browser (headless Chromium)."""
import base64
import io
import json
import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from PIL import Image
from test_stages import GRPO, SFT, run, work  # noqa: F401

import data_prep
import eval as stage
import grpo

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>\u2028 <!-- \ud800"


# ----- run directories made by hand


def write_lines(path, rows, tail=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


def sample(step=5, name="q1", reward=1.0, **more):
    return {"step": step, "id": name, "question": f"How many in {name}?", "answer": "3", "trigger": None,
            "response": "<think> one two </think> <answer> 3 </answer>", "rewound": 0, "reward": reward,
            "advantage": reward - 0.5, "tokens": 9, "truncated": False} | more


def answered(i, right=True, data=None, **more):
    return {"id": f"q{i}", "question": f"Question {i}?", "answer": "3", "tokens": 5, "truncated": False,
            "response": "<answer> 3 </answer>" if right else "It is \\boxed{4}", "correct": float(right),
            "extracted": "3" if right else "4", "scores": {}, "settings": {"data": data}} | more


def make_run(folder, metrics=True, samples=True, rows=()):
    """A run directory with the parts asked for."""
    if metrics:
        write_lines(folder / "metrics.jsonl", [{"step": 0, "eval/accuracy": 0.2}] + [
            {"step": s, "reward/mean": s / 10, "optim/grad_norm": float("inf" if s == 3 else s), "zero": 0.0,
             "optim/lr": 1e-4, "nearly": 1 - s % 2 * 2**-53, "groups/all_right": 0.0,
             **{f"groups/{name}": 0.25 for name in ("all_wrong", "hard", "medium", "easy")}}
            for s in range(1, 6)])
    if samples:
        write_lines(folder / "samples.jsonl", [sample(reward=r) for r in (0.0, 1.0, 0.5)])
    if rows:
        write_lines(folder / "eval/maths.jsonl", rows)
    return folder


def page(folder, *others):
    """The report's text, and the JSON in it."""
    text = stage.write_report([str(folder), *map(str, others)]).read_text()
    _, _, rest = text.partition('<script type="application/json" id="data">')
    return text, json.loads(rest.partition("</script>")[0])


def test_a_page_holds_curves_groups_and_rows(tmp_path):
    _, data = page(make_run(tmp_path / "a", rows=[answered(1), answered(2, False, truncated=True)]))
    assert [m["step"] for m in data["metrics"]] == [0, 1, 2, 3, 4, 5]
    assert "optim/grad_norm" not in data["metrics"][3] and data["metrics"][4]["optim/grad_norm"] == 4
    rollouts, maths = data["sections"]
    assert [r["reward"] for r in rollouts["cases"][0]["responses"]] == [1, 0.5, 0]
    assert [c["tags"] for c in maths["cases"]] == [["right"], ["wrong", "truncated"]]
    assert (maths["results"][0]["accuracy"], maths["results"][0]["n"]) == (0.5, 2)


@pytest.mark.parametrize("parts", [
    dict(metrics=False), dict(samples=False), dict(samples=False, rows=[answered(1)]),
    dict(metrics=False, samples=False, rows=[answered(1)])])
def test_a_part_may_be_missing(tmp_path, parts):
    _, data = page(make_run(tmp_path / "a", **parts))
    assert bool(data["metrics"]) == parts.get("metrics", True)
    names = [section["name"] for section in data["sections"]]
    assert names == ["Rollouts"] * parts.get("samples", True) + ["maths"] * ("rows" in parts)


@pytest.mark.parametrize("folders, named", [
    (["nothing"], "nothing: no rows"), (["empty"], "empty: no rows"), (["broken"], "metrics.jsonl line 1"),
    (["full", "empty"], "full empty: no question"), (["full", "full", "full"], "or two")])
def test_bad_input_is_one_line(tmp_path, folders, named, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty/eval").mkdir(parents=True)
    make_run(tmp_path / "full", rows=[answered(1)])
    write_lines(tmp_path / "broken/metrics.jsonl", [], "{\n")
    with pytest.raises(SystemExit) as stop:
        stage.main(stage.Config(report=tuple(folders)))
    assert named in stop.value.code and "\n" not in stop.value.code
    assert not [*tmp_path.glob("*/report.html")]


def test_rationales_of_rise_are_rollouts_too(tmp_path):
    """Both hops as one response, at the record they are about; divergences are no percentages."""
    record = {"id": "r1", "question": "Find every cup.", "answer": "[[0, 0, 9, 9]]"}
    write_lines(tmp_path / "rationales.jsonl", [
        {"step": 2, "sample": g, "cot": f"seen {g}", "reconstruction": "<answer>1</answer>", "reward": g,
         "tokens": 4, "truncated": False, "record": record} for g in range(3)])
    _, data = page(tmp_path)
    (case,) = data["sections"][0]["cases"]
    assert (case["id"], case["question"], case["facts"]["step"]) == ("r1", "Find every cup.", 2)
    assert [r["response"] for r in case["responses"]] == [
        [f"<think> seen {g} </think> <answer>1</answer>"] for g in (2, 1, 0)]
    assert data["not_shares"] == ["kl", "mse"]


def test_a_half_written_last_line_is_left_out(tmp_path):
    run_dir = make_run(tmp_path / "a", rows=[answered(1)])
    for path in (run_dir / "metrics.jsonl", run_dir / "samples.jsonl", run_dir / "eval/maths.jsonl"):
        path.write_text(path.read_text() + '{"step": 6, "id": "q9", "re')
    _, data = page(run_dir)
    assert len(data["metrics"]) == 6 and [len(s["cases"]) for s in data["sections"]] == [1, 1]


def test_long_runs_are_thinned_but_for_evaluations(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": s, "reward/mean": 0.5} | (
        {"eval/accuracy": 0.5} if s % 50 == 49 else {}) for s in range(5000)])
    steps = [row["step"] for row in page(tmp_path)[1]["metrics"]]
    assert len(steps) < 2000 and set(range(0, 5000, 3)) | set(range(49, 5000, 50)) == set(steps)


def test_two_runs_are_joined_by_id_and_question(tmp_path):
    first = make_run(tmp_path / "a", rows=[answered(i, right) for i, right in enumerate((1, 1, 0, 0))]
                     + [answered(8), answered(9)])
    second = make_run(tmp_path / "b", rows=[answered(9, question="Another?"), answered(7)]
                      + [answered(i, right) for i, right in enumerate((1, 0, 1, 0))])
    _, data = page(first, second)
    (maths,) = [section for section in data["sections"] if section["results"]]
    assert [(c["id"], *c["tags"]) for c in maths["cases"]] == [
        ("q0", "both right"), ("q1", "only first"), ("q2", "only second"), ("q3", "both wrong")]
    assert [r["name"] for r in maths["cases"][1]["responses"]] == [str(first), str(second)]
    assert [(r["n"], r["accuracy"]) for r in maths["results"]] == [(4, 0.5), (4, 0.5)]


def test_all_samples_of_a_row_are_shown(tmp_path):
    """A row that was sampled several times is one case; its scores are means."""
    kept = ("response", "extracted", "correct", "tokens", "truncated")
    samples = [{key: answered(1, right)[key] for key in kept} for right in (1, 0, 1)]
    row = answered(1) | {"samples": samples, "correct": 2 / 3, "tokens": 5.0, "truncated": 1 / 3}
    first, second = (make_run(tmp_path / name, samples=False, rows=[row]) for name in "ab")
    _, data = page(first, second)
    case, = data["sections"][0]["cases"]
    assert [r["correct"] for r in case["responses"]] == [1, 0, 1, 1, 0, 1]
    assert [r["name"] for r in case["responses"]] == [str(first)] * 3 + [str(second)] * 3
    assert case["correct"] == [2 / 3, 2 / 3] and case["tags"] == ["both wrong", "truncated"]


def test_judged_rows_and_rows_without_a_gold_answer(tmp_path):
    """What the judge read counts; without a gold answer there is no verdict to show."""
    rows = [answered(0, False, judge={"model": "m", "extracted": "three", "correct": 1.0}),
            answered(1, False), answered(2, answer=None, correct=None)]
    _, data = page(make_run(tmp_path / "a", samples=False, rows=rows))
    assert [(c["id"], c["tags"], c["read"]) for c in data["sections"][0]["cases"]] == [
        ("q0", ["right"], ["three"]), ("q1", ["wrong"], ["4"])]
    assert data["sections"][0]["results"][0]["accuracy"] == 0.5


def test_the_summary_is_shown_if_it_is_about_these_rows(tmp_path):
    entry = {"bench": "maths", "n": 1, "accuracy": 0.7, "scores": {"maj@8": 0.9}, "ci95": [0.6, 0.8],
             "truncated": 0, "tokens": 5, "by": {"level": {"1": {"n": 1, "accuracy": 0.7, "scores": {}}}}}
    run_dir = make_run(tmp_path / "a", rows=[answered(1)])
    for n, expected in ((1, 0.7), (2, 1)):
        (run_dir / "eval/summary.json").write_text(json.dumps([entry | {"n": n}]))
        assert page(run_dir)[1]["sections"][-1]["results"][0]["accuracy"] == expected


def test_hostile_text_stays_data(tmp_path):
    """Nothing in the page can end its script element, and every character comes back."""
    rows = [answered(1, id=EVIL, question=EVIL, answer=EVIL, response=EVIL, error=EVIL)]
    run_dir = make_run(tmp_path / "a<b>", rows=rows)
    write_lines(run_dir / "samples.jsonl", [sample(response=EVIL, question=EVIL)])
    text, data = page(run_dir)
    assert text.count("</script") == 2 and "<img" not in text and "\u2028" not in text and "a<b>" not in text
    case = data["sections"][1]["cases"][0]
    assert case["question"] == EVIL and case["responses"][0]["response"] == [EVIL]


def records_file(folder, count, image):
    """A records file of `count` questions about one or more images."""
    rows = [{"id": f"q{i}", "question": f"Question {i}?", "images": [image(i)], "answer": "3",
             "answer_type": "number", "meta": {"subject": ("algebra", "geometry")[i % 2], "cells": [1]}}
            for i in range(count)]
    write_lines(folder / "data.jsonl", rows)
    return str(folder / "data.jsonl")


def with_data(run_dir, data):
    (run_dir / "config.json").write_text(json.dumps({"config": {"data": data}, "argv": ["grpo.py"]}))
    return run_dir


def test_images_and_categories_come_from_the_data_file(tmp_path):
    """A shared image is embedded once and scaled down; a broken one, and a record that changed, have none."""
    Image.new("RGB", (2000, 1000), "red").save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes(b"broken")
    data = records_file(tmp_path, 5, lambda i: "broken.png" if i == 4 else "red.png")
    rows = [answered(i, data=data) for i in range(5)] + [answered(0, data=data, id="q3x")]
    rows[2]["question"] = "As it was before the file was made anew"
    _, found = page(make_run(tmp_path / "a", samples=False, rows=rows))
    assert [c["images"] for c in found["sections"][0]["cases"]] == [[0], [0], [], [0], [None], []]
    assert found["sections"][0]["cases"][1]["facts"] == {"answer_type": "number", "subject": "geometry"}
    (width, height, uri), = found["images"]
    assert width * height <= stage.THUMBNAIL and abs(width / height - 2) < 0.02
    assert Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size == (width, height)
    assert any("1 of 6 questions" in note for note in found["notes"])


def test_embedded_images_are_read_from_the_data_file(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    from pyarrow.parquet import write_table
    Image.new("RGB", (60, 60), "blue").save(png := io.BytesIO(), "PNG")
    write_table(pyarrow.Table.from_pylist([
        {"id": "q1", "question": "How many in q1?", "answer": "3", "answer_type": "number",
         "images": [{"bytes": png.getvalue(), "path": None}]}]), tmp_path / "data.parquet")
    run_dir = make_run(tmp_path / "a", rows=[answered(1)])
    _, data = page(with_data(run_dir, str(tmp_path / "data.parquet")))
    assert data["sections"][0]["cases"][0]["images"] == [0] and len(data["images"]) == 1


def test_a_data_file_that_is_gone_is_a_note(tmp_path):
    _, data = page(with_data(make_run(tmp_path / "a", rows=[answered(1)]), str(tmp_path / "gone.jsonl")))
    assert "gone.jsonl" in data["notes"][0] and data["sections"][0]["cases"][0]["images"] == []


def test_a_page_has_a_largest_size(tmp_path, monkeypatch):
    """Long responses lose their middle, then images are left out; both are said."""
    monkeypatch.setattr(stage, "PAGE_BYTES", 400_000)
    noise = random.Random(0)
    for i in range(40):
        Image.frombytes("RGB", (150, 150), noise.randbytes(67500)).save(tmp_path / f"{i}.png")
    data = records_file(tmp_path, 40, lambda i: f"{i}.png")
    rows = [answered(i, i % 2, data, response="a" * 20_000 + f"<answer> {i} </answer>") for i in range(40)]
    text, found = page(make_run(tmp_path / "a", samples=False, rows=rows))
    assert 100_000 < len(text) < 400_000 + 40_000
    response = found["sections"][0]["cases"][7]["responses"][0]["response"][0]
    assert response.endswith("<answer> 7 </answer>") and "characters" in found["notes"][1]
    shown = [c["images"] != [None] for c in found["sections"][0]["cases"]]
    assert 0 < sum(shown) < 40 and "are left out" in found["notes"][0]
    assert sum(shown[::2]) > sum(shown[1::2])  # wrong answers first


@pytest.mark.parametrize("rows, length, images, samples", [
    (40_000, 40, 0, 1), (20_000, 600, 40, 1), (600, 3000, 0, 64)])
def test_a_page_keeps_to_its_size(tmp_path, rows, length, images, samples):
    """Questions are left out evenly where there are too many even with short responses;
    the tables count all.
    """
    noise, text = random.Random(0), "<é" * (length // 2)
    for i in range(images):
        Image.frombytes("RGB", (300, 300), noise.randbytes(270_000)).save(tmp_path / f"{i}.png")
    data = records_file(tmp_path, rows, lambda i: f"{i % images}.png") if images else None
    found = []
    for i in range(rows):
        row = answered(i, i % 4 == 0, data, response=f"{text}<answer> {i} </answer>")
        found.append(row | {"samples": [row] * samples} if samples > 1 else row)
    written, page_data = page(make_run(tmp_path / "a", samples=False, rows=found))
    (maths,) = page_data["sections"]
    shown = len(maths["cases"])
    assert len(written.encode()) < 20_000_000 and maths["results"][0]["n"] == rows
    assert shown > 100 and any(
        f"maths: for size, {shown} of {rows} questions" in note for note in page_data["notes"])
    places = [int(case["id"][1:]) for case in maths["cases"]]
    assert len({b - a for a, b in zip(places, places[1:])}) == 1
    assert maths["cases"][-1]["responses"][0]["response"][0].endswith(f"<answer> {places[-1]} </answer>")
    if images:
        pictures = [case["images"] for case in maths["cases"]]
        assert sum(images != [None] for images in pictures) > 100


def test_long_texts_of_every_kind_are_cut(tmp_path):
    """A question, a gold answer, an option or an error of a megabyte; many evaluations;
    the page still opens.
    """
    long = "word " * 200_000
    row = answered(1, question=long, answer=long, extracted=long, error=long, id=long)
    run_dir = make_run(tmp_path / "a", samples=False, rows=[row, answered(2)])
    write_lines(run_dir / "metrics.jsonl", [
        {"step": s, **{f"eval/{k}": 1 / (s + k + 3) for k in range(30)}} for s in range(30_000)])
    written, data = page(run_dir)
    assert len(written) < 3_000_000 and len(data["metrics"]) <= 2 * stage.POINTS
    case = data["sections"][0]["cases"][0]
    assert all("[... 998000 ...]" in case[name] for name in ("id", "question", "answer"))


def test_a_trigger_is_a_part_of_its_own(tmp_path):
    text = "one two" + "\n\nWait," + " three <answer> 3 </answer>"
    run_dir = make_run(tmp_path / "a")
    write_lines(run_dir / "samples.jsonl", [sample(response=text, trigger=[7, 14], rewound=4)])
    case = page(run_dir)[1]["sections"][0]["cases"][0]
    assert case["responses"][0]["response"] == ["one two", "\n\nWait,", " three <answer> 3 </answer>"]
    assert case["tags"] == ["forced to rethink"]


def test_rows_of_samples_show_where_a_trigger_is(tiny):
    """grpo.py writes all rollouts of a shown group; [start, stop] are characters of the response."""
    tokenizer = data_prep.tiny_tokenizer([r["response"] for r in tiny.records])
    ids = [tokenizer(text)["input_ids"] for text in ("<think> a red", "\n\nWait, no.", " b 2")]
    text = tokenizer.decode(sum(ids, []))
    rollouts = [grpo.Rollout(q, sum(ids, []), None, False, text, reward=float(i % 2), advantage=a, rewound=3,
                             trigger=(len(ids[0]), len(ids[0] + ids[1])) if i == 5 else None)
                for q, a in enumerate((0, 1, 1, 1, 1)) for i in range(q * 2, q * 2 + 2)]
    rows = [*grpo.shown_groups(rollouts, tiny.records, tokenizer, 7, 2)]
    assert [row["id"] for row in rows] == [tiny.records[q]["id"] for q in (1, 1, 2, 2, 3, 3)]
    assert [row["trigger"] for row in rows] == [None, None, None, [13, 24], None, None]
    assert rows[3]["response"][13:24] == "\n\nWait, no." and rows[3]["rewound"] == 3 and rows[0]["step"] == 7


# ----- in a browser


class Browser:
    """Headless Chromium over the DevTools protocol: JSON messages, each ended by a zero byte, on pipes."""

    def __init__(self, profile):
        reader, self.out = os.pipe()
        self.inp, writer = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update", "--disable-sync",
                 "--remote-debugging-pipe", "--hide-scrollbars", f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(  # the browser reads descriptor 3 and writes 4
            ["bash", "-c", f'exec "$@" 3<&{reader} 4>&{writer}', "bash", CHROMIUM, *flags],
            pass_fds=(reader, writer), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(reader)
        os.close(writer)
        self.left, self.sent, self.events, self.session = b"", 0, [], {}
        page = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        found = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self.session = {"sessionId": found["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def receive(self):
        while b"\0" not in self.left:
            part = os.read(self.inp, 1 << 20)
            assert part, "the browser is gone"
            self.left += part
        message, _, self.left = self.left.partition(b"\0")
        return json.loads(message)

    def call(self, method, **params):
        self.sent += 1
        message = json.dumps({"id": self.sent, "method": method, "params": params, **self.session})
        view = memoryview(message.encode() + b"\0")
        while view:
            view = view[os.write(self.out, view):]
        while (reply := self.receive()).get("id") != self.sent:
            self.events.append(reply)
        assert "error" not in reply, reply
        return reply["result"]

    def open(self, path, width=1280, height=900):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 500)
        self.events.clear()
        self.call("Page.navigate", url=Path(path).as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def js(self, code):
        """The value of an expression, in which `all(selector)` is an array of elements."""
        known = "const all = selector => [...document.querySelectorAll(selector)];"
        reply = self.call("Runtime.evaluate", returnByValue=True, awaitPromise=True,
                          expression=f"{{{known}\n{code}}}")
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def point(self, selector, x=0.5, y=0.5):
        """Move the mouse over an element, at these shares of its width and height."""
        box = self.js(f"const b = (all({selector!r})[0].scrollIntoView({{block: 'center'}}), "
                      f"all({selector!r})[0].getBoundingClientRect()); [b.x, b.y, b.width, b.height]")
        place = dict(x=box[0] + x * box[2], y=box[1] + y * box[3])
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **place)
        return place

    def click(self, selector):
        place = self.point(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def key(self, name):
        for kind in ("keyDown", "keyUp"):
            code = {"Enter": 13, "ArrowLeft": 37, "Home": 36}[name]
            self.call("Input.dispatchKeyEvent", type=kind, key=name, windowsVirtualKeyCode=code,
                      **({"text": "\r"} if name == "Enter" else {}))

    def choose(self, selector, value):
        """Choose an option of a select."""
        self.js(f"const select = all({selector!r})[0]; select.value = {value!r};"
                "select.dispatchEvent(new Event('change')); 0")

    def unfold(self):
        """Open all that can be opened; what it shows is made just then."""
        self.js("all('details').forEach(details => { details.open = true; })")
        self.js("new Promise(done => setTimeout(done, 100))")

    def faults(self):
        """Errors in the console, and requests that leave the page."""
        said = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        asked = [event["params"]["request"]["url"] for event in self.events
                 if event["method"] == "Network.requestWillBeSent"]
        return [event for event in self.events if event["method"] in said] + [
            url for url in asked if not url.startswith(("file:", "data:"))]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.call("Browser.close")
    browser.process.wait(30)


SECTION = "main > section:last-of-type"
ROWS = f"{SECTION} details:has(> .row)"


def texts(browser, selector):
    return browser.js(f"all({selector!r}).map(node => node.innerText)")


def test_report_of_a_real_run(work, browser, monkeypatch):  # noqa: F811
    """sft.py, grpo.py and eval.py as users start them; curves, groups, and graded rows with their images."""
    monkeypatch.chdir(work)
    run(work, *SFT, "--steps", "30", "--lr", "5e-3", "--out", "out/sft")
    run(work, *GRPO, "--model", "out/sft", "--steps", "2", "--out", "out/grpo")
    run(work, "eval.py", "--bench", "data/counting_id.jsonl", "--max_new_tokens", "12",
        "--model", "out/grpo", "out/sft")
    assert "out/grpo/report.html" in run(work, "eval.py", "--report", "out/grpo")
    browser.open(work / "out/grpo/report.html")
    assert browser.js("document.title") == "out/grpo" and not browser.faults()
    titles = texts(browser, "h2")
    assert titles[0] == "Training" and titles[-2:] == ["Evaluation", "counting_id"]
    assert len(texts(browser, "figure")) > 10 and "reward/mean" in texts(browser, "figure")[0]
    assert len(texts(browser, ROWS)) == 12
    browser.click(f"{ROWS} > summary")
    browser.js("new Promise(done => setTimeout(done, 100))")
    assert browser.js(f"all('{ROWS} img').map(image => image.naturalWidth)") == [84]
    rows = [json.loads(line) for line in (work / "out/grpo/samples.jsonl").read_text().splitlines()]
    assert "Rollouts" in titles and len({row["id"] for row in rows[:4]}) == 1
    stage.write_report(["out/grpo", "out/sft"])
    browser.open(work / "out/grpo/report.html")
    assert not browser.faults() and texts(browser, "h1") == ["out/grpo and out/sft"]
    assert browser.js("""new Promise(done => {  // nothing moved while it opened
        new PerformanceObserver(list => done(list.getEntries().length)).observe(
            {type: "layout-shift", buffered: true});
        setTimeout(() => done(0), 300);
    })""") == 0


def test_hover_and_arrow_keys_show_the_values_of_a_step(tmp_path, browser):
    page(make_run(tmp_path / "a"))
    browser.open(tmp_path / "a/report.html")
    figure = "figure:nth-of-type(1)"
    assert texts(browser, f"{figure} .key")[0].split() == [
        "reward/mean", "0.500", "eval/accuracy", "0.200", "@0"]
    heights = browser.js("all('figure').map(figure => figure.offsetHeight)")
    browser.point(f"{figure} svg", x=(42 + 0.4 * 294) / 340)
    assert texts(browser, f"{figure} .key")[0].split()[:2] == ["reward/mean", "0.200"]
    assert browser.js("all('svg text').map(text => text.textContent)").count("step 2") == len(heights)
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    assert "0.500" in texts(browser, f"{figure} .key")[0]
    browser.js("all('svg')[0].focus()")
    browser.key("ArrowLeft")
    assert "0.400" in texts(browser, f"{figure} .key")[0]
    browser.key("Home")
    assert texts(browser, f"{figure} .key")[0].split() == ["reward/mean", "eval/accuracy", "0.200"]
    assert browser.js("all('figure').map(figure => figure.offsetHeight)") == heights  # nothing jumps
    assert browser.js("all('details p')[0].textContent") == "Always zero: zero"
    ticks = browser.js("all('details figure').map(figure => [...figure.querySelectorAll('text')].slice(0, -2)"
                       ".map(text => text.textContent))")
    assert ticks == [["0", "0.5", "1"], ["0", "0.00005", "0.0001"]]  # a constant is drawn from 0
    assert texts(browser, ".key")[1].split()[-1] == "all_right"  # a part of a whole, though always 0


def test_filters_search_and_pages(tmp_path, browser):
    data = records_file(tmp_path, 60, lambda i: f"{i}.png")
    rows = [answered(i, i % 3 == 0, data, truncated=i % 10 == 0) for i in range(60)]
    run_dir = make_run(tmp_path / "a", samples=False, rows=rows)
    page(run_dir)
    browser.open(run_dir / "report.html")
    status = f"{SECTION} [role=status]"
    assert texts(browser, status) == ["1–25 of 60, right 33.3 %"] and len(texts(browser, ROWS)) == 25
    browser.choose(f"{SECTION} select[aria-label=show]", "wrong")
    assert texts(browser, status) == ["1–25 of 40, right 0.0 %"]
    assert all(text.startswith("wrong") for text in texts(browser, ROWS))
    browser.click(f"{SECTION} button:last-of-type")
    assert texts(browser, status) == ["26–40 of 40, right 0.0 %"] and len(texts(browser, ROWS)) == 15
    browser.choose(f"{SECTION} select[aria-label=show]", "truncated")
    assert texts(browser, status) == ["1–6 of 6, right 33.3 %"]
    browser.choose(f"{SECTION} select[aria-label=subject]", "geometry")
    assert texts(browser, status) == ["0–0 of 0"]
    browser.choose(f"{SECTION} select[aria-label=show]", "")
    assert texts(browser, status) == ["1–25 of 30, right 33.3 %"]
    browser.js(f"all('{SECTION} input')[0].focus()")
    browser.call("Input.insertText", text="QUESTION 41")
    assert texts(browser, status) == ["1–1 of 1, right 0.0 %"] and not browser.faults()


def test_two_models_side_by_side(tmp_path, browser):
    first = make_run(tmp_path / "a", rows=[answered(i, right) for i, right in enumerate((1, 1, 0, 0))])
    second = make_run(tmp_path / "b", rows=[answered(i, right) for i, right in enumerate((1, 0, 1, 0))])
    page(first, second)
    browser.open(first / "report.html")
    for i, verdict in enumerate(("both right", "only first", "only second", "both wrong")):
        browser.choose(f"{SECTION} select[aria-label=show]", verdict)
        assert texts(browser, f"{SECTION} [role=status]")[0].startswith("1–1 of 1, right ")
        assert f"Question {i}?" in texts(browser, ROWS)[0]
    browser.choose(f"{SECTION} select[aria-label=show]", "only first")
    browser.js(f"all('{ROWS} > summary')[0].focus()")
    browser.key("Enter")
    browser.js("new Promise(done => setTimeout(done, 100))")
    boxes = browser.js(f"all('{ROWS} .text').map(t => [t.innerText, t.getBoundingClientRect().x])")
    assert [text for text, _ in boxes] == ["<answer> 3 </answer>", "It is \\boxed{4}"]
    assert boxes[0][1] < boxes[1][1]
    assert texts(browser, f"{ROWS} .answer") == ["<answer>", " 3 ", "</answer>", "\\boxed{4}"]
    assert not browser.faults()


def test_hostile_text_is_shown_and_not_executed(tmp_path, browser):
    run_dir = make_run(tmp_path / "a", rows=[answered(1, **{key: EVIL for key in (
        "id", "question", "answer", "response", "extracted", "error")})])
    write_lines(run_dir / "samples.jsonl", [sample(
        response="<think> " + EVIL, question=EVIL, id=EVIL, trigger=[8, 20], rewound=2)])
    page(run_dir)
    browser.open(run_dir / "report.html")
    browser.unfold()
    assert browser.js("[typeof window.hacked, all('main script, main img').length]") == ["undefined", 0]
    shown = texts(browser, ".text")
    assert len(shown) == 2 and "</script><script>window.hacked = 1</script><img" in shown[1]
    assert "2 tokens rewound" in shown[0] and texts(browser, ".trigger") == [EVIL[:12]]
    assert not browser.faults()


def test_five_thousand_rows_open_fast(tmp_path, browser, capsys):
    noise, words = random.Random(0), "so the angle at B is 40 degrees and the side is".split()
    text = " ".join(noise.choice(words) for _ in range(600))
    rows = [answered(i, i % 2, response=f"<think> {text} </think> <answer> {i % 7} </answer>")
            for i in range(5000)]
    run_dir = make_run(tmp_path / "a", rows=rows)
    began = time.time()
    page(run_dir)
    written, size = time.time() - began, (run_dir / "report.html").stat().st_size
    began = time.time()
    browser.open(run_dir / "report.html")
    opened, began = time.time() - began, time.time()
    browser.choose(f"{SECTION} select[aria-label=show]", "wrong")
    assert texts(browser, f"{SECTION} [role=status]") == ["1–25 of 2500, right 0.0 %"]
    with capsys.disabled():
        print(f"\n5,000 rows: {size / 1e6:.1f} MB, written in {written:.2f} s, opened in {opened:.2f} s, "
              f"filtered in {time.time() - began:.2f} s")
    assert size < 20e6 and browser.js("all('*').length") < 2000 and not browser.faults()


@pytest.mark.parametrize("width", [390, 1280])
def test_no_horizontal_scroll(tmp_path, browser, width):
    """Also with words that have no place to break, wide images and open details."""
    Image.new("RGB", (1600, 200), "red").save(tmp_path / "wide.png")
    data = records_file(tmp_path, 3, lambda i: "wide.png")
    rows = [answered(i, data=data, response="x" * 3000, answer="y" * 200, extracted="z" * 300)
            for i in range(3)]
    run_dir = make_run(tmp_path / ("name-" * 20), rows=rows)
    page(run_dir)
    browser.open(run_dir / "report.html", width=width, height=844)
    browser.unfold()
    assert browser.js("document.documentElement.scrollWidth") == width and len(texts(browser, ".text")) == 6
    right = browser.js("all('svg, img, .text, .row').map(node => node.getBoundingClientRect().right)")
    assert len(right) > 10 and max(right) <= width
