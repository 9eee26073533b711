"""Rollout speed, tokens/s: --engine hf, --engine vllm beside the trainer, vLLM in a process of its own.

    python tests/bench_rollout.py [--prompts 64] [--group 8] [--max_new_tokens 72] [--repeats 5]
                                  [--model out/sft] [--data data/mini/counting_train.jsonl] [--shape 3b]

    hf          evaluation.generate with transformers, the policy in the same process
    vllm        evaluation.generate with vLLM, the policy in the same process
    standalone  LLM.generate with the same requests and the same engine settings, no trainer

Needed: vllm at least 0.90 of standalone. Every round starts each arm once, in a process of its own and in
turns, so that a machine that slows down does so for all; a process warms up and then samples all prompts
PASSES times. The first two arms sync the weights before each pass as training does, the third drops its
caches there: otherwise a pass would find the prompts of the last one. Images are prepared beforehand, as the
trainer's workers do it.

Uses the GPU (bf16) where there is one, else the CPU (fp32). --shape 3b puts random weights in the shape of
Qwen2.5-VL-3B in place of the model; nearly all its responses run to --max_new_tokens. vLLM's default is a
second process for the engine: VLLM_ENABLE_V1_MULTIPROCESSING=1 in the environment gives it to `standalone`,
whose "tokens per CPU second" then mean nothing, since that process is not counted.
"""
import argparse
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402
import transformers as hf  # noqa: E402

import data_prep  # noqa: E402
import eval as evaluation
import sft
import grpo  # noqa: E402
import rewards  # noqa: E402

PASSES = 3
SHAPES = {"3b": {
    "text_config": dict(
        hidden_size=2048, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
        intermediate_size=11008, vocab_size=151936, max_position_embeddings=32768, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}),
    "vision_config": dict(
        depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=2048,
        window_size=112, fullatt_block_indexes=[7, 15, 23, 31])}}


def save_shape(name, tiny, out):
    """Save a random bf16 Qwen2.5-VL of SHAPES[name] with tokenizer, processor and special ids of `tiny`.

    The tokenizer knows the first few hundred ids only: prompts use those, responses any.
    """
    config = hf.AutoConfig.from_pretrained(tiny)
    for part, sizes in SHAPES[name].items():
        getattr(config, part).update({"initializer_range": 0.02} | sizes)
    config.text_config.layer_types = ["full_attention"] * config.text_config.num_hidden_layers
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = hf.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.generation_config = hf.GenerationConfig.from_pretrained(tiny)
    model.save_pretrained(out)
    hf.AutoProcessor.from_pretrained(tiny).save_pretrained(out)
    del model
    torch.cuda.empty_cache()  # the arms need what this process would keep
    return str(out)


def tiny_suite(root, rows):
    """Make `rows` training questions of the mini suite and a random tiny model; returns both paths."""
    data_prep.make_mini(root / "mini", 0, sizes={"train": rows})
    path = root / "mini/counting_train.jsonl"
    records = data_prep.read_records(path)
    texts = [text for r in records for text in (rewards.build_prompt(r), r["response"])]
    data_prep.make_tiny(root / "tiny", texts, 0)
    return str(root / "tiny"), str(path)


# ----- the arms, each in its own process


def timed(work):
    """Call `work`; returns (its result, wall seconds, CPU seconds of this process)."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def passes(prepare, sample):
    """Warm up, then measure PASSES times. `sample` returns the number of response tokens."""
    rows = []
    for _ in range(1 + PASSES):
        _, sync, _ = timed(prepare)
        tokens, wall, cpu = timed(sample)
        rows.append({"tokens": tokens, "wall": wall, "cpu": cpu, "sync": sync})
    return rows[1:]


def settings(llm):
    """What must be alike in both vLLM arms."""
    config = llm.llm_engine.vllm_config
    return f"{config} {config.scheduler_config}"


def beside_trainer(name, args):
    """evaluation.generate with --engine `name`, as in a training step."""
    _, _, device = sft.init_distributed()
    cfg = grpo.Config(engine=name, max_new_tokens=args.max_new_tokens)
    policy, processor = sft.load_policy(args.model, cfg, device)
    engine = evaluation.build_engine(args.model, processor, cfg, device)
    records = data_prep.read_records(args.data, limit=args.prompts)
    prompts = [p for p in (sft.encode_prompt(r, processor, cfg.max_pixels) for r in records)
               for _ in range(args.group)]

    def sync():
        grpo.sleep_engine(engine)
        grpo.sync_weights(policy, engine)

    def sample():
        return sum(len(ids) for ids, _, _ in evaluation.generate(engine, prompts, range(len(prompts)), cfg))

    return passes(sync, sample), settings(engine.llm) if name == "vllm" else ""


def standalone(args):
    """LLM.generate.

    The settings repeat those of evaluation.VLLM; the parent says so when they are not the same.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    cfg, on_gpu = grpo.Config(max_new_tokens=args.max_new_tokens), torch.cuda.is_available()
    if on_gpu:
        place = dict(gpu_memory_utilization=cfg.gpu_memory_utilization, enable_sleep_mode=True)
    else:
        os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"}
        place = dict(kv_cache_memory_bytes=2**30, enforce_eager=True, enable_chunked_prefill=False,
                     max_num_batched_tokens=2**15)
    from vllm import LLM, SamplingParams
    llm = LLM(args.model, dtype=torch.bfloat16 if on_gpu else torch.float32, max_model_len=-1,
              logprobs_mode="processed_logprobs", limit_mm_per_prompt={"video": 0}, **place)
    processor = hf.AutoProcessor.from_pretrained(args.model)
    stop = sft.stop_ids(hf.GenerationConfig.from_pretrained(args.model), processor)
    banned = sft.vision_ids(hf.AutoConfig.from_pretrained(args.model), "cpu").tolist()
    requests = []
    for record in data_prep.read_records(args.data, limit=args.prompts):
        made = sft.encode_prompt(record, processor, cfg.max_pixels)["request"]
        requests.append({"prompt_token_ids": made["ids"], "multi_modal_data": {"image": made["images"]}})
    params = [SamplingParams(
        n=args.group, seed=i * args.group, temperature=cfg.temperature, top_p=cfg.top_p, top_k=cfg.top_k,
        max_tokens=args.max_new_tokens, stop_token_ids=stop, logit_bias=dict.fromkeys(banned, -100.0),
        logprobs=0, flat_logprobs=True, detokenize=False) for i in range(len(requests))]

    def forget():
        llm.reset_prefix_cache()
        llm.reset_mm_cache()
        llm.llm_engine.reset_encoder_cache()

    def sample():
        answers = llm.generate(requests, params, use_tqdm=False)
        return sum(len(output.token_ids) for answer in answers for output in answer.outputs)

    return passes(forget, sample), settings(llm)


