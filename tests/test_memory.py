"""Memory by arithmetic: the estimate is what autograd keeps, in every family;
the bench agrees with real tensors.
"""
import subprocess
import sys
from pathlib import Path
from types import MethodType, SimpleNamespace

import pytest
import torch
from conftest import CPU
from transformers.modeling_layers import GradientCheckpointingLayer

import grpo
import sft

ROOT = Path(__file__).resolve().parents[1]
CFG = grpo.Config()
# Norms of q and k count as of all heads each; Gemma's norms multiply in fp32, too.
ALLOWED = {"qwen3-vl": 0.16, "gemma3": 0.22}


def kept_in_blocks(model, inputs, mask):
    """Bytes that autograd keeps of what transformer blocks compute, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, inside = {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if inside and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    hooks = []
    for block in model.modules():
        if isinstance(block, GradientCheckpointingLayer):
            hooks.append(block.register_forward_pre_hook(lambda *_: inside.append(1)))
            hooks.append(block.register_forward_hook(lambda *_: inside.pop() and None))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logps = sft.token_logprobs(model, inputs, mask)
    for hook in hooks:
        hook.remove()
    assert logps.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def test_activations_are_what_autograd_keeps(family):
    model = family.plain
    model.banned, model.head = family.policy.banned, family.policy.head
    matrix = model.get_output_embeddings()
    matrix.logprobs = MethodType(sft.head_logprobs, matrix)
    prompt = family.prompts["image"]
    rows = [sft.Group(prompt, [[20] * 100] * 2)]
    if family.name == "gemma3":  # a response a row, and sliding windows
        rows = [sft.Group(prompt, [[20] * 200]), sft.Group(prompt, [[20] * 190])]
    inputs, mask = sft.collate(rows, None, 0, CPU)
    real = kept_in_blocks(model, inputs, mask)
    stored, in_block, unknown = sft.activations(family.policy, rows, CFG)
    assert not unknown
    assert stored == pytest.approx(real, rel=ALLOWED.get(family.name, 0.05))
    assert 0 < in_block < stored


# ----- the tiny model


@pytest.fixture
def policy(tiny, group):
    return loaded(tiny)


def loaded(tiny, **flags):
    return sft.load_policy(tiny.model, grpo.Config(**flags), CPU)[0]


@pytest.fixture
def rows(tiny, policy):
    _, processor = sft.load_policy(tiny.model, CFG, CPU)
    prompt = sft.encode_prompt(tiny.records[0], processor, CFG.max_pixels)
    return [sft.Group(prompt, [[20] * 30] * 2)] * 3


def test_states_are_sharded_and_copies_are_held(policy, rows):
    total = sft.numbers_of(policy)
    states, copies = "weights, gradients and moments", "model copies"
    for shards in (1, 8):
        parts, unknown = sft.memory_needed(policy, rows, CFG, shards)
        assert parts[states] == 16 * total / shards and parts[copies] == 0 and not unknown
        parts, _ = sft.memory_needed(policy, rows, CFG, shards, engine=True, reference=True)
        assert parts[copies] == 4 * total + 4 * total / shards  # fp32 on CPU


def test_flags_trade_for_memory(tiny, rows):
    """Less of each part, and of no other."""
    usual, _ = sft.memory_needed(loaded(tiny), rows, CFG, 2, reference=True)

    def less(**flags):
        parts, _ = sft.memory_needed(loaded(tiny, **flags), rows, grpo.Config(**flags), 2, reference=True)
        return {name for name in parts if parts[name] < usual[name]}

    assert less(freeze_vision=True) == {"weights, gradients and moments", "activations"}
    assert less(cpu_offload=True) == {"weights, gradients and moments", "model copies"}
    assert "activations" in less(gradient_checkpointing=True)
    assert "activations" in less(attn="eager")  # no mask in compute dtype


def test_more_tokens_and_images_need_more(policy, rows):
    one, *_ = sft.activations(policy, rows[:1], CFG)
    three, *_ = sft.activations(policy, rows, CFG)
    assert three == 3 * one
    blind = {name: value for name, value in rows[0].prompt.items() if name != "pixel_values"}
    assert sft.activations(policy, [sft.Group(blind, rows[0].responses)], CFG)[0] < one


# ----- what is not known


class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.out = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.experts = torch.nn.Parameter(torch.zeros(4, 8, 8))


def test_a_block_of_other_weights_is_not_known():
    *_, known = sft.kept_by(torch.nn.Sequential(Experts()), 2)
    assert known < 0.5
    *_, known = sft.kept_by(torch.nn.Sequential(
        torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))), 2)
    assert known == 1


def test_an_unknown_tower_is_named(policy, rows, monkeypatch):
    """One without transformer blocks, as convolutional ones are, and one whose patches cannot be counted."""
    whole, *_ = sft.activations(policy, rows, CFG)
    with monkeypatch.context() as patch:
        patch.setattr(sft, "patches_of", lambda prompt, config: None)
        stored, _, unknown = sft.activations(policy, rows, CFG)
        assert unknown == ["vision tower"] and 0 < stored < whole
        assert "what the vision tower keeps is not known and left out" in sft.describe(
            policy, rows, CFG, False, False)
    layer = type(policy.model.language_model.layers[0])
    monkeypatch.setattr(sft, "GradientCheckpointingLayer", layer)
    assert sft.activations(policy, rows, CFG)[::2] == (stored, ["vision tower"])


def test_patches_are_counted_as_the_processor_gives_them():
    config = SimpleNamespace(vision_config=SimpleNamespace(patch_size=14))
    for shape, patches in {(24, 1176): 24, (1, 24, 588): 24, (2, 3, 56, 28): 16,
                           (1, 5, 3, 28, 28): 20}.items():
        assert sft.patches_of({"pixel_values": torch.zeros(shape)}, config) == patches
    assert sft.patches_of({}, config) == 0
    assert sft.patches_of({"pixel_values": torch.zeros(1, 3, 28, 28)}, SimpleNamespace()) is None


# ----- what the simulation showed, and the simulation


@pytest.mark.parametrize("freeze", [False, True])
def test_a_frozen_tower_takes_no_gradients_under_checkpointing(tiny, rows, freeze):
    """transformers makes patch embeddings require them, and all of the frozen tower would run backward."""
    policy = loaded(tiny, gradient_checkpointing=True, freeze_vision=freeze)
    seen = []
    policy.model.visual.register_forward_hook(lambda *args: seen.append(args[-1].pooler_output.requires_grad))
    inputs, mask = sft.collate(rows, None, 0, CPU)
    policy.token_logprobs(inputs, mask).sum().backward()
    assert seen == [not freeze]


def test_the_bench_agrees_with_real_tensors():
    """The estimate within 15 % of the simulation; that within 2 % of the same tracker over real tensors."""
    done = subprocess.run([sys.executable, ROOT / "tests/bench_memory.py", "--quick"], capture_output=True,
                          text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("with real tensors x1.0") == 12 and "WRONG" not in done.stdout


def test_a_norm_without_scales_and_a_model_without_known_blocks():
    """Gemma 4 normalises without scales; what is not known is left out, and refuses no run."""
    class PlainNorm(torch.nn.Module):
        pass

    block = torch.nn.Module()
    block.norm, block.up, block.down = PlainNorm(), torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)
    hidden, kept, known = sft.kept_by(block, 2)
    assert hidden == 8 and kept > 0 and 0 < known <= 1
