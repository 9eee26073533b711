"""save_checkpoint and load_checkpoint keep every weight and every optimizer moment, whatever ran before."""
import dataclasses

import pytest
import torch

import sft
import grpo

CPU = torch.device("cpu")


def trained(path, out):
    """A policy after one update, its optimizer, processor and config, and a batch."""
    cfg = dataclasses.replace(grpo.Config(), out=str(out), lr=0.01, keep=9)
    policy, processor = sft.load_policy(path, cfg, CPU)
    optimizer = sft.make_optimizer(policy, cfg)
    records = ({"question": text, "images": [], "answer_type": "text"} for text in ("one", "two three"))
    batch = sft.collate([(sft.encode_prompt(r, processor, 10**6), [3, 4]) for r in records], None, 0, CPU)
    policy.token_logprobs(*batch).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    out.mkdir()
    return cfg, policy, processor, optimizer, batch


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@pytest.mark.parametrize("scored_first", [False, True])
def test_a_checkpoint_restores_weights_and_moments(group, tiny, tmp_path, scored_first):
    """FSDP leaves the outermost parameters gathered after a forward pass without backward."""
    cfg, policy, processor, optimizer, batch = trained(tiny.model, tmp_path / "run")
    kept = {name: {k: full(v).clone() for k, v in optimizer.state[p].items()}
            for name, p in policy.named_parameters() if p in optimizer.state}
    weights = {name: full(p).detach().clone() for name, p in policy.named_parameters()}
    if scored_first:
        with torch.no_grad():
            policy.token_logprobs(*batch)
    sft.save_checkpoint(cfg, 7, policy, processor, optimizer)
    again, _ = sft.load_policy(tmp_path / "run" / "step_000007", cfg, CPU)
    fresh = sft.make_optimizer(again, cfg)
    assert sft.load_checkpoint(tmp_path / "run" / "step_000007", again, fresh) == (7, [])
    assert len(kept) > 10
    for name, p in again.named_parameters():
        assert torch.equal(full(p), weights[name]), name
        assert fresh.state[p].keys() == kept.get(name, {}).keys(), f"{name} lost its moments"
        assert all(torch.equal(full(v), kept[name][k]) for k, v in fresh.state[p].items()), name
