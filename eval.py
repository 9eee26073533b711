"""Evaluation: a checkpoint -> accuracy on benchmarks, or the answer to one question.

Greedy by default. Every row is graded by rewards.accuracy, the same function that training rewards. A row
that could not be read or answered counts as wrong and stays in the denominator.

    python eval.py --bench                   # every benchmark whose data is present, newest step of out/grpo
    python eval.py --bench counting-id counting-ood --model out/sft
    python eval.py --bench mathvision=test.jsonl --model Qwen/Qwen2.5-VL-7B-Instruct --max_new_tokens 2048
    python eval.py --bench my_records.jsonl  # any file that data_prep can read
    python eval.py --image photo.jpg --prompt "What is unusual here?" --model Qwen/Qwen2.5-VL-7B-Instruct

Writes MODEL/eval/BENCH.jsonl (a line per row, appended as answers come: the same command again goes on where
it stopped) and MODEL/eval/summary.json. For a Hub id MODEL is out/OWNER--NAME.

Shapes: B rows generated together, T padded length, V vocabulary.
"""
import argparse
import dataclasses
import difflib
import hashlib
import inspect
import json
import math
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils.logging import disable_progress_bar

from data_prep import build_messages, load_image, read_records, resolve_model
from rewards import PROMPTS, accuracy, extract_answer

# Benchmark -> (where its records are looked for, official size; 0 = any).
BENCHES = {
    "counting-id": ("data/mini/counting_id.jsonl", 0),
    "counting-ood": ("data/mini/counting_ood.jsonl", 0),
    "mathvision": ("data/mathvision/test.jsonl", 3040),
}


@dataclass(frozen=True)
class Config:
    bench: tuple[str, ...] = ()  # benchmarks: NAME, NAME=PATH or PATH; none given = all whose data is present
    model: str = "out/grpo"  # Hub id, model folder or run directory
    limit: int = 0  # first rows of each benchmark only, 0 = all
    image: tuple[str, ...] = ()  # answer one question about these images instead
    prompt: str = ""  # the question for --image
    task: str = "plain"  # prompt template for --prompt: plain or one of rewards.PROMPTS
    max_new_tokens: int = 1024  # response tokens at most
    temperature: float = 0.0  # 0 = greedy
    top_p: float = 1.0  # nucleus sampling
    top_k: int = 0  # 0 = off
    seed: int = 0  # of sampling, when the temperature is above 0
    rollout_tokens: int = 65536  # prompt and response tokens generated at once
    batch_rows: int = 64  # rows answered between two writes to disk
    max_pixels: int = 1003520  # larger images are scaled down to this many pixels
    attn: str = "sdpa"  # attention kernel: sdpa | flash_attention_2 | eager


# ----- twins (identical in grpo.py, rise.py; tests/test_twins.py) ------------------------------------------


def parse_config(cls, argv=None):
    """Build the frozen dataclass `cls` from `--key value`, `--key=value`, bare bools and lists.

    The default gives the type, the trailing comment the --help text. A bad flag exits with one line.
    """
    source, names = inspect.getsource(cls), [f.name for f in dataclasses.fields(cls)]
    parser = argparse.ArgumentParser(description=sys.modules[cls.__module__].__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"{parser.prog}: {message}")
    truth = {"true": True, "1": True, "false": False, "0": False}
    for f in dataclasses.fields(cls):
        text = re.search(rf"^    {f.name}: .*?  # (.+)$", source, re.M)[1]
        shown = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        kind = dict(type=type(f.default))
        if isinstance(f.default, bool):
            kind = dict(type=lambda s: truth.get(s.lower(), s), choices=(True, False), nargs="?", const=True,
                        metavar="true|false")
        elif isinstance(f.default, tuple):
            kind = dict(type=str, nargs="*")
        text = f"{text} [{shown}]".replace("%", "%%")
        parser.add_argument(f"--{f.name}", default=f.default, help=text, **kind)
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].lstrip("-").split("=")[0], names, 1, 0)
        parser.error(f"unknown flag {unknown[0]}; did you mean --{near[0]}?")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in vars(values).items()})


