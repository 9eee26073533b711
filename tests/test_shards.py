"""FSDP over ranks, copies and groups: whatever is sharded how, gradients and checkpoints are those
of one process.
"""
import json
import re
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import CPU, FAMILIES, RECORDS, shake, wait_until
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageTextToText
from transformers.core_model_loading import Chunk, WeightConverter, revert_weight_conversion

import sft
from test_stages import SFT, close, environment, metrics, newest, run, weights, work  # noqa: F401

RESPONSES = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]
NAMES = ["text", "image", "wide image", "long text"]
FLAGS = [{}, {"freeze_vision": True, "gradient_checkpointing": True}]
MESHES = {4: (0, 2, 1), 2: (0, 1), 1: (0,)}  # --shard_ranks on so many ranks


def made(name, folder):
    """A saved model of a family."""
    torch.manual_seed(0)
    model, processor = FAMILIES[name]()
    shake(model, seed=1).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def rows_of(processor):
    prompts = [sft.encode_prompt(RECORDS[name], processor, 10**6) for name in NAMES]
    return list(zip(prompts, RESPONSES))


def backward_through_own_logits(model, processor):
    """Backward of the mean log-probability of the responses,
    from the logits that the model itself returns.
    """
    banned = sft.vision_ids(model.config, CPU)
    for row in rows_of(processor):
        inputs, mask = sft.collate([row], None, 0, CPU)
        logits = model(**inputs).logits[:, :-1].index_fill(2, banned, -torch.inf)
        logps = logits.log_softmax(2).gather(2, inputs["input_ids"][:, 1:, None])[..., 0]
        (logps[mask].sum() / sum(map(len, RESPONSES))).backward()


def plain_gradients(path):
    """{name: gradient} of the mean log-probability from the logits that the model itself returns,
    unsharded.
    """
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    processor = sft.AutoProcessor.from_pretrained(path)
    backward_through_own_logits(model, processor)
    return {name: p.grad for name, p in model.named_parameters()}


