"""Vision-R1's cold start: bridging with servers that misbehave, kill -9, its ShareGPT files, system turns."""
import base64
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import lines_in, picture, wait_until
from PIL import Image
from test_api import PASSING, SLOW, Handler, Server
from test_stages import run, work  # noqa: F401

import data_prep
import eval as evaluation
import grpo
import rewards
import sft
from data_prep import build_messages, read_records, reword

ROOT = Path(__file__).resolve().parents[1]
MARKS = {"heading CAPTION": "thought", "cannot see it": "description", "what an image shows": "reasoning"}


# ----- the server: behave((row, stage), n, server) says what the n-th request (from 1) for a call gets


def chat(content, finish="stop", usage=None, **more):
    """A well-formed reply as bytes; `more` goes into the message."""
    message = {"role": "assistant", "content": content} | more
    usage = usage or {"prompt_tokens": 100, "completion_tokens": 7}
    return json.dumps({"choices": [{"message": message, "finish_reason": finish}], "usage": usage}).encode()


def right(call, n=1, server=None):
    """What a good model says: row-3 has 3 dots."""
    row, stage = call
    count = row.removeprefix("row-")
    return chat({"thought": f"CAPTION dots REASONING {count} of them",
                 "description": f"There are {count} dots.",
                 "reasoning": f"<think>The description says there are {count} dots.</think>\n"
                              f"<answer>{count}</answer>"}[stage])


def prompt_of(body):
    """(text, images) of a request's only turn."""
    content = body["messages"][0]["content"]
    if isinstance(content, str):
        return content, []
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    images = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
    return "".join(part.get("text", "<image>") for part in content), images


class Asked(Handler):
    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text, _ = prompt_of(body)
        call = re.search(r"row-\d+", text)[0], next(stage for mark, stage in MARKS.items() if mark in text)
        with server.lock:
            server.asked.append(call)
            server.bodies.append(body)
            server.headers.append({"path": self.path, **self.headers})
            n = server.asked.count(call)
        self.act(server.behave(call, n, server))


@pytest.fixture
def serve():
    servers = []

    def start(behave=right):
        servers.append(Server(behave))
        servers[-1].RequestHandlerClass = Asked
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(autouse=True)
def waits(monkeypatch, tmp_path):
    """Run in tmp_path, without a proxy or keys; waits between attempts are recorded instead of slept."""
    waits = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "*")
    for name in ("OPENAI_API_KEY", "VLM_API_KEY", "REASONER_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(data_prep, "time", SimpleNamespace(
        monotonic=time.monotonic, sleep=lambda s: waits.append(s) if s else None))
    return waits


def make_rows(n, **fields):
    """rows.jsonl: the i-th question has one image and the answer i."""
    records = []
    for i in range(n):
        picture(56, 42, seed=i).save(f"{i}.png")
        records.append({"id": f"row-{i}", "question": f"row-{i} How many dots?", "answer": str(i),
                        "answer_type": "number", "images": [f"{i}.png"]} | fields)
    data_prep.write_records("rows.jsonl", records)


def flags(server, *more):
    return ["--source", "bridge", "--input", "rows.jsonl", "--out", "cold", "--vlm_url", server.url,
            "--vlm_model", "V", "--reasoner_url", server.url, "--reasoner_model", "R", *more]


def build(server, *more):
    """Run the command; (kept records by id, manifest)."""
    data_prep.main(data_prep.parse_config(data_prep.Config, flags(server, *more)))
    kept = read_records("cold/train.jsonl", need=("answer", "response"))
    return {record["id"]: record for record in kept}, json.loads(Path("cold/train_manifest.json").read_text())


def refusal(server, *more):
    with pytest.raises(ValueError) as error:
        build(server, *more)
    assert "\n" not in str(error.value)
    return str(error.value)


def logged():
    return [json.loads(line) for line in Path("cold/calls.jsonl").read_text().splitlines()]


def reasoned(serve, replies):
    """Build rows whose answer is 3, the reasoner saying the i-th reply about row-i."""
    make_rows(len(replies), answer="3")
    return build(serve(lambda call, n, s: replies[int(call[0].removeprefix("row-"))]
                       if call[1] == "reasoning" else right(call)))


# ----- rows that are kept


