"""Tables of eval.py: further scores, breakdowns, averages by a named rule, several models side by side."""
import json
import math
import re
import shutil

import pytest
from PIL import Image

import eval as evaluation
import rewards
from data_prep import read_records, write_records

SETTINGS = {"model": "m", "n": 1}


def rows_of(records, responses):
    replies = [[{"response": r, "tokens": 3, "truncated": False}] for r in responses]
    return [evaluation.graded(*pair, SETTINGS) for pair in zip(records, replies)]


def call_record(i, answer):
    return {"id": str(i), "question": "q", "images": [], "answer": answer, "answer_type": "calls",
            "meta": {"steps": len(rewards.CALL.findall(answer))}}


ONE, TWO = "change_color(0, red)", "change_color(2, 'red'), change_size(0, 'small')"


def test_transformations_have_exact_and_partial_scores_by_steps():
    records = [call_record(0, ONE), call_record(1, TWO), call_record(2, TWO)]
    rows = rows_of(records, ["<answer>change_color(0, red)</answer>",
                             "<answer>change_color(2, blue), change_size(0, small)</answer>", "none"])
    entry = evaluation.summarise("transform-id", evaluation.BENCHES["transform-id"], records, rows, 1.0)
    assert (entry["n"], entry["accuracy"]) == (3, 0.3333)
    assert entry["scores"] == {"partial": 0.5833}  # (1 + 0.75 + 0) / 3
    assert entry["by"] == {"steps": {"1": {"n": 1, "accuracy": 1.0, "scores": {"partial": 1.0}},
                                     "2": {"n": 2, "accuracy": 0.0, "scores": {"partial": 0.375}}}}


def test_structure_has_choice_number_and_overall(tiny):
    records = read_records(tiny.mini / "structure_id.jsonl")
    gold = [f"<answer>{r['answer']}</answer>" if r["answer_type"] == "choice" else "<answer>9</answer>"
            for r in records]
    entry = evaluation.summarise("structure-id", evaluation.BENCHES["structure-id"], records,
                                 rows_of(records, gold), 1.0)
    assert entry["accuracy"] == 0.5
    assert {kind: group["accuracy"] for kind, group in entry["by"]["answer_type"].items()} == {
        "choice": 1.0, "number": 0.0}


@pytest.mark.parametrize("present, average", [
    ({"transform-id": (0.9, 0.8), "transform-left": (0.3, 0.5), "transform-right": (0.6, 0.2)},
     {"transform average": (0.6, 0.5)}),
    ({"transform-id": (0.9, 0.8), "transform-left": (0.3, 0.5)}, {}),  # not of a part, silently
    ({"counting-id": (0.8,), "counting-ood": (0.2,)}, {"counting average": (0.5,)}),
])
def test_averages_follow_their_rule(present, average):
    """Reason-RFT's published column mixes (ID + L + R) / 3, (ID + (L + R) / 2) / 2 and (L + R) / 2."""
    summary = [{"bench": name, "n": 10 + i, "accuracy": accuracy, "by": {},
                "scores": dict(zip(("partial",), partial))}
               for i, (name, (accuracy, *partial)) in enumerate(present.items())]
    extra = evaluation.with_averages(summary)[len(summary):]
    assert {e["bench"]: (pytest.approx(e["accuracy"]), *map(pytest.approx, e["scores"].values()))
            for e in extra} == average
    assert all(e["rule"].startswith("mean of ") for e in extra)


