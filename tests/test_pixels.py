"""Pixels travel, wait and are moved in the dtype that the policy computes with:
bf16 on a GPU, here by hand.
"""
import pickle

import pytest
import torch
from conftest import CPU, RECORDS
from test_selfcheck import in_this_process, small_run  # noqa: F401

import data_prep
import eval as evaluation
import grpo
import sft
from test_rise import train, world  # noqa: F401

BF16 = torch.bfloat16


@pytest.fixture
def in_bf16(monkeypatch):
    """Policies and engines compute in bf16, as on a GPU."""
    for stage in (sft, evaluation):
        monkeypatch.setattr(stage, "compute_dtype", lambda device: BF16)


@pytest.mark.parametrize("name", RECORDS)
def test_only_pixels_are_cast(family, name):
    usual = sft.encode_prompt(RECORDS[name], family.processor, 10**6)
    cast = sft.encode_prompt(RECORDS[name], family.processor, 10**6, dtype=BF16)
    assert cast.keys() == usual.keys() and cast["request"]["ids"] == usual["request"]["ids"]
    floating = {key for key in usual if key != "request" and usual[key].is_floating_point()}
    assert floating == ({"pixel_values"} if RECORDS[name]["images"] else set()) == {*sft.pixel_names(cast)}
    for key in usual.keys() - {"request"}:
        if key in floating:
            assert cast[key].dtype == BF16 and torch.equal(cast[key], usual[key].to(BF16))
        else:
            assert cast[key].dtype == usual[key].dtype and torch.equal(cast[key], usual[key])
    if floating:  # so much less is what a worker sends
        saved = usual["pixel_values"].nbytes / 2
        assert len(pickle.dumps(usual)) - len(pickle.dumps(cast)) == pytest.approx(saved, rel=0.01)


def test_a_policy_in_bf16_sees_the_same_pixels(family, in_bf16):
    """It would cast them itself: what it computes is bit for bit the same."""
    policy, processor = sft.load_policy(family.path, grpo.Config(), CPU)
    assert policy.compute_dtype == BF16
    logps = []
    for dtype in (torch.float32, BF16):
        rows = [(sft.encode_prompt(record, processor, 10**6, dtype=dtype), [3, 4, 5])
                for record in RECORDS.values()]
        inputs, mask = sft.collate(rows, None, 0, CPU)
        assert inputs["pixel_values"].dtype == dtype
        with torch.no_grad():
            logps.append(policy.token_logprobs(inputs, mask))
    assert torch.equal(*logps)


@pytest.fixture
def seen(monkeypatch):
    """dtypes of all pixels that were collated for a model, the dummy's too."""
    dtypes = set()
    collate = sft.collate

    def watched(*args):
        inputs, mask = collate(*args)
        dtypes.update(inputs[name].dtype for name in sft.pixel_names(inputs))
        return inputs, mask

    for stage in (sft, evaluation):
        monkeypatch.setattr(stage, "collate", watched)
    return dtypes


@pytest.mark.parametrize("stage", [sft, grpo])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_run_has_pixels_of_one_dtype(
        stage, bf16, tiny, tmp_path, in_this_process, seen, request):  # noqa: F811
    if bf16:
        request.getfixturevalue("in_bf16")
    shared = dict(model=tiny.model, out=str(tmp_path / "out"), steps=1, workers=1, eval_every=1, eval_n=4,
                  eval_data=str(tiny.mini / "counting_id.jsonl"),
                  data=str(tiny.mini / "counting_train.jsonl"))
    if stage is grpo:
        shared |= dict(prompts_per_step=2, group_size=2, max_new_tokens=4)
    stage.main(stage.Config(**shared))
    assert seen == {BF16 if bf16 else torch.float32}


def test_both_hops_have_pixels_of_one_dtype(world, group, monkeypatch, tmp_path, in_bf16, seen):  # noqa: F811
    train(world, monkeypatch, tmp_path, "--steps", "1", "--graded", "both", "--workers", "1",
          "--max_mismatch", "9")
    assert seen == {BF16}


def test_evaluation_has_pixels_of_the_engines_dtype(tiny, tmp_path, monkeypatch, in_bf16, seen):
    cfg = evaluation.Config(max_new_tokens=2, workers=1)
    records = data_prep.read_records(tiny.mini / "counting_id.jsonl")[:3]
    assert len([*evaluation.open_engine(tiny.model, cfg)(records)]) == 3
    assert seen == {BF16}
