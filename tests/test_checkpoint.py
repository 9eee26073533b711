"""What is kept between steps and runs: checkpoints, what open_run starts from, updates that are skipped."""
import dataclasses
import json
import math
import shutil

import pytest
import torch

import grpo
import sft

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


# ----- what a run starts from


@pytest.fixture
def room(group, tiny, tmp_path, monkeypatch):
    """A folder to work in, with the default data and the tiny model."""
    shutil.copytree(tiny.mini, tmp_path / "data/mini")
    shutil.copytree(tiny.model, tmp_path / "out/tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def opened(stage=sft, **flags):
    need = "response" if stage is sft else "answer"
    return sft.open_run(stage.Config(**{"model": "out/tiny"} | flags), CPU, need=(need,))


def test_a_run_that_is_resumed_goes_on_from_its_newest_step(room):
    """Weights, moments, step and extra are those that were saved; `origin` stays the model it began with."""
    cfg, policy, processor, optimizer, _ = trained("out/tiny", room / "run")
    for step in (3, 7):
        with torch.no_grad():
            for p in policy.parameters():
                p.add_(0.01)
        sft.save_checkpoint(cfg, step, policy, processor, optimizer, {"entries": [step]})
    (room / "run/step_000009.tmp").mkdir()
    again = opened(out="run", resume=True)
    assert (again.origin, again.done, again.extra) == ("out/tiny", 7, {"entries": [7]})
    kept = dict(policy.named_parameters())
    for name, p in again.policy.named_parameters():
        assert torch.equal(full(p), full(kept[name]))
        state, saved = again.optimizer.state[p], optimizer.state[kept[name]]
        assert state.keys() == saved.keys() and all(torch.equal(full(state[k]), full(saved[k])) for k in state)
    assert again.optimizer.skipped == 0 and len(again.records) == 24 and len(again.held_out) == 12


def test_a_new_run_starts_from_the_model(room):
    for flags in ({}, {"resume": True}):  # there is nothing to resume yet
        run = opened(grpo, out="fresh", **flags)
        assert (run.origin, run.done, run.extra) == ("out/tiny", 0, None) and not run.optimizer.state


def test_a_checkpoint_of_more_ranks_is_refused(room):
    cfg, policy, processor, optimizer, _ = trained("out/tiny", room / "run")
    sft.save_checkpoint(cfg, 3, policy, processor, optimizer)
    path = room / "run/step_000003/meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"world_size": 2}))
    with pytest.raises(ValueError, match=r"step_000003 was saved by 2 rank\(s\), this run has 1"):
        opened(out="run", resume=True)


@pytest.mark.parametrize("model, out", [
    ("out/tiny", "out/tiny"), ("out/tiny", "out/../out/tiny/"), ("out/tiny", "out"), ("out/tiny", "."),
    ("out/begun", "out/begun"), ("out/begun/step_000002", "out/begun"), ("link", "out/begun"),
    ("out/begun", "link")])
def test_a_run_does_not_move_its_own_start_aside(room, model, out):
    """A new run moves what stands at --out aside: the model, its run, or a folder that holds it."""
    shutil.copytree("out/tiny", "out/begun/step_000002")
    (room / "out/begun/step_000002/meta.json").write_text('{"step": 2, "world_size": 1}')
    (room / "link").symlink_to(room / "out/begun")
    with pytest.raises(ValueError, match=f"^--out {out} holds the model to start from: name another --out, or"):
        opened(model=model, out=out)


def test_beside_the_model_is_a_place_for_a_run(room):
    shutil.copytree("out/tiny", "out/begun/step_000002")
    (room / "out/begun/step_000002/meta.json").write_text('{"step": 2, "world_size": 1}')
    for model, out in (("out/begun", "out/begun2"), ("out/tiny", "out/tiny/more")):
        assert opened(model=model, out=out).done == 0


OTHER = "data/mini/structure_train.jsonl"


@pytest.mark.parametrize("stage", [sft, grpo])
@pytest.mark.parametrize("flags, held_out", [
    ({}, 12), ({"eval_n": 5}, 5), ({"eval_data": ""}, 0), ({"data": OTHER}, 0), ({"data": OTHER, "eval_data": ""}, 0),
    ({"data": OTHER, "eval_data": "data/mini/structure_id.jsonl"}, 12),
    ({"eval_data": "data/mini/structure_id.jsonl"}, 12),
])
def test_the_default_held_out_rows_belong_to_the_default_data(room, stage, flags, held_out):
    """Who names other data must not see the accuracy on questions of the mini suite beside it."""
    assert len(opened(stage, **flags).held_out) == held_out


def test_held_out_rows_that_are_asked_for_must_be_there(room):
    with pytest.raises(ValueError, match="gone.jsonl"):
        opened(data=OTHER, eval_data="gone.jsonl")


# ----- updates


@pytest.fixture
def step(group, tmp_path):
    """step(gradient) is one optimizer step on a policy of two weights, which it has as an attribute."""
    policy = torch.nn.Linear(2, 1, bias=False)
    cfg = dataclasses.replace(sft.Config(), out=str(tmp_path / "run"))
    optimizer, log = sft.make_optimizer(policy, cfg), sft.RunLog(cfg)

    def one(gradient, lr=0.1):
        policy.weight.grad = torch.tensor([gradient])
        return sft.optimizer_step(policy, optimizer, lr, 1.0, log)

    one.policy, one.optimizer, one.out = policy, optimizer, log.out
    yield one
    log.bar.close()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_skipped(step, bad):
    """Neither weights nor moments move, nor does the gradient stay; the norm says what it was."""
    assert step([3.0, 4.0]) == pytest.approx(5.0)  # before clipping
    before = step.policy.weight.detach().clone()
    moments = {k: v.clone() for k, v in step.optimizer.state[step.policy.weight].items()}
    assert not math.isfinite(step([bad, 1.0], lr=0.7))
    assert torch.equal(step.policy.weight, before) and step.policy.weight.grad is None
    after = step.optimizer.state[step.policy.weight]
    assert moments.keys() == after.keys() and all(torch.equal(moments[k], after[k]) for k in after)
    step([1.0, 0.0], lr=0.2)
    assert not torch.equal(step.policy.weight, before)
    assert {group["lr"] for group in step.optimizer.param_groups} == {0.2}


def test_only_gradients_in_a_row_count_and_the_third_ends_the_run(step, capsys):
    for gradient in ([math.nan, 1.0], [1.0, math.inf], [1.0, 1.0]) * 3:
        step(gradient)
        assert step.policy.weight.isfinite().all()
    step([math.nan, 1.0])
    step([math.nan, 1.0])
    with pytest.raises(SystemExit) as end:
        step([math.nan, 1.0])
    told = str(end.value)
    assert "not finite 3 times in a row" in told and str(step.out) in told and "lower --lr" in told
    assert "\n" not in told and step.policy.weight.isfinite().all()
