"""What is kept between steps and runs: checkpoints, for any number of ranks; damage is told in one line."""
import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch

import data_prep
import grpo
import sft

from test_stages import GRPO, close, metrics, newest, run, weights, work  # noqa: F401

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
    flags = json.dumps({"config": dataclasses.asdict(sft.Config(model="out/tiny", out="run"))})
    (room / "run/config.json").write_text(flags)
    again = opened(out="run", resume=True)
    assert (again.origin, again.done, again.extras) == ("out/tiny", 7, [{"entries": [7]}])
    kept = dict(policy.named_parameters())
    for name, p in again.policy.named_parameters():
        assert torch.equal(full(p), full(kept[name]))
        state, saved = again.optimizer.state[p], optimizer.state[kept[name]]
        assert state.keys() == saved.keys() and all(
            torch.equal(full(state[k]), full(saved[k])) for k in state)
    assert again.optimizer.skipped == 0 and len(again.records) == 24 and len(again.held_out) == 12


def test_a_new_run_starts_from_the_model(room):
    for flags in ({}, {"resume": True}):  # there is nothing to resume yet
        run = opened(grpo, out="fresh", **flags)
        assert (run.origin, run.done, run.extras) == ("out/tiny", 0, []) and not run.optimizer.state


@pytest.mark.parametrize("model, out", [
    ("out/tiny", "out/tiny"), ("out/tiny", "out/../out/tiny/"), ("out/tiny", "out"), ("out/tiny", "."),
    ("out/begun", "out/begun"), ("out/begun/step_000002", "out/begun"), ("link", "out/begun"),
    ("out/begun", "link")])
def test_a_run_does_not_move_its_own_start_aside(room, model, out):
    """A new run moves what stands at --out aside: the model, its run, or a folder that holds it."""
    shutil.copytree("out/tiny", "out/begun/step_000002")
    (room / "out/begun/step_000002/meta.json").write_text('{"step": 2, "world_size": 1}')
    (room / "link").symlink_to(room / "out/begun")
    with pytest.raises(ValueError, match=f"^--out {out} holds the model to start from: "
                                         "name another --out, or"):
        opened(model=model, out=out)


def test_beside_the_model_is_a_place_for_a_run(room):
    shutil.copytree("out/tiny", "out/begun/step_000002")
    (room / "out/begun/step_000002/meta.json").write_text('{"step": 2, "world_size": 1}')
    for model, out in (("out/begun", "out/begun2"), ("out/tiny", "out/tiny/more")):
        assert opened(model=model, out=out).done == 0


OTHER = "data/mini/structure_train.jsonl"


