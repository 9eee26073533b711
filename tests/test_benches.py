"""Tables of eval.py: further scores, breakdowns, averages by a named rule, several models side by side."""
import json
import re
import shutil

import pytest

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