def vision_ids(config, device):
    """Ids of image and video placeholders. A response must hold none: the model would look for features."""
    ids = config.to_dict()
    named = [k for k in ids if re.search(r"(image|video|vision\w*|boi|eoi)_token_(id|index)$", k)]
    return torch.tensor(sorted({ids[k] for k in named if isinstance(ids[k], int)}), device=device)


def stop_ids(generation_config, processor):
    """Token ids that end a response; the first is what the chat template writes after an assistant turn."""
    turn = [{"role": "user", "content": [{"type": "text", "text": "-"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "@@"}]}]
    tail = processor.apply_chat_template(turn, tokenize=False).rpartition("@@")[2]
    written = processor.tokenizer(tail, add_special_tokens=False)["input_ids"][:1]
    # Some templates write a space or nothing there.
    written = [i for i in written if i in processor.tokenizer.all_special_ids]
    known = generation_config.eos_token_id
    known = known if isinstance(known, list) else [known] if known is not None else []
    return list(dict.fromkeys(written + known + [processor.tokenizer.eos_token_id]))


def encode_prompt(record, processor, max_pixels):
    """Render a record's prompt and images into the processor's CPU tensors, batch size 1. Raises BadImage."""
    text = processor.apply_chat_template(build_messages(record), add_generation_prompt=True, tokenize=False)
    images = [load_image(image, max_pixels) for image in record["images"]]
    # The template already wrote every special token, a second BOS would shift the prompt.
    images = [images] if images else None
    return dict(processor(text=[text], images=images, add_special_tokens=False, return_tensors="pt"))


def collate(rows, dummy, pad_id, device):
    """Right-pad (prompt, response ids) rows into forward kwargs and the mask (B, T-1) of response tokens.

    A batch without images gets `dummy`, an image prompt, with an empty response: all ranks must run the
    vision tower, or FSDP waits for ever for those that do not.
    """
    if dummy and not any("pixel_values" in p for p, _ in rows):
        rows = rows + [(dummy, [])]
    width = max(p["input_ids"].shape[1] + len(response) for p, response in rows)
    inputs, mask = {}, torch.zeros(len(rows), width - 1, dtype=torch.bool)
    for key in dict.fromkeys(k for p, _ in rows for k in p):
        owners = [p for p, _ in rows if key in p]
        parts = [p[key] for p in owners]
        if parts[0].shape == owners[0]["input_ids"].shape:
            out = torch.full((len(rows), width), pad_id if key == "input_ids" else 0)  # (B, T)
            for row, (p, response) in zip(out, rows):
                n = p["input_ids"].shape[1]
                row[:n] = p[key][0] if key in p else 0
                if key == "input_ids":
                    row[n:n + len(response)] = torch.tensor(response, dtype=torch.long)
                elif key == "attention_mask":
                    row[n:n + len(response)] = 1
            inputs[key] = out
        else:
            # Patches (Qwen) concatenate as they are;
            # frames (Idefics3, which drops frames of zeros) are padded first.
            most = [max(sizes) for sizes in zip(*(x.shape[1:] for x in parts))]
            pads = [[w for have, want in zip(x.shape[:0:-1], most[::-1]) for w in (0, want - have)]
                    for x in parts]
            inputs[key] = torch.cat([torch.nn.functional.pad(x, pad) for x, pad in zip(parts, pads)])
    for row, (p, response) in zip(mask, rows):
        n = p["input_ids"].shape[1]
        row[n - 1:n - 1 + len(response)] = True
    return {k: v.to(device) for k, v in inputs.items()}, mask.to(device)


