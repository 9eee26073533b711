"""On a GPU: bf16 against bf16, vLLM asleep and awake, weights of a 3B handed over, and grpo.py itself.

Skipped without CUDA; the vLLM ones also without vLLM. `pytest -rP tests/test_gpu.py` shows what was measured.
"""
import importlib.util
import math
import shutil
import subprocess
import sys
import time

import pytest
import torch

import data_prep
import sft
import eval as evaluation
import grpo
from bench_rollout import save_shape
from test_stages import GRPO, SFT, environment, launch as run, metrics, newest, weights, work  # noqa: F401

CUDA = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not CUDA, reason="needs CUDA")
with_vllm = pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="needs vLLM")
both_engines = pytest.mark.parametrize("name", ["hf", pytest.param("vllm", marks=with_vllm)])
# The trainer's fp32 master weights (15 GiB), the engine's half of the device, activations.
large = pytest.mark.skipif(CUDA and torch.cuda.get_device_properties(0).total_memory < 48 * 2**30,
                           reason="needs a GPU of 48 GiB")

# Between sampler and trainer, nats per token: (mean, max). Both compute in bf16, 8 significant bits, with
# other kernels: a logit in [2, 4) is off by up to 2^-7 = 0.008 on either side where it is written, and each
# layer has added its rounding to the hidden state behind it. In bf16 on CPU (transformers, vLLM 0.32) mean
# and max were 0.009 and 0.05 for the tiny random model, 0.003 and 0.14 after SFT, whose logits are larger,
# and 0.018 and 0.09 for 36 layers of half the 3B's width. The bounds allow about three times that, more for
# the 3B, whose logits are 1.4x as wide. A policy that moved and was not synced is off by far more.
SMALL = (0.03, 0.4)
LARGE = (0.06, 0.5)


def alone(function, *args):
    """Call a function of this file in a process of its own, since a process holds one engine at most."""
    done = subprocess.run([sys.executable, __file__, function.__name__, *map(str, args)], text=True,
                          env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1800)
    assert done.returncode == 0, done.stdout[-4000:]
    print(*(line for line in done.stdout.splitlines() if line.startswith("measured: ")), sep="\n")


def setup(name, path, data, **options):
    """A policy, its engine and 16 prompts of the mini suite, 4 rows each, as grpo.py makes them."""
    _, _, device = sft.init_distributed()
    cfg = grpo.Config(engine=name, **options)
    policy, processor = sft.load_policy(path, cfg, device)
    engine = evaluation.build_engine(path, processor, cfg, device)
    grpo.sync_weights(policy, engine)
    records = data_prep.read_records(data, limit=16)
    prompts = [sft.encode_prompt(record, processor, cfg.max_pixels) for record in records]
    return policy, engine, [prompt for prompt in prompts for _ in range(4)], cfg


def mismatch(policy, engine, prompts, cfg):
    """Sample every prompt; returns mean and max of |trainer - sampler| over the response tokens, nats."""
    samples = evaluation.generate(engine, prompts, range(len(prompts)), cfg)
    assert len({tuple(ids) for ids, _, _ in samples}) > len(samples) / 2
    rows = [(prompt, ids) for prompt, (ids, _, _) in zip(prompts, samples)]
    inputs, mask = sft.collate(rows, None, 0, policy.banned.device)
    with torch.no_grad():
        logps = policy.token_logprobs(inputs, mask, cfg.temperature)[mask].cpu()
    gap = (logps - torch.cat([logps for _, logps, _ in samples])).abs()
    return gap.mean().item(), gap.max().item()


def within(found, bounds, what):
    """Report a mismatch and hold it against its bounds. A mean of exactly 0 would be no comparison at all."""
    print(f"measured: {what}: mismatch mean {found[0]:.4f}, max {found[1]:.3f}")
    assert 0 < found[0] < bounds[0] and found[1] < bounds[1]


def shift(policy):
    """Move every weight by a third of its tensor's standard deviation, far beyond bf16 noise."""
    policy.reshard()
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(torch.randn_like(p) * p.std() / 3)


# ----- bf16


def check_mismatch(name, path, data):
    policy, engine, prompts, cfg = setup(name, path, data)
    within(mismatch(policy, engine, prompts, cfg), SMALL, f"tiny, {name}")
    shift(policy)
    assert mismatch(policy, engine, prompts, cfg)[0] > 2 * SMALL[0]
    grpo.sleep_engine(engine)
    grpo.sync_weights(policy, engine)
    within(mismatch(policy, engine, prompts, cfg), SMALL, f"tiny, {name}, other weights")


