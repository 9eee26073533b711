"""A policy that cannot see looks for holes: what tests/bench_blind.py plays earns no more
than an honest guess.
"""
import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import bench_blind  # noqa: E402
import rewards  # noqa: E402

# mean pay of the best play where a reward's published definition lets the blind earn more than a guess does
BY_DEFINITION = {
    "format": 1, "format_legacy": 1, "format_caption": 1, "steps": 1, "grounding_format": 1,
    "distribution_format": 1, "visual_rft_conf": 1, "contains": 1, "functions": 0.22,
    "functions_full": 0.1, "functions_penalty": 0.1,
}


@pytest.fixture(autouse=True)
def fewer_plays(monkeypatch):
    """One response in form, one that is only a box and one in prose, and half the records;
    the bench has more.
    """
    monkeypatch.setattr(bench_blind, "FRAMES", [bench_blind.FRAMES[k] for k in (0, 2, 3)])
    for kind in ("math", "boxes", "distribution"):
        monkeypatch.setitem(bench_blind.RECORDS, kind, bench_blind.RECORDS[kind][::2])


def test_every_reward_is_played():
    assert list(bench_blind.KINDS) and bench_blind.KINDS.keys() == rewards.REWARDS.keys()


@pytest.mark.parametrize("name", list(bench_blind.KINDS))
def test_no_play_beats_an_honest_guess(name):
    for kind in bench_blind.KINDS[name]:
        if name in ("agreement", "rise") and kind not in rewards.ANNOTATIONS:
            continue  # accuracy, which is played
        (pay, play), (honest, _) = bench_blind.best(name, kind)
        assert pay <= max(honest, BY_DEFINITION.get(name, 0)) + 1e-9, (kind, pay, honest, play)


def test_what_is_said_of_two_published_rewards():
    cup = bench_blind.RECORDS["boxes"][0]
    miss = f"<answer>[{bench_blind.SURE.format(0)}]</answer>"
    assert rewards.visual_rft_conf(miss, cup) == 1 and rewards.visual_rft_iou(miss, cup) == 0
    animals = ["cat", "tapir", "panda", "zebra", "ibex"]
    golds = [{"answer": name, "answer_type": "text"} for name in animals]
    assert [rewards.contains("<answer>a</answer>", gold) for gold in golds] == [1, 1, 1, 1, 0]
    assert all(rewards.contains(f"<answer>{', '.join(animals)}</answer>", gold) for gold in golds)


GOLDS = ["", " ", ".", "?", "-", "*", ",", "!", "$", "{}", "[]", "...", '""', "\\", "\\text{}", "()", "nan",
         "None"]


@pytest.mark.parametrize("kind", rewards.ANSWER_TYPES)
@pytest.mark.parametrize("gold", GOLDS)
def test_empty_and_punctuation_golds_pay_for_themselves_alone(kind, gold):
    if kind == "choice":
        return  # data_prep.py makes sure that it is a letter
    record = bench_blind.RECORDS["text"][0] | {"answer": gold, "answer_type": kind}
    others = [answer for answer in GOLDS if answer.strip() != gold.strip()] + ["x", "3", "A"]
    for answer in others:
        # prose has its own full stop
        for frame in bench_blind.FRAMES[:2 if answer.strip() in ("", ".") else 3]:
            for name in ("accuracy", "boxed", "discrete", "numeric", "agreement", "functions",
                         "detection_legacy"):
                assert rewards.REWARDS[name](frame.format(answer), record) == 0, (name, answer, frame)
    for name, reward in rewards.REWARDS.items():
        for answer in GOLDS:
            assert math.isfinite(reward(f"<answer>{answer}</answer>", record)), name
    if gold.strip() == "":
        assert {rewards.REWARDS[name](f"<answer>{text}</answer>", record) for text in (gold, "", "x")
                for name in ("accuracy", "discrete", "contains")} == {0.0}