# ----- the comparison


def hardware():
    """One line: what ran and on what."""
    name = "CPU"
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        name = found[1] if found else name
    place = f"{name}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        place = f"{torch.cuda.get_device_name()}, {place}"
    vllm = importlib.import_module("vllm").__version__ if importlib.util.find_spec("vllm") else "absent"
    return f"{place}; torch {torch.__version__}, vllm {vllm}"


def start(name, args):
    """Run an arm in a process of its own; returns its passes and its engine settings."""
    # As many threads as the trainer takes: one core is left for the preparation of images.
    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() - 1))}
    flags = [f"--{k}={getattr(args, k)}" for k in ("prompts", "group", "max_new_tokens", "model", "data")]
    done = subprocess.run([sys.executable, __file__, "--arm", name, *flags], env=threads | os.environ,
                          capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed: {done.stderr[-2000:]}")
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("[[")][-1])


def compare(args):
    """Measure the arms in turns and print the table; exits 1 when vllm falls behind standalone."""
    names = ["hf", "vllm", "standalone"] if importlib.util.find_spec("vllm") else ["hf"]
    rounds = {name: [] for name in names}
    alike = {name: set() for name in names}
    for turn in range(args.repeats):
        for name in names[::-1] if turn % 2 else names:
            rows, made = start(name, args)
            rounds[name].append(rows)
            alike[name].add(made)
            speeds = " ".join(f"{r['tokens'] / r['wall']:.0f}" for r in rows)
            print(f"round {turn + 1}, {name}: {speeds}", file=sys.stderr, flush=True)

    print(f"{args.prompts} prompts x {args.group} samples, at most {args.max_new_tokens} tokens; "
          f"{args.repeats} processes x {PASSES} passes an arm; {args.shape or args.model}\n{hardware()}\n\n"
          "| arm | tokens/s, median | min | max | tokens per CPU second | tokens of a pass | sync, s |\n"
          "|---|---|---|---|---|---|---|")
    for name in names:
        rows = [row for process in rounds[name] for row in process]
        speeds = [r["tokens"] / r["wall"] for r in rows]
        print(f"| {name} | {median(speeds):.0f} | {min(speeds):.0f} | {max(speeds):.0f} "
              f"| {median(r['tokens'] / r['cpu'] for r in rows):.0f} "
              f"| {median(r['tokens'] for r in rows):.0f} "
              f"| {'' if name == 'standalone' else format(median(r['sync'] for r in rows), '.3f')} |")
    if len(names) == 1:
        print("\nvLLM is not installed: vllm and standalone were skipped")
        return

    def ratio(a, b, clock):  # of the two medians of each round, since rounds differ in what else ran
        speeds = [[median(r["tokens"] / r[clock] for r in rows) for rows in rounds[name]] for name in (a, b)]
        return median(x / y for x, y in zip(*speeds))

    share = ratio("vllm", "standalone", "wall")
    print(f"\nvllm / standalone {share:.2f} (per CPU second {ratio('vllm', 'standalone', 'cpu'):.2f}), "
          f"vllm / hf {ratio('vllm', 'hf', 'wall'):.2f}")
    if alike["vllm"] != alike["standalone"]:
        print("the engine settings of vllm and standalone differ: "
              "bring this file in line with evaluation.VLLM")
    sys.exit(0 if share >= 0.9 else "vllm beside the trainer is slower than 0.90 of standalone")


def main():
    parser = argparse.ArgumentParser()
    for flag, default in (("prompts", 64), ("group", 8), ("max_new_tokens", 72), ("repeats", 5)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--model", default="", help="model folder or run; default: out/sft, else random")
    parser.add_argument("--data", default="", help="a records file; default: the mini suite")
    parser.add_argument("--shape", choices=["", *SHAPES], default="", help="random weights of this shape")
    parser.add_argument("--arm", default="", help="run this arm in this process and print JSON")
    args = parser.parse_args()
    if args.arm:
        rows = standalone(args) if args.arm == "standalone" else beside_trainer(args.arm, args)
        print(json.dumps(rows), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or (str(ROOT / "out/sft") if data_prep.newest_step(ROOT / "out/sft") else "")
        made = [] if model and args.data else tiny_suite(Path(folder), args.prompts)
        args.model = data_prep.resolve_model(model) if model else made[0]
        args.data = args.data or made[1]
        if args.shape:
            args.model = save_shape(args.shape, args.model, Path(folder) / args.shape)
        compare(args)


if __name__ == "__main__":
    main()