@both_engines
def test_bf16_sampler_agrees_with_bf16_trainer(name, tiny):
    alone(check_mismatch, name, tiny.model, tiny.mini / "counting_train.jsonl")


# ----- at the size of a 3B


@pytest.fixture(scope="module")
def model_3b(tiny, tmp_path_factory):
    """Random weights in the shape of Qwen2.5-VL-3B; 7 GiB on disk while these tests run."""
    folder = tmp_path_factory.mktemp("3b")
    alone(save_shape, "3b", tiny.model, folder)  # in another process: this one would keep the GPU's memory
    yield folder
    shutil.rmtree(folder)


def device_bytes():
    """Bytes in use on the device by anyone, without what this process's allocator only keeps."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def worker_bytes(worker):
    """(weights, KV cache) of vLLM's worker, bytes."""
    stores = [cache.untyped_storage() for cache in worker.model_runner.kv_caches]
    caches = {store.data_ptr(): store.nbytes() for store in stores}  # layers may share one
    return sum(p.nbytes for p in worker.get_model().parameters()), sum(caches.values())


def check_sleep(path, data):
    """Asleep, the engine's weights and cache are off the device; a sync brings back frozen weights too."""
    policy, engine, prompts, cfg = setup("vllm", path, data, freeze_vision=True)
    within(mismatch(policy, engine, prompts, cfg), LARGE, "3B, before sleep")
    (model, cache), = engine.llm.collective_rpc(worker_bytes)
    awake = device_bytes()
    for turn in range(2):
        grpo.sleep_engine(engine)
        asleep = device_bytes()
        print(f"measured: weights {model / 2**30:.2f} GiB, cache {cache / 2**30:.2f} GiB, "
              f"freed {(awake - asleep) / 2**30:.2f} GiB, {asleep / 2**30:.2f} GiB remain")
        assert awake - asleep >= model + cache
        grpo.sync_weights(policy, engine)
        assert not engine.asleep
        # Sleeping again and again must not leak. What differs is scratch memory of kernels.
        assert abs(device_bytes() - awake) < 2**30
        within(mismatch(policy, engine, prompts, cfg), LARGE, f"3B, awake again ({turn + 1})")


@large
@with_vllm
def test_sleep_frees_weights_and_cache_and_sync_restores_them(tiny, model_3b):
    alone(check_sleep, model_3b, tiny.mini / "counting_train.jsonl")


def check_sync(path, data):
    """Weights that moved reach the engine, whether it slept or not. Prints seconds, asserts none."""
    policy, engine, prompts, cfg = setup("vllm", path, data)
    for sleeping in (False, True, False, True):
        shift(policy)
        assert mismatch(policy, engine, prompts, cfg)[0] > 2 * LARGE[0]
        if sleeping:
            grpo.sleep_engine(engine)
        began = time.time()
        grpo.sync_weights(policy, engine)
        if CUDA:
            torch.cuda.synchronize()
        count = sum(p.numel() for p in policy.parameters())
        print(f"measured: sync of {count / 1e9:.2f}B weights {'and waking' if sleeping else 'while awake'}: "
              f"{time.time() - began:.2f} s")
        within(mismatch(policy, engine, prompts, cfg), LARGE, "3B, synced")


@large
@with_vllm
def test_sync_hands_over_a_3b(tiny, model_3b):
    alone(check_sync, model_3b, tiny.mini / "counting_train.jsonl")


# ----- grpo.py


@both_engines
def test_grpo_steps_on_the_mini_suite(work, name):  # noqa: F811
    """From a short SFT, so that rewards differ in a group; the second step samples from synced weights."""
    run(work, *SFT, "--steps", "100", "--lr", "3e-3", "--out", "taught")
    run(work, *GRPO, "--model", "taught", "--engine", name, "--steps", "2", "--prompts_per_step", "12",
        "--group_size", "8", "--max_new_tokens", "72", "--lr", "1e-3", "--warmup", "0", "--out", "out")
    rows = [row for row in metrics(work / "out") if row["step"]]
    assert len(rows) == 2 and "eval/accuracy" in rows[-1]
    for row in rows:
        assert row["tokens/gen"] > 0 and row["groups/effective_frac"] > 0
        assert 0 < row["optim/grad_norm"] < math.inf
        found = row["mismatch/mean"], row["mismatch/max"]
        within(found, SMALL, f"grpo.py --engine {name}, step {row['step']}")
    a, b = weights(newest(work / "out")), weights(newest(work / "taught"))
    assert all((a[k] != b[k]).any() for k in a if k.endswith("proj.weight"))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