def test_a_row_goes_through_three_calls(serve, capsys):
    """Prompts, pixels and sampling of each call; a target in the project's format; the manifest adds up."""
    make_rows(6, system="Be brief.")
    server = serve()
    kept, manifest = build(server, "--concurrency", "2", "--task", "counting")
    assert [*kept] == [f"row-{i}" for i in range(6)]
    for i, record in enumerate(kept.values()):
        assert record["response"] == (f"<think> The image shows there are {i} dots. </think> "
                                      f"<answer> {i} </answer>")
        assert rewards.accuracy(record["response"], record) == 1
        assert rewards.format_think_answer(record["response"], record) == 1
        assert record["task"] == "counting" and record["system"] == "Be brief."
        assert Image.open(record["images"][0]).tobytes() == picture(56, 42, seed=i).tobytes()
    assert Counter(server.asked) == {(row, stage): 1 for row in kept for stage in data_prep.STAGES}
    for call, body, headers in zip(server.asked, server.bodies, server.headers):
        text, images = prompt_of(body)
        number = call[0].removeprefix("row-")
        assert headers["path"] == "/v1/chat/completions" and "Authorization" not in headers
        assert f"{call[0]} How many dots?" in text and "Be brief." not in text and "{" not in text
        assert (f"The answer is {number}." in text) == (call[1] == "thought")
        assert (f"REASONING {number} of them" in text) == (call[1] == "description")
        assert (f"There are {number} dots." in text) == (call[1] == "reasoning")
        if call[1] == "reasoning":
            assert isinstance(body["messages"][0]["content"], str)
            assert (body["model"], body["temperature"], body["top_p"], body["seed"]) == ("R", 0.6, 0.95, 0)
        else:
            assert images[0].tobytes() == picture(56, 42, seed=int(number)).tobytes()
            assert text.startswith("<image>") and (body["model"], body["temperature"]) == ("V", 0)
    per_stage = {"calls": 6, "prompt_tokens": 600, "completion_tokens": 42}
    assert manifest["stages"] == {stage: per_stage for stage in data_prep.STAGES}
    assert [manifest[key] for key in ("rows", "records", "left_out", "rejects")] == [6, 6, {}, []]
    assert manifest["settings"]["reasoner_model"] == "R" and server.url not in json.dumps(manifest)
    shown = "".join(capsys.readouterr())
    assert "6 rows, 0 of them done; 18 calls to make at most" in shown
    assert re.search(r"first 2 rows: 6 calls in \d+ s; the other 4: about 12 calls, 1200 prompt and 84 "
                     r"completion tokens, \d\d:\d\d\n", shown)
    assert shown.index("first 2 rows") > shown.index("18 calls")


@pytest.mark.parametrize("told", [[], ["vlm"], ["reasoner"], ["vlm", "reasoner"]])
def test_the_gold_answer_is_shown_to_whom_the_flag_says(serve, told):
    make_rows(2)
    server = serve()
    build(server, "--show_gold", *told)
    seen = {stage for (row, stage), body in zip(server.asked, server.bodies)
            if f"The answer is {row.removeprefix('row-')}." in prompt_of(body)[0]}
    assert seen == {{"vlm": "thought", "reasoner": "reasoning"}[who] for who in told}


def test_a_response_of_its_own_saves_a_row_the_first_call(serve):
    """As LLaVA-CoT and Mulberry bring one. Options and marks in the question reach the servers."""
    choice = {"question": "row-1 Which <image> is it?", "answer": "B", "answer_type": "choice",
              "choices": ["a cat", "a dog"], "response": "REASONING as of old <image>"}
    make_rows(2, **choice)
    said = chat("<think>A dog, it barks.</think>(B)")
    server = serve(lambda call, n, s: said if call[1] == "reasoning" else right(call))
    kept, manifest = build(server)
    assert {stage for _, stage in server.asked} == {"description", "reasoning"}
    assert manifest["stages"]["thought"] == {} and len(kept) == 2
    assert {record["response"] for record in kept.values()} == {
        "<think> A dog, it barks. </think> <answer> B </answer>"}
    for (_, stage), body in zip(server.asked, server.bodies):
        text, images = prompt_of(body)
        assert "(A) a cat\n(B) a dog" in text
        assert len(images) == text.count("<image>") == (stage != "reasoning")
        assert ("Which [image] is it?" in text) == (stage == "reasoning")
        assert ("as of old image" in text) == (stage == "description")