def test_one_table_for_several_models(tiny, tmp_path, monkeypatch, capsys):
    """A column for each; a second time every answer is there, so that no model is loaded."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        shutil.copytree(tiny.model, name)
    benches = [f"transform-{split}={tiny.mini}/transform_{split}.jsonl" for split in ("id", "left", "right")]
    argv = ["--bench", *benches, "--model", "a", "b", "--limit", "4", "--max_new_tokens", "8"]
    evaluation.main(evaluation.parse_config(evaluation.Config, argv))
    shown = capsys.readouterr().out
    assert "| benchmark | n | a | b |" in shown and "transform average: mean of transform-id, " in shown
    assert "| transform-id, steps " in shown
    table = json.loads((tmp_path / "out/eval/table.json").read_text())
    assert list(table) == ["a", "b"] and (tmp_path / "out/eval/table.md").read_text() in shown
    assert [entry["bench"] for entry in table["a"]] == ["transform-id", "transform-left", "transform-right",
                                                        "transform average"]
    assert json.loads((tmp_path / "b/eval/summary.json").read_text()) == table["b"][:3]
    monkeypatch.setattr(evaluation, "open_engine", lambda *_: pytest.fail("loaded a model for nothing"))
    evaluation.main(evaluation.parse_config(evaluation.Config, argv))
    assert "| transform-id | 4 |" in capsys.readouterr().out


def test_task_sets_the_prompt_of_every_row(tiny, tmp_path, monkeypatch):
    """An answer to another prompt is another answer; the rows that were not asked with it do not count."""
    monkeypatch.chdir(tmp_path)
    asked = []

    def answered(records, finish):
        for record in records:
            asked.append(rewards.build_prompt(record))
            yield record, finish(record, [{"response": "-", "tokens": 1, "truncated": False}])

    monkeypatch.setattr(evaluation, "open_engine", lambda *_: answered)
    argv = ["--bench", f"structure-id={tiny.mini}/structure_id.jsonl", "--model", tiny.model, "--limit", "6"]
    for flags in [], ["--task", "structure_answer"]:
        evaluation.main(evaluation.parse_config(evaluation.Config, argv + flags))
    assert len(asked) == 12 and all("<think>" in prompt for prompt in asked[:6])
    assert all(re.search(r"Give only the (number|letter of the right option)\.$", p) for p in asked[6:])


# ----- without names: the benchmarks of the training data, and the start model beside the run


def run_dir(folder, model="", config=None, **flags):
    """A run directory: its flags, and a copy of a model as its only step."""
    folder.mkdir(parents=True)
    written = {"config": {"model": model, **flags}} if config is None else config
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def with_step(folder, source):
    shutil.copytree(source, folder / "step_000002")
    (folder / "step_000002/meta.json").write_text("{}")


COUNTING, MOOD_BENCHES = ["counting-id", "counting-ood"], ["mood-id", "mood-ood"]
TRANSFORM = ["transform-id", "transform-left", "transform-right"]


@pytest.mark.parametrize("data, names", [
    ("data/mini/counting_train.jsonl", COUNTING), ("/elsewhere/counting_train.jsonl", COUNTING),
    ("data/mini/transform_train.jsonl", TRANSFORM), ("data/mini/mood_see.jsonl", MOOD_BENCHES),
    ("data/mini/mood_talk.jsonl", MOOD_BENCHES), ("data/mini/counting_lessons.jsonl", COUNTING),
    ("data/mini/detect_train.jsonl", ["detect-id", "detect-ood"]),
    ("data/rft/structure_meta_rl.jsonl", ["structure-id", "structure-ood"]),
    ("data/rft/transform_meta_cot_sft.jsonl", TRANSFORM), ("data/mini/counting_meta.json", COUNTING),
    ("hiyouga/geometry3k", ["geometry3k"]), ("data/geometry3k/train.jsonl", ["geometry3k"]),
    ("./data/geometry3k", ["geometry3k"]), ("data/mega-bench/train.jsonl", ["mega-bench"]),
    ("MathLLMs/MathVision", ["mathvision", "mathvision-mini"]), ("MMMU/MMMU:Art", ["mmmu"]),
    ("out/annotate/sft.jsonl", MOOD_BENCHES), ("out/again/sft.jsonl", MOOD_BENCHES),
    ("mine.jsonl", []), ("data/mini/mine.jsonl", []), ("counting.jsonl", []), ("data/mini", []),
    ("people_counting_train.jsonl", []), ("someone/counting_train", []), ("out/own/sft.jsonl", []), ("", [])])
def test_the_benchmarks_of_training_data(data, names, tmp_path, monkeypatch):
    """Annotated records lead to the data that was annotated, through two rounds of it, too."""
    monkeypatch.chdir(tmp_path)
    run_dir(tmp_path / "out/annotate", data="data/mini/mood_train.jsonl")
    run_dir(tmp_path / "out/again", data="out/annotate/sft.jsonl")
    run_dir(tmp_path / "out/own", data="out/own/sft.jsonl")
    assert evaluation.benches_of(data) == names


@pytest.mark.parametrize("models, found", [
    (["grpo"], COUNTING), (["grpo/step_000002"], COUNTING), (["grpo", "rise"], COUNTING + MOOD_BENCHES),
    (["rise", "plain", "grpo"], MOOD_BENCHES + COUNTING), (["grpo", "again"], COUNTING),
    (["plain"], "plain does not say on which data it was trained; "
                "name what to run: a records file, or counting-id,"),
    (["org/model"], "org/model does not say"),
    (["mine"], "no benchmark goes with mine.jsonl, on which mine was")])
def test_the_benchmarks_of_models(models, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir(tmp_path / "grpo", data="data/mini/counting_train.jsonl")
    run_dir(tmp_path / "grpo/step_000002", config={"model_type": "qwen2_5_vl"})
    run_dir(tmp_path / "again", data="data/mini/counting_train.jsonl")
    run_dir(tmp_path / "rise", data="data/mini/mood_train.jsonl")
    run_dir(tmp_path / "mine", data="mine.jsonl")
    run_dir(tmp_path / "plain", config={"model_type": "qwen2_5_vl"})
    if isinstance(found, str):
        with pytest.raises(ValueError, match=re.escape(found)):
            evaluation.default_benches(models)
    else:
        assert evaluation.default_benches(models) == found


@pytest.fixture
def runs(tiny, tmp_path, monkeypatch):
    """A working folder like a user's: the mini suite, out/tiny, out/sft and out/grpo from it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mini").symlink_to(tiny.mini)
    shutil.copytree(tiny.model, tmp_path / "out/tiny")
    counting = "data/mini/counting_train.jsonl"
    with_step(run_dir(tmp_path / "out/sft", model="out/tiny", data=counting), tiny.model)
    with_step(run_dir(tmp_path / "out/grpo", model="out/sft", data=counting, max_new_tokens=7), tiny.model)
    return tmp_path


