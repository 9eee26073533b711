"""LoRA: adapters beside frozen weights, in every stage, for any number of ranks, as PEFT has them."""
import json
import re
import shutil
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import CPU, FAMILIES, MORE_FAMILIES, made_family
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import data_prep
import grpo
import sft
from test_shards import RESPONSES, backward_through_own_logits, made, rows_of
from test_stages import GRPO, SFT, close, environment, metrics, newest, run, weights, work  # noqa: F401

LORA = ["--lora_rank", "4", "--lora_alpha", "6"]
FLAGS = [{}, {"gradient_checkpointing": True}, {"lora_targets": ("q_proj", "(up|down)_proj")}]


def linear_layers(model):
    return {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


def adapters(policy):
    return {name: m for name, m in policy.named_modules() if isinstance(m, sft.LoRALinear)}


def scramble(policy, seed=0):
    """Adapters as after training: B is no longer 0."""
    stream = torch.Generator().manual_seed(seed)
    state = {}
    for name, p in policy.named_parameters():
        if sft.is_adapter(name):
            noise = 0.1 * torch.randn(p.shape, generator=stream)
            shard = p.detach()
            if hasattr(shard, "to_local"):
                noise = torch.distributed.tensor.distribute_tensor(noise, p.device_mesh,
                                                                   p.placements).to_local()
                shard = shard.to_local()
            shard.copy_(noise)
            state[name] = noise
    return state


# ----- gradients, against autograd on the merged weight


def merged_gradients(path, policy):
    """{adapter's parameter: gradient} by the chain rule from a plain model that has the merged weights."""
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    plain = dict(model.named_parameters())
    processor = sft.AutoProcessor.from_pretrained(path)
    a_and_b, scale = {}, None
    with torch.no_grad():
        for name, layer in adapters(policy).items():
            a, b = sft.whole(layer.lora_A, CPU), sft.whole(layer.lora_B, CPU)
            a_and_b[name], scale = (a, b), layer.scale
            plain[f"{name}.weight"] += scale * b @ a
    backward_through_own_logits(model, processor)
    found = {}
    for name, (a, b) in a_and_b.items():
        grad = plain[f"{name}.weight"].grad
        found[f"{name}.lora_A"] = scale * b.T @ grad
        found[f"{name}.lora_B"] = scale * grad @ a.T
    return found


def own_gradients(policy, processor):
    rank, world = dist.get_rank(), dist.get_world_size()
    rows, dummy = rows_of(processor)[rank::world], sft.blank_prompt(processor, 10**6)
    for number in range(-(-len(RESPONSES) // world)):
        inputs, mask = sft.collate(rows[number:number + 1], dummy, 0, CPU)
        loss = policy.token_logprobs(inputs, mask).sum() * world / sum(map(len, RESPONSES))
        loss.backward()
    return {n: p.grad.full_tensor() for n, p in policy.named_parameters() if p.grad is not None}


def compare(path, flags):
    cfg = sft.Config(lora_rank=4, lora_alpha=6, **flags)
    policy, processor = sft.load_policy(path, cfg, CPU)
    scramble(policy)
    expected = merged_gradients(path, policy)
    found = own_gradients(policy, processor)
    assert found.keys() == expected.keys() and len(found) >= 8
    for name in expected:
        assert expected[name].abs().max() > 0
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("flags", FLAGS, ids=["", "checkpointing", "targets"])
def test_gradients_are_those_of_the_merged_weight(group, family, flags):
    compare(family.path, flags)


def on_each_rank(path):
    """What the ranks of the next test do."""
    sft.init_distributed()
    for shard_ranks in (0, 1):
        for flags in FLAGS:
            compare(path, {**flags, "shard_ranks": shard_ranks})
    dist.destroy_process_group()


def test_gradients_of_two_ranks(tmp_path):
    """One copy of the weights, and two."""
    made("qwen2-vl", tmp_path / "model")
    run(tmp_path, __file__, tmp_path / "model", ranks=2)


# ----- what is adapted


@pytest.mark.parametrize("name", [*FAMILIES, *MORE_FAMILIES])
def test_all_linear_layers_of_the_language_model(group, tmp_path, name):
    made_ = made_family(name, str(tmp_path))
    policy, _ = sft.load_policy(str(tmp_path), sft.Config(lora_rank=2), CPU)
    text = {name for name in linear_layers(made_.plain) if ".layers." in name and not sft.VISION.search(name)}
    assert adapters(policy).keys() == text and len(text) == 14
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.lora_{part}" for name in text for part in "AB"}
    assert dict(sft.full_weights(policy)).keys() == dict(made_.plain.named_parameters()).keys()


def test_targets(group, tiny):
    def adapted(*targets):
        return adapters(sft.load_policy(tiny.model, sft.Config(lora_rank=2, lora_targets=targets), CPU)[0])

    both = adapted("q_proj", "v_proj")
    assert {name.rpartition(".")[2] for name in both} == {"q_proj", "v_proj"}
    assert adapted("(q|v)_proj").keys() == both.keys()
    assert {name.partition("layers.")[2] for name in adapted(r"layers\.0\..*_proj")} >= {"0.mlp.down_proj"}
    of_vision = adapted("attn.qkv")
    assert of_vision and all(".visual." in name for name in of_vision)
    assert not any(".visual." in name for name in adapted("mlp.down_proj"))
    assert all(".visual." in name for name in adapted(r"visual\..*down_proj"))


@pytest.mark.parametrize("target, message", [
    ("qproj", "--lora_targets qproj: no linear layer's name ends so; the language model has q_proj, "),
    ("lm_head", "--lora_targets lm_head: .*, and its output head takes no adapter"),
    ("embed_tokens", "--lora_targets embed_tokens: no linear layer"),
    ("(q_proj", r"--lora_targets \(q_proj: no regular expression")])
def test_a_target_that_is_not_there_is_refused(group, tiny, target, message):
    with pytest.raises(ValueError, match=message):
        sft.load_policy(tiny.model, sft.Config(lora_rank=2, lora_targets=("v_proj", target)), CPU)


@pytest.mark.parametrize("flags, message", [
    ({"lora_alpha": 3.0}, "--lora_alpha and --lora_targets are for LoRA"),
    ({"lora_targets": ("q_proj",)}, "--lora_alpha and --lora_targets are for LoRA"),
    ({"lora_rank": -1}, "--lora_rank -1: must not be negative")])
def test_flags_that_say_nothing_are_refused(group, tiny, tmp_path, flags, message):
    cfg = sft.Config(model=tiny.model, data=str(tiny.mini / "counting_train.jsonl"),
                     out=str(tmp_path / "x"), **flags)
    with pytest.raises(ValueError, match=message):
        sft.open_run(cfg, CPU, need=("response",))


def test_alpha_defaults_to_twice_the_rank(group, tiny):
    for alpha, scale in ((0.0, 2.0), (4.0, 0.5)):
        policy, _ = sft.load_policy(tiny.model, sft.Config(lora_rank=8, lora_alpha=alpha), CPU)
        assert {layer.scale for layer in adapters(policy).values()} == {scale}


# ----- the start model


def logprobs(policy, processor):
    inputs, mask = sft.collate(rows_of(processor)[:2], sft.blank_prompt(processor, 10**6), 0, CPU)
    with torch.no_grad():
        return policy.token_logprobs(inputs, mask)


def test_it_begins_as_the_start_model_and_is_that_without_adapters(family):
    policy, processor = sft.load_policy(family.path, sft.Config(lora_rank=4), CPU)
    start = logprobs(family.policy, processor)
    assert torch.equal(logprobs(policy, processor), start)
    plain = dict(family.plain.named_parameters())
    assert all(torch.equal(weight, plain[name]) for name, weight in sft.full_weights(policy))
    scramble(policy)
    changed = logprobs(policy, processor)
    assert (changed - start).abs().max() > 1e-2
    with sft.adapters_off(policy):
        assert torch.equal(logprobs(policy, processor), start)
    assert torch.equal(logprobs(policy, processor), changed)


def test_merged_weights_are_given_as_trained_ones(family):
    """frozen=False has them too: they changed. And a plain model that gets them is the policy."""
    policy, processor = sft.load_policy(family.path, sft.Config(lora_rank=4), CPU)
    scramble(policy)
    given = dict(sft.full_weights(policy, frozen=False))
    assert given.keys() == {f"{name}.weight" for name in adapters(policy)}
    plain, _ = sft.load_policy(family.path, sft.Config(), CPU)
    target = dict(plain.named_parameters())
    for name, weight in given.items():
        target[name].data.copy_(torch.distributed.tensor.distribute_tensor(
            weight, target[name].device_mesh, target[name].placements))
    torch.testing.assert_close(logprobs(plain, processor), logprobs(policy, processor), atol=1e-5, rtol=1e-5)


def test_precision_of_a_gpu(group, tiny, monkeypatch):
    """Frozen weights in bf16, adapters and their gradients in fp32; FSDP takes both in a group."""
    monkeypatch.setattr(sft, "compute_dtype", lambda device: torch.bfloat16)
    policy, processor = sft.load_policy(tiny.model, sft.Config(lora_rank=4), CPU)
    for name, p in policy.named_parameters():
        assert p.dtype == (torch.float32 if sft.is_adapter(name) else torch.bfloat16), name
    record = tiny.records[0]
    prompt = sft.encode_prompt(record, processor, 10**6, dtype=torch.bfloat16)
    inputs, mask = sft.collate([(prompt, [3, 4, 5])], None, 0, CPU)
    policy.token_logprobs(inputs, mask).sum().backward()
    grads = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert grads.keys() == {f"{name}.lora_{part}" for name in adapters(policy) for part in "AB"}
    assert {g.dtype for g in grads.values()} == {torch.float32}
    scramble(policy)
    start = dict(AutoModelForImageTextToText.from_pretrained(
        tiny.model, dtype=torch.bfloat16).named_parameters())
    for name, weight in sft.full_weights(policy, torch.bfloat16, frozen=False):
        layer = policy.get_submodule(name.removesuffix(".weight"))
        a, b = layer.lora_A.full_tensor(), layer.lora_B.full_tensor()
        assert torch.equal(weight, (start[name].float() + 2 * (b @ a)).bfloat16())


# ----- the self-check


def test_a_merge_that_is_left_out_is_found(tiny, tmp_path, work, monkeypatch):  # noqa: F811
    """Adapters begin as 0: the self-check moves them far enough for a lost one to show."""
    command = [*GRPO[1:], *LORA, "--steps", "1", "--eval_data", "", "--workers", "0", "--out", "out"]
    monkeypatch.chdir(work)
    monkeypatch.setattr(grpo, "init_distributed", lambda minutes: (0, 1, CPU))
    cfg = data_prep.parse_config(grpo.Config, command)
    if not dist.is_initialized():
        sft.init_distributed()
    monkeypatch.setattr(grpo, "end_on_signals", lambda: None)
    monkeypatch.setattr(grpo, "catch_signals", lambda: [])
    monkeypatch.setattr(sft, "merged", lambda layer, device: sft.whole(layer.weight, device))
    with pytest.raises(SystemExit, match="sampler and trainer differ once the weights have changed"):
        grpo.main(cfg)


# ----- stages


COMMANDS = {"sft": [*SFT, *LORA, "--lr", "1e-2", "--schedule", "constant", "--eval_data", ""],
            "grpo": [*GRPO, *LORA, "--lr", "3e-2", "--kl_beta", "0.1", "--updates", "2"],
            "rise": ["rise.py", "--model", "tiny", "--data", "data/mood_train.jsonl", "--eval_data", "",
                     *LORA, "--prompts_per_step", "4", "--group_size", "2", "--max_new_tokens", "12",
                     "--kl_beta", "0.1", "--graded", "both", "--lr", "3e-2", "--warmup", "1",
                     "--token_budget", "512"]}


@pytest.mark.parametrize("stage", COMMANDS)
def test_a_run_resumes_bitwise_and_leaves_the_base_alone(work, stage):  # noqa: F811
    command = [*COMMANDS[stage], "--steps", "4", "--save_every", "2", "--keep", "2"]
    run(work, *command, "--out", "one")
    run(work, *command, "--steps", "2", "--out", "cut")
    run(work, *command, "--out", "cut", "--resume")
    assert metrics(work / "one") == metrics(work / "cut")
    a, b, start = weights(newest(work / "one")), weights(newest(work / "cut")), weights(work / "tiny")
    assert a.keys() == b.keys() == start.keys()
    changed = {name for name in a if not torch.equal(a[name], start[name])}
    # an untrained model's rationales are worth 0 each
    assert changed or stage == "rise", "nothing was learnt"
    assert all(re.match(r"model\.layers\..*_proj\.weight", name) for name in changed)
    for name in a:
        assert torch.equal(a[name], b[name]), name
    first, second = (load_file(newest(work / out) / "adapter/adapter_model.safetensors")
                     for out in ("one", "cut"))
    assert all(torch.equal(first[name], second[name]) for name in first) and len(first) == 28


def test_the_kl_of_the_first_step_is_zero(work):  # noqa: F811
    command = [*GRPO, *LORA, "--lr", "3e-2", "--kl_beta", "0.1", "--steps", "3", "--eval_data", ""]
    run(work, *command, "--out", "out")
    kl = [row["loss/kl"] for row in metrics(work / "out")]
    assert kl[0] == 0 and kl[2] > 0


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_two_ranks_are_one(work, stage):  # noqa: F811
    """And the one goes on from the checkpoint of the two."""
    command = [*COMMANDS[stage], "--lr", "1e-3", "--steps", "2", "--save_every", "1", "--keep", "9",
               "--eval_data", ""]
    run(work, *command, "--out", "one")
    run(work, *command, "--steps", "1", "--out", "two", ranks=2)
    run(work, *command, "--out", "two", "--resume")
    close(weights(newest(work / "one")), weights(newest(work / "two")), 1e-5)
    for a, b in zip(metrics(work / "one"), metrics(work / "two"), strict=True):
        close(a, b, 1e-5)


def test_older_steps_keep_their_adapter_only(work):  # noqa: F811
    command = [*COMMANDS["sft"], "--steps", "3", "--save_every", "1", "--keep", "2", "--out", "out"]
    run(work, *command)
    older, last = sorted((work / "out").glob("step_??????"))
    assert (last / "model.safetensors").exists() and not (older / "model.safetensors").exists()
    assert (older / "adapter/adapter_model.safetensors").exists() and data_prep.step_fault(older) == ""
    assert data_prep.resolve_model(str(work / "out")) == str(last)
    with pytest.raises(ValueError, match="step_000002 is no model any more: .* load .*/adapter with peft"):
        data_prep.resolve_model(str(older))
    said = run(work, "eval.py", "--bench", "data/counting_id.jsonl", "--model", "out/step_000002", code=1)
    assert "step_000002 is no model any more" in said and "Traceback" not in said
    run(work, "eval.py", "--bench", "data/counting_id.jsonl", "--model", "out", "--max_new_tokens", "4")
    # What is lost of the newest step is made again from the older one.
    expected = weights(last)
    shutil.rmtree(last)
    with pytest.raises(ValueError, match="step_000002 is no model any more"):
        data_prep.resolve_model(str(work / "out"))
    run(work, *command, "--resume")
    assert all(torch.equal(weights(last)[name], expected[name]) for name in expected)


def test_a_damaged_adapter_is_named(work):  # noqa: F811
    command = [*COMMANDS["sft"], "--steps", "1", "--out", "out"]
    run(work, *command)
    path = newest(work / "out") / "adapter/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    said = run(work, *command, "--steps", "2", "--resume", code=1)
    assert "adapter/adapter_model.safetensors has" in said and "Traceback" not in said


def test_a_run_goes_on_beside_the_weights_it_began_with(work):  # noqa: F811
    """--model was a run, which has a newer step by now."""
    run(work, *SFT, "--steps", "1", "--eval_data", "", "--keep", "2", "--out", "base")
    command = [*COMMANDS["sft"], "--model", "base", "--steps", "2", "--save_every", "1"]
    run(work, *command, "--out", "one")
    run(work, *command, "--steps", "1", "--out", "cut")
    run(work, *SFT, "--steps", "2", "--eval_data", "", "--keep", "2", "--out", "base", "--resume")
    run(work, *command, "--out", "cut", "--resume")
    a, b = weights(newest(work / "one")), weights(newest(work / "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)


# ----- PEFT


def test_peft_loads_it(work, monkeypatch):  # noqa: F811
    peft = pytest.importorskip("peft")
    command = [*COMMANDS["sft"], "--steps", "3", "--out", "out",
               "--lora_targets", "q_proj", "(gate|down)_proj"]
    run(work, *command)
    step = newest(work / "out")
    monkeypatch.chdir(work)
    config = json.loads((step / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny" and (config["r"], config["lora_alpha"]) == (4, 6)

    def logits(model):
        inputs = sft.encode_prompt(data_prep.read_records("data/counting_id.jsonl")[0], processor, 10**6)
        del inputs["request"]
        with torch.no_grad():
            return model(**inputs).logits

    processor = sft.AutoProcessor.from_pretrained(step)
    base = AutoModelForImageTextToText.from_pretrained("tiny", dtype=torch.float32).eval()
    start = logits(base)
    adapted = logits(peft.PeftModel.from_pretrained(base, step / "adapter").eval())
    whole = AutoModelForImageTextToText.from_pretrained(step, dtype=torch.float32).eval()
    assert not any("lora" in name for name, _ in whole.named_parameters())
    assert (adapted - start).abs().max() > 1e-2
    torch.testing.assert_close(adapted, logits(whole), atol=1e-5, rtol=1e-5)


if __name__ == "__main__":
    on_each_rank(sys.argv[1])


@pytest.mark.parametrize("flags", [{"lora_rank": -1}, {"lora_rank": 4, "lora_targets": ("nowhere",)}])
def test_a_wrong_flag_does_not_blame_the_checkpoint(tiny, tmp_path, group, flags):
    step = shutil.copytree(tiny.model, tmp_path / "run/step_000004")
    cfg = sft.Config(model=str(step), data=str(tiny.mini / "counting_train.jsonl"), eval_data="",
                     out=str(tmp_path / "out"), **flags)
    with pytest.raises(ValueError, match="^--lora_") as error:
        sft.open_run(cfg, CPU, need=("response",))
    assert "checkpoint" not in str(error.value)