def test_reasoners_write_their_thoughts_in_many_places(serve):
    said = [chat("<answer>3</answer>", reasoning_content="I count three."),
            chat("3", reasoning="I count three."),
            chat("<think>\nI count three.\n</think>\n\nSo it is \\boxed{3}."),
            chat("I count three.</think>The answer is 3."), chat("I count three. <answer>3 dots</answer>"),
            chat("<think>I count three.</think><answer>3</answer>", usage={"prompt_tokens": "many"})]
    kept, _ = reasoned(serve, said + [chat("<think>I count \ud83d.</think>3")])
    half_an_emoji = kept.pop("row-6")["response"]
    assert half_an_emoji == "<think> I count ?. </think> <answer> 3 </answer>"
    assert len(kept) == 6 and {record["response"] for record in kept.values()} == {
        "<think> I count three. </think> <answer> 3 </answer>"}


# ----- rows that are left out


def thinking(thought, answer="3"):
    return chat(f"<think>{thought}</think><answer>{answer}</answer>")


LOOP = "we look at the next one of the many dots that there are in this picture, "
LEFT_OUT = {
    "wrong answer": ("reasoning", thinking("I count.", "4")),
    "format 1": ("reasoning", thinking(" ")), "format 2": ("reasoning", chat("There are three.")),
    "format 3": ("reasoning", thinking("I <think> count.")),
    "format 4": ("reasoning", thinking("I <answer>3</answer> count.")),
    "format 5": ("reasoning", chat("", reasoning_content="I count three.")),
    "reasoning truncated": ("reasoning", chat("<think>I count", "length")),
    "reasoning truncated 2": ("reasoning", chat(None, "length")),
    "reasoning empty": ("reasoning", chat(" \n")),
    "reasoning too long": ("reasoning", chat("3", usage={"prompt_tokens": 9000, "completion_tokens": 7400})),
    "reasoning without seeing the image": ("reasoning", thinking("I can't see the image, so three it is.")),
    "thought without seeing the image": ("thought", chat("I'm sorry, I cannot help with that.")),
    "thought truncated": ("thought", chat("CAPTION", "length")),
    "description without seeing the image": ("description", chat("There is no image attached to this.")),
    "description empty": ("description", chat("")),
    "speaks of a description or a given answer": ("reasoning", thinking("By a description it is three.")),
    "speaks of a description or a given answer 2": ("reasoning", thinking("The given answer is three.")),
    "concludes otherwise": ("reasoning", thinking("I count. The answer is 5.")),
    "repetition": ("reasoning", thinking(LOOP * 9)),
}


def test_rows_are_left_out_for_a_reason_that_is_counted(serve):
    """Nothing is asked after the call that settles a row, nor by a second run; every row is accounted for."""
    make_rows(len(LEFT_OUT) + 2, answer="3")
    wanted = {f"row-{i}": (reason.rstrip(" 0123456789"), *fault)
              for i, (reason, fault) in enumerate(LEFT_OUT.items())}
    good = thinking("I count three.")

    def behave(call, n, server):
        reason, stage, reply = wanted.get(call[0], ("", "reasoning", good))
        return reply if call[1] == stage else right(call)

    server = serve(behave)
    kept, manifest = build(server)
    assert {reject["id"]: reject["reason"] for reject in manifest["rejects"]} == {
        row: reason for row, (reason, *_) in wanted.items()}
    assert manifest["left_out"] == Counter(reason for reason, *_ in wanted.values())
    assert [*kept] == [f"row-{len(LEFT_OUT) + k}" for k in (0, 1)] and manifest["records"] == 2
    assert manifest["records"] + sum(manifest["left_out"].values()) == manifest["rows"] == len(LEFT_OUT) + 2
    asked = sum(1 + data_prep.STAGES.index(stage) for _, stage, _ in wanted.values()) + 2 * 3
    assert len(server.asked) == len(logged()) == asked == sum(s["calls"] for s in manifest["stages"].values())
    assert build(server) == (kept, manifest) and len(server.asked) == asked


def test_thoughts_that_only_look_suspicious_are_kept(serve):
    thoughts = ["The value cannot be 4. Without a figure of speech: 3.", "No, wait: 3.",
                "I am not sorry: it is 3.", "It describes a circle. The answer is 3.",
                "Of the given answer choices, 3 fits.", "\\boxed{3}"]
    kept, _ = reasoned(serve, [thinking(thought) for thought in thoughts])
    assert [record["response"] for record in kept.values()] == [
        f"<think> {thought} </think> <answer> 3 </answer>" for thought in thoughts]