def evaluate(*argv):
    evaluation.main(evaluation.parse_config(evaluation.Config, list(argv)))


def kept(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_before_and_after_in_one_table(runs, capsys):
    """The start first, columns named by the run directories, both asked alike; the settings say how."""
    evaluate("--bench", "--limit", "3")
    shown = capsys.readouterr().out
    assert "| benchmark | n | out/sft | out/grpo |" in shown and "at most 7 tokens" in shown
    assert "\n| counting-id | 3 | " in shown and "\n| counting average | 6 | " in shown
    assert "out/grpo/step_000002" in shown and "transform" not in shown
    for name in ("sft", "grpo"):
        row = kept(runs / f"out/{name}/eval/counting-ood.jsonl")[0]
        assert row["settings"]["max_new_tokens"] == 7 and row["tokens"] <= 7
        assert row["settings"]["model"] == f"out/{name}/step_000002"
    table = json.loads((runs / "out/grpo/eval/table.json").read_text())
    assert list(table) == ["out/sft", "out/grpo"]
    assert (runs / "out/grpo/eval/table.md").read_text() in shown


@pytest.mark.parametrize("argv, heads", [
    (["--bench", "counting-id"], "| out/grpo |"),
    (["--bench", "counting-id", "--model", "out/sft"], "| out/sft |"),
    (["--model", "out/sft", "out/grpo"], "| out/sft | out/grpo |"), (["--model", "out/grpo", "out/sft"],
                                                                    "| out/grpo | out/sft |"),
    (["--model", "out/sft"], "| out/tiny | out/sft |"), (["--model", "out/grpo/step_000002"],
                                                        "| out/sft | out/grpo/step_000002 |")])
def test_which_models_a_table_has(runs, capsys, argv, heads):
    """What is named is run as named; the start comes only where nothing but one run is."""
    evaluate(*argv, "--limit", "2", "--max_new_tokens", "3")
    assert f"| benchmark | n {heads}" in capsys.readouterr().out


@pytest.mark.parametrize("model, reason", [
    ("out/gone", "out/gone: no such model"), ("out/broken", "out/broken"), ("", None)])
def test_a_start_that_cannot_be_shown_is_a_note(runs, capsys, model, reason):
    (runs / "out/broken").mkdir()
    flags = {"data": "data/mini/counting_train.jsonl", "max_new_tokens": 4}
    with_step(run_dir(runs / "out/other", model=model, **flags), runs / "out/tiny")
    evaluate("--model", "out/other", "--limit", "2")
    shown = capsys.readouterr().out
    assert "| benchmark | n | out/other |" in shown
    assert (f"{model}, from which out/other started, is not shown: {reason}" in shown) == bool(reason)


@pytest.mark.parametrize("flags, limit", [
    ({"max_new_tokens": 72}, 72), ({"max_new_tokens": 72, "ptst": ""}, 72),
    ({"max_new_tokens": 72, "ptst": "4096x16:100,8192x8:100,4096x2:5"}, 8192),
    ({"max_new_tokens": 72, "phase": "cot"}, 144), ({"data": "gone.jsonl"}, 1024), ({}, 1024)])
def test_the_length_of_a_run(flags, limit, tmp_path):
    run_dir(tmp_path / "run", **flags)
    assert evaluation.response_limit([str(tmp_path / "run")]) == limit
    run_dir(tmp_path / "run/step_000002", config={"model_type": "qwen2_5_vl"})
    assert evaluation.response_limit([str(tmp_path / "run/step_000002")]) == limit
    run_dir(tmp_path / "short", max_new_tokens=9)
    assert evaluation.response_limit([str(tmp_path / "short"), str(tmp_path / "run")]) == limit
    assert evaluation.response_limit([str(tmp_path / "short"), "org/model"]) == 1024


def test_the_length_after_sft_is_twice_what_it_learnt(runs, tiny):
    tokenizer = evaluation.AutoProcessor.from_pretrained(tiny.model).tokenizer
    longest = max(len(tokenizer(r["response"])["input_ids"]) for r in tiny.records)
    assert 20 < longest < 60 and evaluation.response_limit(["out/sft"]) == 2 * longest


def test_one_question_at_the_length_of_the_run(runs, tiny, capsys, monkeypatch):
    asked = []

    def open_engine(model, cfg):
        asked.append((model, cfg.max_new_tokens))
        return lambda records: [(records[0], [{"response": "three"}])]
    monkeypatch.setattr(evaluation, "open_engine", open_engine)
    image = tiny.records[0]["images"][0]
    for more in ([], ["--max_new_tokens", "5"]):
        evaluate("--image", image, "--prompt", "How many?", *more)
    assert asked == [("out/grpo/step_000002", 7), ("out/grpo/step_000002", 5)]


@pytest.mark.parametrize("argv, named", [
    (["--model", "out/none"], "out/none: no such model"), (["--model"], "--model: name at least one"),
    (["--model", "out/tiny"],
     "--bench: out/tiny does not say on which data it was trained; name what to run"),
    (["--bench", "counting"], "unknown benchmark counting; did you mean counting-"),
    (["--model", "out/sft", "--bench", "mathvista=gone.jsonl"], "gone.jsonl")])
def test_what_cannot_be_run_is_one_line(runs, argv, named):
    with pytest.raises(SystemExit) as stop:
        evaluate(*argv)
    assert named in stop.value.code and "\n" not in stop.value.code


def test_rows_that_were_paid_for_are_never_deleted(runs, monkeypatch, capsys):
    """Fewer rows leave them, other settings set them aside; asked as before, they are there again."""
    path, asked = runs / "out/grpo/eval/counting-id.jsonl", []
    whole = evaluation.answer_rows

    def counting(records, **more):
        asked.append(len(records))
        return whole(records, **more)

    monkeypatch.setattr(evaluation, "answer_rows", counting)
    usual = ["--bench", "counting-id", "--max_new_tokens", "3"]
    evaluate(*usual)
    rows = kept(path)
    evaluate(*usual, "--limit", "2")
    assert kept(path) == rows and "| counting-id | 2 |" in capsys.readouterr().out
    evaluate("--bench", "counting-id", "--max_new_tokens", "4")
    told = "counting-id.jsonl: 12 rows are now in counting-id.jsonl.old: max_new_tokens 3"
    assert told in capsys.readouterr().out
    assert {row["settings"]["max_new_tokens"] for row in kept(path)} == {4}
    evaluate(*usual, "--limit", "2")
    assert kept(path) == rows[:2]
    evaluate(*usual)
    assert kept(path) == rows and asked == [12, 12]
    evaluate("--bench", "counting-id", "--max_new_tokens", "4")
    assert len(kept(path)) == 12 and asked == [12, 12]
    assert len(kept(path.with_name("counting-id.jsonl.old"))) == 24
    assert "are now in" in capsys.readouterr().out


def test_rows_of_questions_that_changed_are_set_aside(runs, capsys):
    """A gold answer that was mended: that row is asked again; the others stay, those beyond --limit too."""
    source, path = runs / "mine.jsonl", runs / "out/tiny/eval/mine.jsonl"
    records = read_records("data/mini/counting_id.jsonl")
    write_records(source, records)
    asked = ["--bench", "mine.jsonl", "--model", "out/tiny", "--max_new_tokens", "3"]
    evaluate(*asked)
    rows = kept(path)
    records[1]["answer"] = "77"
    write_records(source, records)
    evaluate(*asked, "--limit", "5")
    assert kept(path) == [rows[0], kept(path)[1], *rows[2:]] and kept(path)[1]["answer"] == "77"
    assert kept(path.with_name("mine.jsonl.old")) == [rows[1]]
    assert "1 rows are now in mine.jsonl.old: another question or gold answer" in capsys.readouterr().out


def test_a_judge_deletes_no_rows_beyond_the_limit(runs, monkeypatch):
    path = runs / "out/tiny/eval/counting-id.jsonl"
    asked = ["--bench", "counting-id", "--model", "out/tiny", "--max_new_tokens", "3"]
    evaluate(*asked)
    rows = kept(path)
    monkeypatch.setattr(evaluation, "judged", lambda pair, cfg: pair[1] | {"judge": {
        "model": cfg.judge_model, "extracted": "1", "correct": 0.0}})
    evaluate(*asked, "--limit", "3", "--judge", "api", "--judge_model", "m")
    assert [row["id"] for row in kept(path)] == [row["id"] for row in rows]
    assert kept(path)[3:] == rows[3:] and any("judge" in row for row in kept(path)[:3])


def test_evaluation_leaves_a_core_free(runs, monkeypatch):
    """Threads that spin on a busy core made the two-core quickstart eight times slower."""
    used = []
    monkeypatch.setattr(evaluation.torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(evaluation.torch, "set_num_threads", used.append)
    for cores in (1, 2, 4, 64):
        monkeypatch.setattr(evaluation.os, "cpu_count", lambda: cores)
        evaluation.open_engine("out/tiny", evaluation.Config())
    assert used == [1, 1, 3, 8]


# ----- boxes and distributions

CUP = {"id": "0", "question": "Find every cup.", "images": [], "answer_type": "boxes",
       "meta": {"target": "cup"}, "answer": "[[0, 0, 100, 100], [200, 200, 300, 300]]"}
MOOD = {"id": "0", "question": "q", "images": [], "answer_type": "distribution",
        "answer": '{"joy": 0.6, "fear": 0.3, "anger": 0.1}', "meta": {"classes": ["joy", "fear", "anger"]}}
DETECT, FACES = evaluation.Bench("detect"), evaluation.Bench("mood")


def summary_of(bench, record, responses):
    records = [record | {"id": str(i), "images": [f"{i}.png"]} for i, _ in enumerate(responses)]
    return evaluation.summarise("b", bench, records, rows_of(records, responses), 1.0)


def test_scores_of_detection():
    """One row is right, one finds a box (IoU .5), misses one and invents one, one is unreadable."""
    entry = summary_of(DETECT, CUP, [
        "<think> two </think><answer>[[200, 200, 300, 300], [0, 0, 100, 100]]</answer>",
        "<think> at 0 0 100 50 </think><answer>[[0, 0, 100, 50], [600, 600, 700, 700]]</answer>", "none"])
    assert entry["accuracy"] == 0.3333 and entry["scores"] == {
        "iou": 0.4167, "precision": 0.5, "recall": 0.5, "f1": 0.5, "valid": 0.6667, "leaks": 0.3333}


def test_scores_of_grounding():
    """One box each: accuracy is that at an IoU of 0.5, iou the mean IoU."""
    lisa = CUP | {"answer": "[[100, 100, 300, 300]]", "task": "ground"}
    entry = summary_of(DETECT, lisa, [f"<answer>[{box}]</answer>" for box in
                                      ("150, 150, 350, 350", "100, 100, 300, 250", "5, 5")])
    assert entry["accuracy"] == 0.3333 and entry["scores"]["iou"] == 0.3804  # (.391304 + .75 + 0) / 3
    assert entry["scores"]["valid"] == 0.6667


def test_scores_of_distributions():
    entry = summary_of(FACES, MOOD, ['<answer>{"joy": 0.6, "fear": 0.3, "anger": 0.1}</answer>',
                                     '<think>Joy!</think><answer>{"fear": 1}</answer>', "joy: 1"])
    kl = [0.0, sum(p * math.log(p / q) for p, q in ((.6, 1e-10), (.3, 1), (.1, 1e-10))),
          sum(p * math.log(p / q) for p, q in ((.6, 1e-10), (.3, 1e-10), (.1, 1)))]
    mse = [0.0, (.36 + .49 + .01) / 3, (.36 + .09 + .81) / 3]
    assert entry["accuracy"] == 0.3333 and "coco" not in entry
    assert entry["scores"] == {"kl": pytest.approx(sum(kl) / 3, abs=1e-4), "valid": 0.6667, "leaks": 0.3333,
                               "mse": pytest.approx(sum(mse) / 3, abs=1e-4)}
    shown = evaluation.comparison({"m": [entry]})[2]
    assert f"(kl {sum(kl) / 3:.3f})" in shown and "(valid 66.7)" in shown


def test_coco_ap(monkeypatch):
    """AP 1 for perfect boxes; 0.505 at full precision for half of the boxes, by COCO's 101 recall points."""
    right = "<answer>[[0, 0, 100, 100], [200, 200, 300, 300]]</answer>"
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda _: None)
    entry = summary_of(DETECT, CUP, [right])
    assert entry["coco"] is None and "b: COCO AP n/a (needs pycocotools)" in evaluation.details([entry])[-1]
    monkeypatch.undo()
    pytest.importorskip("pycocotools")
    assert summary_of(DETECT, CUP, [right, right])["coco"] == {"AP": 1.0, "AP50": 1.0, "AP75": 1.0}
    half = summary_of(DETECT, CUP, [right, "nothing"])
    assert half["coco"] == {"AP": 0.505, "AP50": 0.505, "AP75": 0.505}
    assert "COCO AP 50.5, AP50 50.5" in evaluation.details([half])[-1]
    shifted = "<answer>[[0, 0, 100, 60], [200, 200, 300, 260]]</answer>"
    assert summary_of(DETECT, CUP, [shifted])["coco"] == {"AP": 0.3, "AP50": 1.0, "AP75": 0.0}
    assert summary_of(DETECT, CUP, ["nothing"])["coco"]["AP"] == 0


def test_boxes_on_the_image(tmp_path):
    assert evaluation.on_image((0, 500, 1000, 1000), (640, 480)) == (0, 240, 640, 480)
    Image.new("RGB", (640, 480), "white").save(tmp_path / "a.png")
    answer = "<answer>[[0, 500, 500, 1000], [900, 900, 800, -1e12]]</answer>"
    drawn = evaluation.draw_boxes(tmp_path / "a.png", answer, 10**6)
    assert drawn.size == (640, 480)
    assert drawn.getpixel((160, 240)) == drawn.getpixel((320, 300)) == (255, 0, 0)
    assert drawn.getpixel((160, 230)) == drawn.getpixel((160, 300)) == (255, 255, 255)
    with pytest.raises(ValueError, match="--save_image: the answer holds no boxes"):
        evaluation.draw_boxes(tmp_path / "a.png", "none", 10**6)


def test_save_image_draws_what_the_model_answers(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    record = read_records(tiny.mini / "detect_id.jsonl")[0]
    argv = ["--model", tiny.model, "--image", record["images"][0], "--prompt", record["question"],
            "--task", "boxes", "--save_image", "out.png", "--max_new_tokens", "4"]
    reply = {"response": f"<answer>{record['answer']}</answer>", "tokens": 1, "truncated": False}
    monkeypatch.setattr(evaluation, "open_engine", lambda *_: lambda records: [(records[0], [reply])])
    evaluation.main(evaluation.parse_config(evaluation.Config, argv))
    x1, y1, *_ = evaluation.on_image(json.loads(record["answer"])[0], (84, 84))
    assert Image.open("out.png").getpixel((round(x1) + 1, round(y1) + 1)) == (255, 0, 0)
    for wrong in (["--save_image", "out.png"], [*argv, "--save_image", "out.nothing"]):
        with pytest.raises(SystemExit, match="--save_image goes with|unknown file extension"):
            evaluation.main(evaluation.parse_config(evaluation.Config, wrong))


@pytest.mark.parametrize("record, right, wrong", [
    (CUP, "[[200, 200, 300, 300], [0, 0, 100, 100]]", "[[0, 0, 9, 9], [5, 5, 6, 6]]"),
    (MOOD, '{"joy": 0.9, "fear": 0.1}', '{"fear": 1}')])
def test_boxes_and_distributions_can_be_voted_on(record, right, wrong):
    replies = [{"response": f"<answer>{answer}</answer>", "tokens": 1, "truncated": False}
               for answer in (wrong, right, right)]
    row = evaluation.graded(record, [*replies, replies[0] | {"response": "none"}], SETTINGS | {"n": 4})
    assert row["correct"] == 0.5 and row["scores"]["maj@4"] == 1 and row["scores"]["valid"] == 0.75