def build_engine(path, processor, cfg, device):
    """A plain copy of the model for sampling, in compute dtype; outside FSDP, so ranks need not keep step."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    engine = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, attn_implementation=cfg.attn)
    engine.stop = stop_ids(engine.generation_config, processor)
    engine.banned = vision_ids(engine.config, device)
    return engine.eval().requires_grad_(False).to(device)


@torch.no_grad()
def generate(engine, prompts, seeds, cfg):
    """Sample one response per prompt; returns (response ids, logprobs under the sampler, truncated) in order.

    prompts: encode_prompt's tensors; rows that are the same object share one prefill, so the images of a
    question are encoded once and only its KV cache is copied G times. seeds: one int per prompt; each row
    draws from its own stream by inverse CDF, so what it samples does not depend on its batch. cfg:
    max_new_tokens, temperature (0 = greedy), top_p, top_k, rollout_tokens.
    """
    out, device = [None] * len(prompts), engine.banned.device
    stop = torch.tensor(engine.stop, device=device)
    room = [p["input_ids"].shape[1] + cfg.max_new_tokens for p in prompts]
    chunks, order = [], sorted(range(len(prompts)), key=lambda i: room[i])
    for i in order:
        if chunks and (len(chunks[-1]) + 1) * room[i] <= cfg.rollout_tokens:
            chunks[-1].append(i)
        else:
            chunks.append([i])
    for chunk in chunks:
        unique = {id(prompts[i]): prompts[i] for i in chunk}
        owner = torch.tensor([list(unique).index(id(prompts[i])) for i in chunk], device=device)  # (B,)
        cache, mask, shift, logits = prefill(engine, list(unique.values()), owner)
        streams = [torch.Generator().manual_seed(seeds[i]) for i in chunk]
        draws = [torch.rand(cfg.max_new_tokens, dtype=torch.float64, generator=g) for g in streams]
        draws = torch.stack(draws).to(device)  # (B, max_new_tokens)
        tokens = torch.full(draws.shape, engine.stop[0], device=device)  # (B, max_new_tokens)
        logps = torch.zeros(draws.shape, device=device)
        live = torch.arange(len(chunk), device=device)  # rows still in the batch
        for t in range(cfg.max_new_tokens):
            logp = logits.float().index_fill(1, engine.banned, -torch.inf) / (cfg.temperature or 1.0)
            logp = truncate(logp, cfg).log_softmax(1)  # (b, V)
            cdf = logp.double().exp().cumsum(1)
            if cfg.temperature:
                token = torch.searchsorted(cdf, draws[live, t, None] * cdf[:, -1:], right=True)  # (b, 1)
            else:
                token = logp.argmax(1, keepdim=True)
            tokens[live, t], logps[live, t] = token[:, 0], logp.gather(1, token)[:, 0]
            ended = torch.isin(tokens[live, :t + 1], stop).any(1)
            if ended.all() or t + 1 == cfg.max_new_tokens:
                break
            if 2 * ended.sum() >= len(live):  # half is finished: worth copying the cache without them
                keep = (~ended).nonzero()[:, 0]
                cache.batch_select_indices(keep)
                live, token, mask = live[keep], token[keep], mask[keep]
                shift = shift[keep] if shift is not None else None
            mask = torch.cat([mask, torch.ones_like(token)], 1)
            place = mask.sum(1, keepdim=True) - 1  # (b, 1)
            place = place if shift is None else (place + shift).expand(3, -1, -1)
            logits = engine(input_ids=token, attention_mask=mask, position_ids=place, past_key_values=cache,
                            use_cache=True).logits[:, -1]
        for i, row, logp in zip(chunk, tokens.tolist(), logps.cpu()):
            end = next((t + 1 for t, token in enumerate(row) if token in engine.stop), None)
            out[i] = row[:end], logp[:end].clone(), end is None
    return out


def prefill(engine, prompts, owner):
    """Run distinct prompts, left-padded, and copy their states to the rows that own them.

    Returns the KV cache, attention mask (B, T), shift (B, 1) of Qwen's multimodal positions against the token
    count (None for other families) and next-token logits (B, V).
    """
    width = max(p["input_ids"].shape[1] for p in prompts)
    fill = {"input_ids": engine.stop[0]}
    padded = [{k: torch.nn.functional.pad(v, (width - v.shape[1], 0), value=fill.get(k, 0))
               if v.shape == p["input_ids"].shape else v for k, v in p.items()} for p in prompts]
    inputs, _ = collate([(p, []) for p in padded], None, engine.stop[0], owner.device)
    if hasattr(engine.model, "rope_deltas"):
        engine.model.rope_deltas = None  # kept from the last batch otherwise
    if "image_grid_thw" not in inputs:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    result = engine(**inputs, use_cache=True, logits_to_keep=1)
    result.past_key_values.batch_select_indices(owner)
    shift = getattr(engine.model, "rope_deltas", None)
    shift = None if shift is None else shift[owner]
    return result.past_key_values, inputs["attention_mask"][owner], shift, result.logits[owner, -1]


def truncate(logits, cfg):
    """Top-k, then nucleus (top-p): everything else gets -inf. (B, V) -> (B, V)"""
    if cfg.top_k:
        least = logits.topk(min(cfg.top_k, logits.shape[1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < least, -torch.inf)
    if cfg.top_p < 1:
        ordered, index = logits.sort(descending=True)
        probs = ordered.softmax(1)
        drop = probs.cumsum(1) - probs >= cfg.top_p  # keep the token that crosses top_p
        logits = logits.masked_fill(drop.scatter(1, index, drop), -torch.inf)
    return logits


# ----- this stage ------------------------------------------------------------------------------------------


def find_benches(names):
    """--bench as [(name, path, official size)]. Raises ValueError for an unknown name or missing data."""
    if not names:
        present = [(name, path, size) for name, (path, size) in BENCHES.items() if Path(path).exists()]
        if not present:
            raise ValueError("no benchmark data found; `python data_prep.py` makes the mini suite")
        return present
    found = []
    for name in names:
        key, _, path = name.partition("=")
        if key in BENCHES:
            found.append((key, path or BENCHES[key][0], BENCHES[key][1]))
        elif Path(name).exists():
            found.append((Path(name).stem, name, 0))
        else:
            near = difflib.get_close_matches(key, BENCHES, 1, 0)[0]
            raise ValueError(f"unknown benchmark {name}; did you mean {near}? "
                             f"Known: {', '.join(BENCHES)}, or a records file")
    return found


def wilson(p, n):
    """95 % interval of share p of n (Wilson 1927): unlike p +- 1.96 sd it stays in [0, 1], also at p = 1."""
    z = 1.96
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [round((middle - half) / (1 + z * z / n), 4), round((middle + half) / (1 + z * z / n), 4)]


def answer_rows(records, engine, processor, cfg):
    """Yield one result per record, in batches of cfg.batch_rows; that of an unreadable row has an `error`."""
    for start in range(0, len(records), cfg.batch_rows):
        batch, prompts, results = records[start:start + cfg.batch_rows], [], []
        for record in batch:
            try:
                prompts.append(encode_prompt(record, processor, cfg.max_pixels))
            except ValueError as e:
                prompts.append(e)
        good = [i for i, p in enumerate(prompts) if isinstance(p, dict)]
        keys = [f"{cfg.seed}/{batch[i]['id']}" for i in good]
        seeds = [int(hashlib.sha256(key.encode()).hexdigest()[:15], 16) for key in keys]
        answers = dict(zip(good, generate(engine, [prompts[i] for i in good], seeds, cfg)))
        for i, record in enumerate(batch):
            result = {"id": record["id"], "question": record["question"], "answer": record.get("answer", "")}
            if i in answers:
                ids, _, truncated = answers[i]
                text = processor.tokenizer.decode(ids, skip_special_tokens=True)
                result |= {"response": text, "extracted": extract_answer(text), "tokens": len(ids),
                           "truncated": truncated}
            else:
                result |= {"response": "", "extracted": None, "tokens": 0, "truncated": False,
                           "error": str(prompts[i])}
            results.append(result)
        yield from zip(batch, results)


def run_bench(name, records, engine, processor, folder, settings, cfg):
    """Answer what BENCH.jsonl does not hold yet under the same settings; return the benchmark's summary."""
    path, began = folder / f"{name}.jsonl", time.time()
    lines = path.read_text().splitlines(True) if path.exists() else []
    kept = [json.loads(line) for line in lines if line.endswith("\n")]  # a killed run may leave half a line
    wanted = {r["id"] for r in records}
    done = {row["id"]: row for row in kept if row["settings"] == settings and row["id"] in wanted}
    path.write_text("".join(json.dumps(row) + "\n" for row in done.values()))
    with (open(path, "a") as out,
          tqdm(total=len(records), initial=len(done), desc=name, dynamic_ncols=True) as bar):
        for record, row in answer_rows([r for r in records if r["id"] not in done], engine, processor, cfg):
            row |= {"correct": accuracy(row["response"], record), "settings": settings}
            done[row["id"]] = row
            out.write(json.dumps(row) + "\n")
            out.flush()
            bar.update()
    rows, n = list(done.values()), len(records)
    right = sum(row["correct"] for row in rows) / n
    return {"bench": name, "n": n, "accuracy": round(right, 4), "ci95": wilson(right, n),
            "truncated": round(sum(row["truncated"] for row in rows) / n, 4),
            "parse_failed": round(sum(row["extracted"] is None for row in rows) / n, 4),
            "failed": sum("error" in row for row in rows),
            "tokens": round(sum(row["tokens"] for row in rows) / n, 1),
            "seconds": round(time.time() - began, 1)}


