"""Tables of eval.py: further scores, breakdowns, averages by a named rule, several models side by side."""
import json
import math
import re
import shutil

import pytest
from PIL import Image

import eval as evaluation
import rewards
from data_prep import read_records

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
    monkeypatch.setattr(evaluation, "open_engine", lambda *_: lambda records: (
        (record, [{"response": asked.append(rewards.build_prompt(record)) or "-", "tokens": 1,
                   "truncated": False}]) for record in records))
    argv = ["--bench", f"structure-id={tiny.mini}/structure_id.jsonl", "--model", tiny.model, "--limit", "6"]
    for flags in [], ["--task", "structure_answer"]:
        evaluation.main(evaluation.parse_config(evaluation.Config, argv + flags))
    assert len(asked) == 12 and all("<think>" in prompt for prompt in asked[:6])
    assert all(re.search(r"Give only the (number|letter of the right option)\.$", p) for p in asked[6:])


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