def test_a_question_about_a_description_keeps_the_word(serve):
    make_rows(1, question="row-0 Which caption fits, 3 or 4?", answer="3")
    said = thinking("The caption 3.")
    kept, _ = build(serve(lambda call, n, s: said if call[1] == "reasoning" else right(call)))
    assert kept["row-0"]["response"].startswith("<think> The caption 3. </think>")


def test_unreadable_images_are_counted_and_asked_once_mended(serve):
    make_rows(3)
    Path("1.png").write_bytes(b"not an image")
    server = serve()
    kept, manifest = build(server)
    assert [*kept] == ["row-0", "row-2"] and manifest["left_out"] == {"unreadable image": 1}
    assert "1.png" in manifest["rejects"][0]["detail"]
    picture(56, 42, seed=1).save("1.png")
    assert len(build(server)[0]) == 3 and len(server.asked) == 9


def test_llava_cot_is_bridged_from_its_file(serve, tmp_path):
    """Its thoughts stand in for the first call; a row that states no answer is left out unasked."""
    picture(56, 42).save("a.png")
    rows = [{"id": "x", "image": "a.png", "conversations": [
        {"from": "human", "value": f"row-{i} How many dots?"}, {"from": "gpt", "value": said}]}
        for i, said in enumerate(["<REASONING> r </REASONING> <CONCLUSION> 0 </CONCLUSION>", "Many dots."])]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    server = serve()
    kept, manifest = build(server)
    assert [*kept] == ["x:0"] and kept["x:0"]["answer"] == "0" and kept["x:0"]["task"] == "plain"
    assert manifest["left_out"] == {"no gold answer": 1}
    assert server.asked == [("row-0", "description"), ("row-0", "reasoning")]


# ----- word replacement

REWORDED = {
    "The description says that x is 3.": "The image shows that x is 3.",
    "According to the description, x is 3.": "According to the image, x is 3.",
    "as the given image description clearly states": "as the image clearly shows",
    "the image's caption doesn't mention it": "the image doesn't show it",
    "The description does not specify a unit.": "The image does not show a unit.",
    "I have a detailed description of the image.": "I have the image.",
    "Okay, a description of an image with dots.": "Okay, an image with dots.",
    "As described in the description, it is red": "As shown in the image, it is red",
    "Mentioned in the caption": "Shown in the image",
    "This description tells us more": "The image shows more",
    "the words in the picture say STOP": "the words in the picture say STOP",
    "the text says 5": "the text says 5",
}


@pytest.mark.parametrize("thought", REWORDED)
def test_reword(thought):
    assert reword(thought) == REWORDED[thought] and reword(REWORDED[thought]) == REWORDED[thought]


def test_rewording_again_changes_nothing():
    words = ("the a of description caption image's image says doesn't mention in described by this that text "
             "given only and Description").split()
    rng = random.Random(0)
    for _ in range(3000):
        once = reword(" ".join(rng.choices(words, k=rng.randint(1, 14))))
        assert data_prep.LEAK.search(once) or reword(once) == once


def test_hostile_thoughts_take_no_time():
    record = {"answer": "3", "answer_type": "number"}
    for text in ("the " * 9000 + "description", "the image" + " given" * 9000, "a description of " * 3000,
                 "no image " * 5000, "cannot see the " * 4000, "the description" * 4000,
                 "the answer is " * 4000):
        began = time.monotonic()
        data_prep.BLIND.search(text)
        with pytest.raises(data_prep.LeftOut):
            data_prep.cold_response(f"<think>{text}</think><answer>3</answer>", record, "Q?")
        assert time.monotonic() - began < 1


# ----- faults of servers


@pytest.mark.parametrize("faults, patience", [
    (sorted(PASSING.keys() - SLOW), "60"), (sorted(SLOW), "1")], ids=["at once", "by time"])
def test_faults_that_pass_are_retried(serve, faults, patience):
    """Twice the fault, then an answer, for a VLM's call and for the reasoner's: every row is kept."""
    make_rows(len(faults))

    def behave(call, n, server):
        faulty = n <= 2 and call[1] != "thought"
        return PASSING[faults[int(call[0].removeprefix("row-"))]] if faulty else right(call)

    server = serve(behave)
    kept, manifest = build(server, "--timeout", patience)
    assert len(kept) == len(faults) and manifest["rejects"] == [] and len(logged()) == 3 * len(faults)
    assert patience == "1" or len(server.asked) == 7 * len(faults)