def main(cfg):
    """Load the model once, then answer the one question or run the benchmarks and print their table."""
    disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if bool(cfg.image) != bool(cfg.prompt):
            raise ValueError("--image and --prompt go together")
        if cfg.task not in PROMPTS:
            raise ValueError(f"--task {cfg.task}: use {' | '.join(PROMPTS)}")
        path = resolve_model(cfg.model)
        loaded = [(name, read_records(source, need=("answer",)), size) for name, source, size in
                  (find_benches(cfg.bench) if not cfg.image else [])]
        processor = AutoProcessor.from_pretrained(path)
        engine = build_engine(path, processor, cfg, device)
        home = Path(cfg.model) if Path(cfg.model).exists() else Path("out", cfg.model.replace("/", "--"))
        folder = home / "eval"
        folder.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as e:
        sys.exit(f"{Path(sys.argv[0]).name}: {str(e).strip().splitlines()[0]}")
    if cfg.image:
        record = {"id": "0", "question": cfg.prompt, "images": list(cfg.image), "answer_type": "text",
                  "task": cfg.task}
        (_, row), = answer_rows([record], engine, processor, cfg)
        sys.exit(f"eval.py: {row['error']}") if "error" in row else print(row["response"])
        return
    sampling = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "max_pixels")
    settings = {"model": path, **{name: getattr(cfg, name) for name in sampling}}
    summary = []
    for name, records, size in loaded:
        if size and len(records) != size:
            print(f"{name}: {len(records)} rows, the official split has {size}: "
                  "not comparable with published numbers")
        summary.append(run_bench(name, records[:cfg.limit or None], engine, processor, folder, settings, cfg))
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f"\n{path}, temperature {cfg.temperature:g}, at most {cfg.max_new_tokens} tokens\n")
    print("| benchmark | n | accuracy | 95 % interval | truncated | no answer | tokens | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for s in summary:
        print(f"| {s['bench']} | {s['n']} | {100 * s['accuracy']:.1f} "
              f"| {100 * s['ci95'][0]:.1f} - {100 * s['ci95'][1]:.1f} "
              f"| {100 * s['truncated']:.1f} % | {100 * s['parse_failed']:.1f} % "
              f"| {s['tokens']} | {s['seconds']} |")


if __name__ == "__main__":
    main(parse_config(Config))