@pytest.mark.parametrize("stage", [sft, grpo])
@pytest.mark.parametrize("flags, held_out", [
    ({}, 12), ({"eval_n": 5}, 5), ({"eval_data": ""}, 0), ({"data": OTHER}, 0),
    ({"data": OTHER, "eval_data": ""}, 0),
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
# ----- damage


def cut(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def garble(path):
    """As long as before, and nothing of it can be read."""
    path.write_bytes(b"?" * path.stat().st_size)


def remove(path):
    path.unlink()


def forget(*keys):
    """Take keys out of a JSON object, in a file of the length that it had."""
    def of(path):
        length = path.stat().st_size
        value = json.loads(path.read_text())
        for key in keys:
            value.pop(key)
        path.write_text(json.dumps(value).ljust(length)[:length])
    return of


def append(line):
    return lambda path: path.write_text(path.read_text() + line)


STEP = "step_000002/"
DAMAGES = {
    **{f"{name} {how.__name__}": (STEP + name, how)
       for name in ("model.safetensors", "config.json", "tokenizer.json", "trainer/.metadata",
                    "trainer/__0_0.distcp", "meta.json")
       for how in (cut, empty, garble, remove)},
    **{f"{name} {how.__name__}": (STEP + name, how)
       for name in ("tokenizer_config.json", "processor_config.json", "chat_template.jinja",
                    "trainer/extra_rank0.pt", "generation_config.json")
       for how in (cut, remove)},
    "processor_config.json garble": (STEP + "processor_config.json", garble),
    "trainer/extra_rank0.pt garble": (STEP + "trainer/extra_rank0.pt", garble),
    "meta.json without step": (STEP + "meta.json", forget("step")),
    "config.json without a model type": (STEP + "config.json", forget("model_type", "architectures")),
    "config.json of the run cut": ("config.json", cut),
    "config.json of the run removed": ("config.json", remove),
    "config.json of the run without flags": ("config.json", forget("config")),
    "a metrics line without step": ("metrics.jsonl", append('{"loss/nll": 1}\n')),
    "a metrics line that is no JSON": ("metrics.jsonl", append("{]\n")),
    "a metrics line that is a number": ("metrics.jsonl", append("3\n")),
}
OF_THE_RUN = ("config.json", "metrics.jsonl")  # of no matter to who only wants the weights


@pytest.fixture(scope="module")
def saved(group, tiny, tmp_path_factory):
    """A run of two saved steps, and its flags to resume it with."""
    out = tmp_path_factory.mktemp("saved") / "run"
    cfg, policy, processor, optimizer, _ = trained(tiny.model, out)
    cfg = dataclasses.replace(cfg, model=tiny.model, data=str(tiny.mini / "counting_train.jsonl"),
                              eval_data="", steps=5, resume=True)
    log = sft.RunLog(cfg, 0)
    for step in (1, 2):
        log.step(step, {"loss/nll": 1.0}, shown=())
        sft.save_checkpoint(cfg, step, policy, processor, optimizer, extra={"held": torch.ones(3)})
    log.bar.close()
    return SimpleNamespace(out=out, cfg=cfg)


def resume(cfg):
    """What every trainer does first; what it prints is one line, or nothing."""
    with sft.one_line_errors():
        run = sft.open_run(cfg, CPU, need=("answer",))
        sft.RunLog(cfg, run.done).bar.close()
    return run


def named_by_transformers(path):
    return f"Unrecognized model in {path.parent}. Should have a `model_type` key in its {path.name}."


def test_a_sound_run_resumes(saved, tmp_path):
    out = shutil.copytree(saved.out, tmp_path / "run")
    run = resume(dataclasses.replace(saved.cfg, out=str(out)))
    assert run.done == 2 and torch.equal(run.extras[0]["held"], torch.ones(3))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_in_one_line(saved, tmp_path, damage):
    """Resuming, and starting another stage from the run, name the file and what else can be gone on from."""
    out = shutil.copytree(saved.out, tmp_path / "run")
    name, spoil = DAMAGES[damage]
    spoil(out / name)
    with pytest.raises(SystemExit) as end:
        resume(dataclasses.replace(saved.cfg, out=str(out)))
    line = str(end.value)
    assert "\n" not in line and (str(out / name) in line or named_by_transformers(out / name) in line), line
    if name in OF_THE_RUN:
        return
    assert "step_000001" in line, line
    if "trainer/" in name and "garble" in damage or "without step" in damage:
        return  # only a trainer would read it
    with pytest.raises(SystemExit) as end, sft.one_line_errors():
        sft.open_run(dataclasses.replace(saved.cfg, model=str(out), out=str(tmp_path / "next"),
                                         resume=False), CPU, need=("answer",))
    line = str(end.value)
    assert str(out / name) in line or named_by_transformers(out / name) in line, line
    assert "\n" not in line and "step_000001" in line, line


def test_a_run_of_an_earlier_release_is_a_start_not_resumed(saved, tmp_path):
    out = shutil.copytree(saved.out, tmp_path / "run")
    step = out / "step_000002"
    shutil.rmtree(step / "trainer")
    (step / "trainer_rank0.pt").write_bytes(b"")
    (step / "meta.json").write_text('{"step": 2, "world_size": 1}')
    with pytest.raises(SystemExit, match="of an earlier release"):
        resume(dataclasses.replace(saved.cfg, out=str(out)))
    assert data_prep.resolve_model(str(out)) == str(step)


# ----- flags, and a file that cannot be written


@pytest.mark.parametrize("flags", [{"seed": 1}, {"prompts_per_step": 3, "reward": "format=1"},
                                   {"ssr": "replay"}])
def test_a_resumed_run_is_the_same_run(saved, tmp_path, flags):
    """A flag that makes it another run is named with both values; nothing is written."""
    out = shutil.copytree(saved.out, tmp_path / "run")
    before = (out / "config.json").read_text()
    with pytest.raises(SystemExit) as end:
        resume(dataclasses.replace(saved.cfg, out=str(out), **flags))
    line = str(end.value)
    for name, new in flags.items():
        assert f"--{name} was {getattr(saved.cfg, name)!r}, is {new!r}" in line
    assert "\n" not in line and (out / "config.json").read_text() == before


def test_length_speed_and_place_of_a_resumed_run_may_change(saved, tmp_path):
    out = shutil.copytree(saved.out, tmp_path / "run")
    config = json.loads((out / "config.json").read_text())
    del config["config"]["rethink_nll"]  # a flag that is newer than the run
    (out / "config.json").write_text(json.dumps(config))
    changes = {"steps": 9, "lr": 1e-5, "save_every": 3, "token_budget": 99, "workers": 0, "keep": 1}
    assert resume(dataclasses.replace(saved.cfg, out=str(out), **changes)).done == 2


def test_a_file_that_cannot_be_written_ends_the_run_in_one_line(saved, tmp_path):
    out = shutil.copytree(saved.out, tmp_path / "run")
    log = sft.RunLog(dataclasses.replace(saved.cfg, out=str(out)), 2)
    (out / "metrics.jsonl").unlink()
    (out / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as end:
        log.step(3, {"loss/nll": 1.0}, shown=())
    assert f"{out}/metrics.jsonl cannot be written: No space left on device" in str(end.value)


# ----- another number of ranks


def test_one_two_one_ranks_equal_an_unbroken_run(work):  # noqa: F811
    """Moments are sharded anew, and what rank 0 or 1 held for replay goes to one rank."""
    command = [*GRPO, "--lr", "1e-4", "--save_every", "2", "--eval_data", "", "--ssr", "replay",
               "--model", "tiny", "--reward", "accuracy=1,format=0.5", "--group_size", "8",
               "--max_new_tokens", "24"]
    run(work, *command, "--steps", "6", "--out", "whole")
    run(work, *command, "--steps", "2", "--out", "cut")
    run(work, *command, "--steps", "4", "--out", "cut", "--resume", ranks=2)
    assert len(list(newest(work / "cut").glob("trainer/extra_rank?.pt"))) == 2
    run(work, *command, "--steps", "6", "--out", "cut", "--resume")
    for a, b in zip(metrics(work / "whole"), metrics(work / "cut"), strict=True):
        close(a, b)
    close(weights(newest(work / "whole")), weights(newest(work / "cut")))
    replayed = [row["replay/frac"] for row in metrics(work / "whole")]
    assert max(replayed[2:]) > 0, "nothing was replayed"