def test_waits_have_full_jitter_and_respect_retry_after(serve, waits, monkeypatch):
    drawn = []
    monkeypatch.setattr(data_prep.random, "uniform", lambda a, b: drawn.append((a, b)) or b / 2)
    make_rows(1)
    faults = {1: (500, {}, b"busy"), 2: (429, {"Retry-After": "17"}, b""),
              3: (429, {"Retry-After": "999"}, b"")}
    build(serve(lambda call, n, s: faults[n] if call[1] == "thought" and n < 4 else right(call)))
    assert drawn[:4] == [(0, 1), (0, 2), (0, 4), (0, 8)] and waits == [0.5, 17, 60]


def test_a_row_without_replies_is_asked_again_by_the_next_run(serve, capsys):
    """A 400 is not retried. The row is listed with what the server said; other rows go on."""
    make_rows(3)
    refuse = 400, {}, b"too\nlong"
    server = serve(lambda call, n, s: refuse if call == ("row-1", "description") else right(call))
    kept, manifest = build(server)
    assert [*kept] == ["row-0", "row-2"] and server.asked.count(("row-1", "description")) == 1
    assert manifest["rejects"] == [{"id": "row-1", "reason": "no reply", "detail": "HTTP 400: too long"}]
    assert capsys.readouterr().out.endswith(
        "2 records; left out: 1 no reply; the same command asks again where no reply came\n")
    server.behave = right
    kept, manifest = build(server)
    assert [*kept] == ["row-0", "row-1", "row-2"] and manifest["rejects"] == []
    assert server.asked.count(("row-1", "thought")) == 1 and len(server.asked) == 10
    assert "3 rows, 2 of them done; 2 calls to make at most" in capsys.readouterr().out


def test_servers_that_answer_nothing_stop_the_run(serve):
    make_rows(40)
    server = serve(lambda call, n, s: (401, {}, b"no such key"))
    assert refusal(server, "--concurrency", "4") == (
        "none of the first 4 rows got its replies: HTTP 401: no such key")
    assert len(server.asked) == 4 and not Path("cold/train.jsonl").exists()


def test_no_row_to_keep_is_one_line_and_a_manifest(serve):
    make_rows(2)
    message = refusal(serve(lambda call, n, s: chat("")))
    assert message == "rows.jsonl without its rows left out (2 thought empty): no records"
    assert json.loads(Path("cold/train_manifest.json").read_text())["left_out"] == {"thought empty": 2}


def test_keys_go_to_their_servers_and_nowhere_else(serve, monkeypatch, capfd, tmp_path):
    make_rows(2)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-common")
    monkeypatch.setenv("REASONER_API_KEY", "sk-reasoner\n")
    echo = 403, {}, b"bad key sk-reasoner, sk-common"
    server = serve(lambda call, n, s: echo if call == ("row-1", "reasoning") else right(call))
    _, manifest = build(server)
    keys = {stage: headers["Authorization"] for (_, stage), headers in zip(server.asked, server.headers)}
    assert keys == {"thought": "Bearer sk-common", "description": "Bearer sk-common",
                    "reasoning": "Bearer sk-reasoner"}
    assert manifest["rejects"][0]["detail"] == "HTTP 403: bad key [key], [key]"
    texts = [p.read_text() for p in tmp_path.glob("cold/*") if p.is_file()] + list(capfd.readouterr())
    assert not any("sk-reasoner" in text for text in texts)
    monkeypatch.setenv("VLM_API_KEY", "sk\nsk")
    assert refusal(server).startswith("VLM_API_KEY: no header")


@pytest.mark.parametrize("more, message", [
    (["--vlm_model", ""], "--vlm_model: name the model"),
    (["--reasoner_model", ""], "--reasoner_model: name the model"),
    (["--vlm_url", "localhost:8000"], "--vlm_url localhost:8000: must begin with http"),
    (["--reasoner_url", "file:///etc"], "--reasoner_url file:///etc"),
    (["--show_gold", "all"], "--show_gold all: use"),
    (["--concurrency", "0"], "--concurrency 0"), (["--timeout", "nan"], "--timeout nan"),
    (["--retries", "-1"], "--retries -1"),
    (["--task", "box"], "--task box: use plain"), (["--input", "gone.jsonl"], "gone.jsonl: no such file"),
    (["--out", ".", "--split", "rows"], "--out .: rows.jsonl is the input"),
])
def test_bad_flags_are_one_line(serve, more, message):
    make_rows(1)
    server = serve()
    assert message in refusal(server, *more) and not server.asked