def sharded_gradients(path, cfg):
    """The same of the policy, each rank with its rows; and the norm that clipping finds."""
    rank, world = dist.get_rank(), dist.get_world_size()
    policy, processor = sft.load_policy(path, cfg, CPU)
    untied = not policy.config.tie_word_embeddings
    ends = policy.get_input_embeddings(), policy.get_output_embeddings()
    layers = [m for m in policy.modules() if isinstance(m, sft.GradientCheckpointingLayer)]

    def in_parts(*_):
        assert not untied or all(isinstance(module.weight, DTensor) for module in ends), (
            "whole beside the layers")

    for layer in layers:
        layer.register_forward_pre_hook(in_parts)
        layer.register_full_backward_hook(in_parts)
    if untied:
        assert all(isinstance(module, FSDPModule) for module in ends)
    rows, dummy = rows_of(processor)[rank::world], sft.blank_prompt(processor, 10**6)
    tokens = sum(map(len, RESPONSES))
    for number in range(-(-len(RESPONSES) // world)):
        inputs, mask = sft.collate(rows[number:number + 1], dummy, 0, CPU)
        (policy.token_logprobs(inputs, mask).sum() * world / tokens).backward()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1e9).full_tensor()
    return {n: p.grad.full_tensor() for n, p in policy.named_parameters() if p.grad is not None}, norm


def compare(path, expected, cfg):
    found, norm = sharded_gradients(path, cfg)
    of_vision = re.compile(r"visual|vision_")
    trained = {name for name in expected if not (cfg.freeze_vision and of_vision.search(name))}
    assert found.keys() == trained and any(n.endswith("embed_tokens.weight") for n in trained)
    for name in trained:
        close_to = torch.testing.assert_close
        close_to(found[name], expected[name], atol=1e-6, rtol=1e-5,
                 msg=lambda text, name=name: f"{name} {text}")
    squares = sum(expected[name].double().square().sum() for name in trained)
    torch.testing.assert_close(norm.double(), squares.sqrt(), atol=0, rtol=1e-5)


def on_each_rank(folder, *names):
    """What the ranks of the tests below do."""
    sft.init_distributed()
    for name in names:
        path = str(Path(folder) / name)
        expected = plain_gradients(path)
        for shard_ranks in MESHES[dist.get_world_size()]:
            for flags in FLAGS:
                compare(path, expected, sft.Config(shard_ranks=shard_ranks, **flags))
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_gradients_equal_those_of_one_process(tmp_path, world):
    """Tied (Qwen2.5-VL) and untied (Qwen2-VL) embeddings; frozen vision, checkpointing;
    one copy or several.
    """
    names = ["qwen2.5-vl", "qwen2-vl"]
    for name in names:
        made(name, tmp_path / name)
    run(tmp_path, __file__, tmp_path, *names, ranks=world)


@pytest.mark.parametrize("flags", FLAGS, ids=["", "frozen, checkpointing"])
def test_gradients_of_one_rank(group, family, flags):
    compare(family.path, plain_gradients(family.path), sft.Config(**flags))


# ----- stages


def test_copies_of_shards_train_and_resume_as_one_rank(work):  # noqa: F811
    """Four ranks, two copies of two shards; then two ranks, one copy, go on from their checkpoint."""
    command = [*SFT, "--steps", "4", "--save_every", "2", "--eval_data", "", "--keep", "9",
               "--schedule", "constant", "--lr", "1e-4"]
    run(work, *command, "--out", "one")
    run(work, *command, "--steps", "2", "--shard_ranks", "2", "--out", "cut", ranks=4)
    saved = json.loads((work / "cut/step_000002/meta.json").read_text())
    assert saved["world_size"] == 4 and "trainer/__3_0.distcp" in saved["files"]
    close(weights(work / "one/step_000002"), weights(work / "cut/step_000002"), 1e-5)
    run(work, *command, "--out", "cut", "--resume", ranks=2)
    for a, b in zip(metrics(work / "one"), metrics(work / "cut"), strict=True):
        close(a, b, 1e-5)
    close(weights(newest(work / "one")), weights(newest(work / "cut")), 1e-5)


@pytest.mark.parametrize("shard_ranks", [2, -1])
def test_shards_that_do_not_divide_the_ranks_are_refused(group, tiny, shard_ranks):
    with pytest.raises(ValueError, match=f"^--shard_ranks {shard_ranks} does not divide the 1 rank"):
        sft.open_run(sft.Config(model=tiny.model, shard_ranks=shard_ranks), CPU, need=("response",))


# ----- gathering


def test_a_shard_in_host_memory_is_gathered_on_the_device(group, tiny, monkeypatch):
    """With --cpu_offload. `meta` stands in for the GPU: what arrives there left host memory first."""
    policy, _ = sft.load_policy(tiny.model, sft.Config(), CPU)
    policy.banned = policy.banned.to("meta")
    travelled = []

    def gathered(shard):
        travelled.append(shard.to_local().device.type)
        return shard.to_local()

    monkeypatch.setattr(DTensor, "full_tensor", gathered)
    whole = dict(sft.full_weights(policy, torch.bfloat16))
    assert set(travelled) == {"meta"} and len(travelled) == len(whole)
    assert {weight.dtype for weight in whole.values()} == {torch.bfloat16}


# ----- checkpoints


def saved(policy, processor, out, extra=None, **flags):
    """A checkpoint of step 1 under `out`, with an optimizer that has made an update."""
    cfg = sft.Config(out=str(out))
    out.mkdir(exist_ok=True)
    optimizer = sft.make_optimizer(policy, cfg)
    for p in policy.parameters():
        p.grad = torch.full_like(p, 0.1) if p.requires_grad else None
    optimizer.step()
    optimizer.zero_grad()
    sft.save_checkpoint(cfg, 1, policy, processor, optimizer, extra, **flags)
    return optimizer, out / "step_000001"


def tensors(folder):
    """{name: tensor} of a checkpoint in one file or several."""
    held = {}
    for file in folder.glob("*.safetensors"):
        held |= load_file(file)
    return held


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("limit", [10**9, 100_000])
def test_a_checkpoint_is_what_save_pretrained_writes(family, tmp_path, monkeypatch, limit):
    """In one file or several, with a buffer; the files that it counts on are those that are there."""
    monkeypatch.setattr(sft, "SHARD_BYTES", limit)
    policy, processor = sft.load_policy(family.path, sft.Config(), CPU)
    policy.model.register_buffer("running_mean", torch.arange(3.0))
    _, folder = saved(policy, processor, tmp_path / "run")
    whole = {name: p.detach().full_tensor() for name, p in policy.named_parameters()}
    whole["model.running_mean"] = policy.model.running_mean
    policy.save_pretrained(tmp_path / "usual", state_dict=whole, max_shard_size=limit)
    usual = {path.name for path in (tmp_path / "usual").iterdir()}
    assert usual <= {path.name for path in folder.iterdir()}
    assert ("model.safetensors" in usual) == (limit == 10**9)
    for name in sorted(usual):
        ours, theirs = folder / name, tmp_path / "usual" / name
        if name.endswith("index.json"):
            ours, theirs = (json.loads(path.read_text()) for path in (ours, theirs))
            assert ours["weight_map"] == theirs["weight_map"] and len(set(ours["weight_map"].values())) > 2
            assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
        elif name.endswith(".json"):
            assert json.loads(ours.read_text()) == json.loads(theirs.read_text()), name
        else:
            same(load_file(ours), load_file(theirs))
    again = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    assert all(torch.equal(p, whole[name]) for name, p in again.named_parameters())


def test_weights_that_a_checkpoint_holds_as_one_are_merged(group, tiny):
    """As Molmo 2's queries, keys and values: converted one by one each would be taken for all three."""
    model = AutoModelForImageTextToText.from_pretrained(tiny.model)
    parts = [f"self_attn.{kind}_proj" for kind in "qkv"]
    model._weight_conversions = [WeightConverter("self_attn.qkv", parts, [Chunk(dim=0)])]
    weights = {name: p.detach() for name, p in model.named_parameters()}
    streamed = dict(sft.checkpoint_names(model, weights.items()))
    same(streamed, revert_weight_conversion(model, weights))
    assert any("self_attn.qkv" in name for name in streamed) and not any(
        "q_proj" in name for name in streamed)


@pytest.fixture
def bf16(monkeypatch):
    """The precision of a GPU on CPU: fp32 masters, bf16 compute."""
    monkeypatch.setattr(sft, "compute_dtype", lambda device: torch.bfloat16)


@pytest.mark.parametrize("wait", [True, False])
def test_users_load_bf16_and_a_resumed_run_its_masters(group, tiny, tmp_path, bf16, wait):
    policy, processor = sft.load_policy(tiny.model, sft.Config(freeze_vision=True), CPU)
    optimizer, folder = saved(policy, processor, tmp_path / "run", wait=wait)
    sft.finish_checkpoint()
    held = tensors(folder)
    assert {tensor.dtype for tensor in held.values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16
    again, _ = sft.load_policy(folder, sft.Config(freeze_vision=True), CPU)
    fresh = sft.make_optimizer(again, sft.Config())
    sft.load_checkpoint(folder, again, fresh)
    rounded = 0
    for p, q in zip(policy.parameters(), again.parameters(), strict=True):
        # what is frozen needs no master
        assert q.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)
        whole, loaded = p.detach().full_tensor(), q.detach().full_tensor()
        if p.requires_grad:
            assert torch.equal(whole, loaded)
            rounded += not torch.equal(whole, whole.bfloat16().float())
            same({k: sft.DTensor.full_tensor(v) if k != "step" else v for k, v in optimizer.state[p].items()},
                 {k: sft.DTensor.full_tensor(v) if k != "step" else v for k, v in fresh.state[q].items()})
        assert torch.equal(whole.bfloat16(), loaded.bfloat16())  # what is frozen computes alike
    assert rounded > 10, "bf16 would have done"


def test_in_fp32_masters_are_written_once(group, tiny, tmp_path):
    policy, processor = sft.load_policy(tiny.model, sft.Config(), CPU)
    _, folder = saved(policy, processor, tmp_path / "run")
    entries = dcp.FileSystemReader(folder / "trainer").read_metadata().state_dict_metadata
    assert {name.rpartition("/")[2] for name in entries} == {"exp_avg", "exp_avg_sq", "step"}


# ----- while the run goes on


@pytest.fixture
def slow_disk(monkeypatch):
    """dcp.save waits until the event that this gives is set."""
    event, usual = threading.Event(), sft.dcp.save

    def save(*args, **kwargs):
        assert event.wait(60)
        return usual(*args, **kwargs)

    monkeypatch.setattr(sft.dcp, "save", save)
    monkeypatch.setattr(sft, "STOPPING", [])
    yield event
    event.set()
    sft.WRITING.clear()


def test_a_step_does_not_wait_for_the_disk_and_does_not_change_what_is_written(
        group, tiny, tmp_path, slow_disk):
    policy, processor = sft.load_policy(tiny.model, sft.Config(), CPU)
    extra = {"entries": [1]}
    optimizer, folder = saved(policy, processor, tmp_path / "run", extra, wait=False)
    kept = [p.detach().clone() for p in policy.parameters()]
    moments = [optimizer.state[p]["exp_avg"].clone() for p in policy.parameters()]
    for p in policy.parameters():
        p.grad = torch.full_like(p, -1.0)
    optimizer.step()
    extra["entries"].append(2)
    assert not folder.exists() and folder.with_suffix(".tmp").exists()
    slow_disk.set()
    sft.finish_checkpoint()
    assert not folder.with_suffix(".tmp").exists() and sft.STOPPING == []
    again, _ = sft.load_policy(folder, sft.Config(), CPU)
    fresh = sft.make_optimizer(again, sft.Config())
    assert sft.load_checkpoint(folder, again, fresh) == (1, [{"entries": [1]}])
    for p, before, moment in zip(again.parameters(), kept, moments, strict=True):
        assert torch.equal(p, before) and torch.equal(fresh.state[p]["exp_avg"], moment)


@pytest.mark.parametrize("flags", [{}, {"cpu_offload": True}], ids=["last", "cpu_offload"])
def test_what_must_wait_waits(group, tiny, tmp_path, slow_disk, flags):
    """The last checkpoint; and with --cpu_offload there is no second copy of weights and moments."""
    slow_disk.set()
    policy, processor = sft.load_policy(tiny.model, sft.Config(), CPU)
    cfg = sft.Config(out=str(tmp_path), **flags)
    sft.save_checkpoint(cfg, 1, policy, processor, sft.make_optimizer(policy, cfg), wait=not flags)
    assert (tmp_path / "step_000001").is_dir() and not sft.WRITING


@pytest.mark.parametrize("what", ["save_file", "dcp"])
def test_a_write_that_fails_later_ends_the_run_in_one_line(
        group, tiny, tmp_path, monkeypatch, slow_disk, what):
    """The loop hears of it by STOPPING, and the next save or the end of the run says what it was."""
    policy, processor = sft.load_policy(tiny.model, sft.Config(), CPU)
    slow_disk.set()
    optimizer, folder = saved(policy, processor, tmp_path / "run")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((sft, "save_file") if what == "save_file" else (sft.dcp, "save")), full)
    cfg = sft.Config(out=str(tmp_path / "run"))
    sft.save_checkpoint(cfg, 2, policy, processor, optimizer, wait=False)
    wait_until(lambda: sft.STOPPING, seconds=10)
    with pytest.raises(SystemExit) as end, sft.one_line_errors():
        sft.save_checkpoint(cfg, 3, policy, processor, optimizer)
    line = str(end.value)
    assert "step_000002.tmp cannot be written" in line and "No space left on device" in line
    assert "earlier checkpoints are intact" in line and "\n" not in line
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step_000001"]


if __name__ == "__main__":
    on_each_rank(*sys.argv[1:])
