"""A checkpoint keeps every weight and moment, for any number of ranks; damage to it is told in one line."""
import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

import data_prep
import sft
import grpo

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
        sft.open_run(dataclasses.replace(saved.cfg, model=str(out), out=str(tmp_path / "next"), resume=False), CPU,
                     need=("answer",))
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


@pytest.mark.parametrize("flags", [{"seed": 1}, {"prompts_per_step": 3, "reward": "format=1"}, {"ssr": "replay"}])
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
    command = [*GRPO, "--lr", "1e-4", "--save_every", "2", "--eval_data", "", "--ssr", "replay", "--model", "tiny",
               "--reward", "accuracy=1,format=0.5", "--group_size", "8", "--max_new_tokens", "24"]
    two = ["--standalone", "--nproc_per_node", "2"]
    run(work, *command, "--steps", "6", "--out", "whole")
    run(work, *command, "--steps", "2", "--out", "cut")
    run(work, *command, "--steps", "4", "--out", "cut", "--resume", torchrun=two)
    assert len(list(newest(work / "cut").glob("trainer/extra_rank?.pt"))) == 2
    run(work, *command, "--steps", "6", "--out", "cut", "--resume")
    for a, b in zip(metrics(work / "whole"), metrics(work / "cut"), strict=True):
        close(a, b)
    close(weights(newest(work / "whole")), weights(newest(work / "cut")))
    replayed = [row["replay/frac"] for row in metrics(work / "whole")]
    assert max(replayed[2:]) > 0, "nothing was replayed"