# ----- kill -9


def test_kill_9_loses_no_row_and_asks_none_twice(serve):
    """Killed at 20 and 55 of 90 replies, each time within a line: only what had no reply is asked again."""
    make_rows(30)
    answered, asked, lock, log = [], [], threading.Lock(), Path("cold/calls.jsonl")

    def metered(most):
        """A server that falls silent after so many replies."""
        left = [most]

        def behave(call, n, server):
            with lock:
                asked.append(call)
                left[0] -= 1
                if go := left[0] >= 0:
                    answered.append(call)
            if not go:
                server.gone.wait(30)
            return right(call)
        return serve(behave)

    for total, new in ((20, 20), (55, 35)):
        command = [sys.executable, ROOT / "data_prep.py", *flags(metered(new), "--concurrency", "5")]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        wait_until(lambda: lines_in(log) >= total, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert log.read_bytes().count(b"\n") == total and not Path("cold/train.jsonl").exists()
        with log.open("ab") as file:
            file.write(b'{"call": "half a li')
    kept, manifest = build(metered(35), "--concurrency", "5")
    once = {(f"row-{i}", stage): 1 for i in range(30) for stage in data_prep.STAGES}
    assert len(kept) == 30 and Counter((row["id"], row["stage"]) for row in logged()) == once
    assert Counter(answered) == once and len(asked) <= 90 + 2 * 5
    assert {stage: spent["calls"] for stage, spent in manifest["stages"].items()} == dict.fromkeys(
        data_prep.STAGES, 30)
    before = Path("cold/train.jsonl").read_bytes()
    build(metered(0), "--concurrency", "9")
    assert Path("cold/train.jsonl").read_bytes() == before and len(asked) <= 100


def test_what_decides_on_a_reply_is_asked_anew_and_nothing_else(serve):
    make_rows(2)
    server = serve()
    build(server)
    for more, stages in ((["--reasoner_model", "S"], {"reasoning"}), (["--temperature", "1"], {"reasoning"}),
                         (["--seed", "1"], {"reasoning"}), (["--show_gold"], {"thought"}),
                         (["--max_new_tokens", "99"], {*data_prep.STAGES}), (["--n", "1"], set()),
                         ([], set())):
        before = len(server.asked)
        build(server, *more)
        assert {stage for _, stage in server.asked[before:]} == stages, more


def test_a_log_that_is_broken_inside_is_named(serve):
    make_rows(1)
    server = serve()
    build(server)
    text = Path("cold/calls.jsonl").read_text()
    Path("cold/calls.jsonl").write_text(f"{{broken\n{text}")
    assert refusal(server).startswith("cold/calls.jsonl line 1: Expecting ")
    Path("cold/calls.jsonl").write_text("{}\n" + text)
    assert refusal(server) == "cold/calls.jsonl: a line without 'call' is no reply"


# ----- Vision-R1-cold: both of its files, and system turns

TARGET = "<think>I count.</think><answer> Final Answer:3 </answer>"
TURNS = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": TARGET}]
ROW = {"id": "coco", "image": "a.png", "conversations": TURNS}
MULBERRY = {"images": "a.png", "conversations": [{"from": "user", "value": "How many?"},
                                                 {"from": "assistant", "value": TARGET}]}


def read(row):
    Path("x.json").write_text(json.dumps([row]))
    [record] = read_records("x.json", need=("response",))
    return record


@pytest.mark.parametrize("row, expected", [
    (ROW, {"id": "coco:0", "system": None}), (MULBERRY, {"id": "a.png:0"}),
    (MULBERRY | {"images": ["a.png"]}, {"id": "a.png:0"}),
    (ROW | {"system": "Be brief."}, {"system": "Be brief."}), (ROW | {"system": None}, {"system": None}),
    (ROW | {"system": ""}, {"system": ""}),
    (ROW | {"conversations": [{"from": "system", "value": "S"}, *TURNS]}, {"system": "S"}),
    ({"image": "a.png", "messages": [
        {"role": "system", "content": "S"}, {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": TARGET}]}, {"id": "0", "system": "S"}),
])
def test_both_variants_become_the_same_record(tmp_path, row, expected):
    record = read(row)
    assert {field: record.get(field) for field in expected} == expected
    assert record["question"] == "How many?" and record["answer"] == "3" and record["task"] == "plain"
    assert record["images"] == [str(tmp_path / "a.png")] and rewards.build_prompt(record) == "How many?"
    assert rewards.accuracy(record["response"], record) == rewards.hfrrf(record["response"], record) == 1
    turns = build_messages(record)
    assert [turn["role"] for turn in turns] == ["system"] * bool(record.get("system")) + ["user"]
    assert [part["type"] for part in turns[-1]["content"]] == ["image", "text"]


@pytest.mark.parametrize("row, message", [
    (ROW | {"conversations": TURNS[::-1]}, "row 1: conversations are by assistant, user, not by user"),
    (ROW | {"conversations": TURNS[:1] * 2 + TURNS[1:]}, "row 1: conversations are by user, user, assistant"),
    (ROW | {"conversations": TURNS + TURNS[::-1]}, "row 1: conversations are by assistant, user, not by"),
    (ROW | {"conversations": TURNS * 2 + TURNS[:1]}, "row 1: conversations are by user, assistant, user, n"),
    (ROW | {"conversations": []}, "row 1: conversations are by , not by user, assistant"),
    (ROW | {"conversations": [{"from": "human", "text": "Q?"}]}, "row 1: no column 'content'"),
    (ROW | {"image": ["a.png"] * 2, "conversations": [{"from": "human", "value": "<image>?"}, TURNS[1]]},
     "field 'images' has 2 entries for 1 <image>"),
])
def test_rows_that_break_the_layout_are_named(row, message):
    with pytest.raises(ValueError) as error:
        read(row)
    assert message in str(error.value) and str(error.value).startswith("x.json row 1")


def test_ids_that_name_a_picture_may_repeat():
    Path("x.json").write_text(json.dumps([ROW, ROW]))
    assert [r["id"] for r in read_records("x.json", need=("response",))] == ["coco:0", "coco:1"]


@pytest.mark.parametrize("system", [[], [{"from": "system", "value": "S"}]])
def test_questions_about_one_image_are_rows_of_their_own(tmp_path, system):
    """Row numbers stay those of the file."""
    more = [{"from": "human", "value": "And squares?"}, {"from": "gpt", "value": TARGET.replace("3", "4")}]
    Path("x.json").write_text(json.dumps([ROW, ROW | {"conversations": system + TURNS + more}, ROW]))
    first, second, third, last = read_records("x.json", need=("answer", "response"))
    assert [r["id"] for r in (first, second, third, last)] == ["coco:0", "coco.0:1", "coco.1:1", "coco:2"]
    assert (second["question"], second["answer"]) == ("How many?", "3")
    assert (third["question"], third["answer"]) == ("And squares?", "4")
    assert second.get("system") == third.get("system") == ("S" if system else None)
    assert third["images"] == [str(tmp_path / "a.png")]


def test_both_files_become_one(tmp_path):
    """Converted in the folder of their images, their records can be put one after the other."""
    picture(56, 42).save("a.png")
    for name, row in (("one", {**ROW, "id": "same"}), ("two", MULBERRY)):
        Path(f"{name}.json").write_text(json.dumps([row, row]))
        data_prep.main(data_prep.Config(source="records", input=f"{name}.json", split=name, out="."))
    Path("both.jsonl").write_text(Path("one.jsonl").read_text() + Path("two.jsonl").read_text())
    both = read_records("both.jsonl", need=("answer", "response"))
    assert [r["id"] for r in both] == ["same:0", "same:1", "a.png:0", "a.png:1"]
    assert {r["images"][0] for r in both} == {str(tmp_path / "a.png")} and not Path("images").exists()


@pytest.mark.parametrize("response, answer", [
    (TARGET, "3"), ("<think>So.</think><answer>\nFinal Answer: B\n</answer>", "B"),
    ("<think>So.</think> **Final Answer**\n\\boxed{B}", "B"), ("<think>So.</think> 3", "3"),
    ("<SUMMARY> s </SUMMARY>\n\n<REASONING> r </REASONING>\n\n<CONCLUSION> 12 cm </CONCLUSION>", "12 cm"),
    ("### Step 1: I look.\n### The final answer is: B", "B"), ("A cat on a mat.", None), ("3", None)])
def test_the_gold_answer_is_what_the_response_states(response, answer):
    """Vision-R1-cold, and what bridging starts from: LLaVA-CoT and Mulberry have no column for it."""
    record = read(ROW | {"conversations": [TURNS[0], {"from": "gpt", "value": response}]})
    assert record.get("answer") == answer and record["response"] == response


@pytest.mark.parametrize("stated, expected", [
    ("B", ("B", "choice")), ("(B)", ("B", "choice")), ("a dog", ("B", "choice")), ("C", ("C", "text")),
    ("a wolf", ("a wolf", "text"))])
def test_options_in_the_question_make_a_choice(stated, expected):
    question = {"from": "human", "value": "Which?\n(A) a cat\n(B) a dog"}
    said = {"from": "gpt", "value": f"So. The answer is {stated}"}
    record = read(ROW | {"conversations": [question, said]})
    assert (record["answer"], record["answer_type"]) == expected
    assert rewards.build_prompt(record) == question["value"]
    assert rewards.accuracy(record["response"], record) == 1


@pytest.mark.parametrize("layout", data_prep.LAYOUTS)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_records_become_sharegpt_files_and_come_back(serve, layout, system):
    """dataset_info.json names each column and tag for LLaMA-Factory, `system` only where there is one."""
    make_rows(3, **({"system": system} if system else {}))
    kept, _ = build(serve())
    data_prep.main(data_prep.Config(source="records", input="cold/train.jsonl", form=layout, out="cold"))
    again = read_records("cold/train.json", need=("response",))
    assert again == [*kept.values()]
    turns, speaker, text, user, assistant, images = data_prep.LAYOUTS[layout]
    for row in json.loads(Path("cold/train.json").read_text()):
        assert [turn[speaker] for turn in row[turns]] == [user, assistant] and len(row[images]) == 1
        assert row[turns][0][text].startswith("<image>row-") and row.get("system") == system
    entry = json.loads(Path("cold/dataset_info.json").read_text())["train"]
    assert entry["file_name"] == "train.json" and entry["formatting"] == "sharegpt"
    columns = {"messages": turns, "images": images} | ({"system": "system"} if system else {})
    assert entry["columns"] == columns
    assert [*entry["tags"].values()] == [speaker, text, user, assistant]
    assert [*entry["tags"]] == ["role_tag", "content_tag", "user_tag", "assistant_tag"]
    with pytest.raises(ValueError, match="--form rl: use sharegpt | llava_cot | mulberry"):
        data_prep.main(data_prep.Config(source="records", input="cold/train.jsonl", form="rl", out="cold"))


def test_a_system_turn_reaches_every_stage(tiny, family):
    """The same prompt in SFT, GRPO and evaluation, whatever the family; a server gets the same turns."""
    record = {"id": "q", "question": "one <image> two", "images": [picture(84, 84)], "answer_type": "text",
              "task": "plain", "system": "one two three"}
    prompts = [stage.encode_prompt(record, family.processor, 10**6) for stage in (sft, grpo, evaluation)]
    texts = [family.processor.tokenizer.decode(prompt["request"]["ids"]) for prompt in prompts]
    plain = sft.encode_prompt({**record, "system": ""}, family.processor, 10**6)
    assert len(set(texts)) == 1 and texts[0].count("one two three") == 1
    assert len(prompts[0]["input_ids"][0]) > len(plain["input_ids"][0])
    body = evaluation.chat_request(record, "m", evaluation.Config())
    assert body["messages"][0] == {"role": "system", "content": [{"type": "text", "text": "one two three"}]}
    assert [part["type"] for part in body["messages"][1]["content"]] == ["text", "image_url", "text"]


def test_sft_learns_from_both(work, serve):  # noqa: F811
    """Bridged records, and the same as Vision-R1-cold's file, with a system turn: the same first row."""
    os.chdir(work)
    make_rows(4, system="user")
    build(serve())
    data_prep.main(data_prep.Config(source="records", input="cold/train.jsonl", form="mulberry", out="cold"))
    shown = []
    for data in ("cold/train.jsonl", "cold/train.json"):
        output = run(work, "sft.py", "--model", "tiny", "--data", data, "--steps", "1", "--batch_size", "4",
                     "--out", "learnt")
        assert "no evaluation: data/mini/counting_id.jsonl belongs to the default --data" in output
        shown.append(re.search(r"first row, what is learnt in \[\[ ]]: (.*?]])", output, re.DOTALL)[1])
    assert shown[0] == shown[1] and "system\nuser<|im_end|>" in shown[0]
    assert "[[<think> The image shows" in shown[0]
