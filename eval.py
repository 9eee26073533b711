"""Evaluation: a checkpoint -> accuracy on benchmarks, or the answer to one question.

Greedy by default. Every row is graded by rewards.accuracy, the same function that training rewards. A row
that could not be read or answered counts as wrong, stays in the denominator and is listed after the table;
one without an `answer` is answered, not graded.

    python eval.py --bench                   # every benchmark whose data is present, newest step of out/grpo
    python eval.py --bench counting-id counting-ood --model out/sft
    python eval.py --bench counting-id counting-ood --model out/sft out/grpo     # one table
    python eval.py --bench mathvision=test.jsonl --model Qwen/Qwen2.5-VL-7B-Instruct --max_new_tokens 2048
    python eval.py --bench mathvista mmmu    # from data/, else the Hub
    python eval.py --bench my_records.jsonl  # any file that data_prep can read
    python eval.py --bench --n 8 --temperature 0.6 --top_p 0.95   # accuracy is pass@1 over 8 samples; maj@8
    python eval.py --image photo.jpg --prompt "What is unusual here?" --model Qwen/Qwen2.5-VL-7B-Instruct
    python eval.py --bench --engine vllm --model out/grpo

    vllm serve out/grpo/step_000040 --generation-config vllm   # sampling as asked, not as the model suggests
    python eval.py --engine api --base_url http://localhost:8000/v1 --bench counting-id

Any OpenAI-compatible server will do, also a proprietary model's: the key is read from OPENAI_API_KEY and goes
nowhere but into the request. Images travel as PNG, so the server sees the pixels that the other engines see.

    OPENAI_API_KEY=... python eval.py --engine api --base_url https://HOST/v1 --api_model NAME --bench

Leaderboards that extract answers with a language model: --judge api sends it the responses that the rules
grade as wrong, and what it reads there as the answer (it never sees the gold) is graded by the same rules.
The table has both. Its key is JUDGE_API_KEY, unless it is the server of --base_url.

    python eval.py --bench mathvista --judge api --judge_url https://HOST/v1 --judge_model NAME

Writes MODEL/eval/BENCH.jsonl (a line per row, appended as answers come: the same command again goes on where
it stopped and asks failed rows again) and MODEL/eval/summary.json. MODEL is the model's folder or, for what
is no folder here, out/OWNER--NAME. The printed table is also MODEL/eval/table.md and table.json, or that of
several models out/eval/table.md and table.json.

Shapes: B rows generated together, T padded length, V vocabulary.
"""
import argparse
import base64
import dataclasses
import difflib
import hashlib
import importlib.util
import inspect
import io
import json
import math
import os
import random
import re
import sys
import time
import traceback
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils.logging import disable_progress_bar

from data_prep import build_messages, load_image, read_records, resolve_model
from rewards import PROMPTS, accuracy, build_prompt, extract_answer, functions

class Bench(NamedTuple):
    path: str  # where its records are looked for: a file named after the split
    size: int = 0  # rows of the official split, 0 = any
    by: tuple[str, ...] = ()  # fields of the record, or of its meta, whose values are reported apart
    hub: str = ""  # where they come from if there is no such file
    macro: str = ""  # the headline is the mean over the values of this field, each alike
    split: str = "test"  # of a folder or what the Hub has


BENCHES = {
    "counting-id": Bench("data/mini/counting_id.jsonl"),
    "counting-ood": Bench("data/mini/counting_ood.jsonl"),
    "structure-id": Bench("data/mini/structure_id.jsonl", by=("answer_type",)),
    "structure-ood": Bench("data/mini/structure_ood.jsonl", by=("answer_type",)),
    "transform-id": Bench("data/mini/transform_id.jsonl", by=("steps",)),
    "transform-left": Bench("data/mini/transform_left.jsonl", by=("steps",)),
    "transform-right": Bench("data/mini/transform_right.jsonl", by=("steps",)),
    "mathvision": Bench("data/mathvision/test.jsonl", 3040, ("level", "subject"), "MathLLMs/MathVision"),
    "mathvision-mini": Bench("data/mathvision/testmini.jsonl", 304, ("level", "subject"),
                             "MathLLMs/MathVision"),
    "mathvista": Bench("data/mathvista/testmini.jsonl", 1000, ("task", "skills"), "AI4Math/MathVista"),
    "mathverse": Bench("data/mathverse/testmini.jsonl", 3940, ("version",), "AI4Math/MathVerse:testmini"),
    "mathverse-text-only": Bench("data/mathverse/testmini_text_only.jsonl", 788, (),
                                 "AI4Math/MathVerse:testmini_text_only"),
    "mmmu": Bench("data/mmmu/validation.jsonl", 900, ("discipline", "subject"), "MMMU/MMMU:*"),
    "mmmu-pro-standard-4": Bench("data/mmmu-pro-standard-4/test.jsonl", 1730, ("discipline",),
                                 "MMMU/MMMU_Pro:standard (4 options)"),
    "mmmu-pro-standard-10": Bench("data/mmmu-pro-standard-10/test.jsonl", 1730, ("discipline",),
                                  "MMMU/MMMU_Pro:standard (10 options)"),
    "mmmu-pro-vision": Bench("data/mmmu-pro-vision/test.jsonl", 1730, ("discipline",),
                             "MMMU/MMMU_Pro:vision"),
    "emma": Bench("data/emma/test.jsonl", 2788, ("subject",), "luckychao/EMMA:*"),
    "mega-bench": Bench("data/mega-bench/test.jsonl", macro="task"),  # its rule-scored tasks of one answer
    "scienceqa": Bench("data/scienceqa/test.jsonl", 4241, ("subject",), "derek-thomas/ScienceQA"),
    "scienceqa-img": Bench("data/scienceqa-img/test.jsonl", 2017, ("subject",),
                           "lmms-lab/ScienceQA:ScienceQA-IMG"),
    "geometry3k": Bench("data/geometry3k/test.jsonl", 601, (), "hiyouga/geometry3k"),
}
# Name -> benchmarks; its scores are theirs, averaged with equal weights whatever their sizes.
AVERAGES = {
    "counting": ("counting-id", "counting-ood"),
    "structure": ("structure-id", "structure-ood"),
    "transform": ("transform-id", "transform-left", "transform-right"),
    "mmmu-pro": ("mmmu-pro-standard-10", "mmmu-pro-vision"),
}
# What is measured beside accuracy, by answer type: a reward, averaged over the rows of that type.
SCORES = {"calls": {"partial": functions}}
JUDGE = """Below are a question and somebody's response to it. Do not solve the question and do not correct
the response. Only copy out the final answer that the response comes to, as short as it can be: the letter if
the question has options, else the number, formula, list or words, without a sentence around it. If the
response comes to no answer, write none.

Question: {question}

Response: {response}

Final answer:"""


@dataclass(frozen=True)
class Config:
    bench: tuple[str, ...] = ()  # benchmarks: NAME, NAME=PATH or PATH; none given = all whose data is present
    model: tuple[str, ...] = ("out/grpo",)  # Hub ids, model folders or run directories
    engine: str = "hf"  # hf (transformers) | vllm (in this process) | api (an OpenAI-compatible server)
    limit: int = 0  # first rows of each benchmark only, 0 = all
    image: tuple[str, ...] = ()  # answer one question about these images instead
    prompt: str = ""  # the question for --image
    task: str = ""  # prompt of every question, one of rewards.PROMPTS, "" = a record's own (--prompt: plain)
    max_new_tokens: int = 1024  # response tokens at most
    n: int = 1  # samples per row: accuracy is their mean, maj@n that of the answer most of them agree on
    temperature: float = 0.0  # 0 = greedy
    top_p: float = 1.0  # nucleus sampling
    top_k: int = 0  # 0 = off
    seed: int = 0  # of sampling, when the temperature is above 0
    rollout_tokens: int = 65536  # prompt and response tokens generated at once
    batch_rows: int = 64  # rows answered between two writes to disk
    max_pixels: int = 1003520  # larger images are scaled down to this many pixels
    attn: str = "sdpa"  # attention kernel: sdpa | flash_attention_2 | eager
    tp: int = 1  # GPUs that share one vLLM engine (tensor parallel)
    gpu_memory_utilization: float = 0.9  # share of the GPU that vLLM may use
    base_url: str = "http://localhost:8000/v1"  # api: where the server is
    api_model: tuple[str, ...] = ()  # api: names of models at the server, none = the first that it lists
    concurrency: int = 16  # api: requests in flight at most
    timeout: float = 300.0  # api: seconds to wait for one answer
    retries: int = 5  # api: further attempts per row, ever longer apart
    judge: str = "off"  # who reads the answer out of a response that the rules grade as wrong: off | api
    judge_url: str = ""  # judge: where its server is, "" = --base_url
    judge_model: str = ""  # judge: its name at the server, "" = the first that it lists


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
    """Render a record's prompt and images into the processor's CPU tensors, batch size 1. Raises BadImage.

    `request` is the same prompt for engines that process images themselves: one placeholder per image.
    """
    messages = build_messages(record)
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    images = [load_image(image, max_pixels) for image in record["images"]]
    # The template already wrote every special token, a second BOS would shift the prompt.
    inputs = processor(text=[text], images=[images] if images else None, add_special_tokens=False,
                       return_tensors="pt")
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return {**inputs, "request": {"ids": ids, "images": images, "messages": messages}}


def collate(rows, dummy, pad_id, device):
    """Right-pad (prompt, response ids) rows into forward kwargs and the mask (B, T-1) of response tokens.

    A batch without images gets `dummy`, an image prompt, with an empty response: all ranks must run the
    vision tower, or FSDP waits for ever for those that do not.
    """
    if dummy and not any("pixel_values" in p for p, _ in rows):
        rows = rows + [(dummy, [])]
    width = max(p["input_ids"].shape[1] + len(response) for p, response in rows)
    inputs, mask = {}, torch.zeros(len(rows), width - 1, dtype=torch.bool)
    for key in dict.fromkeys(k for p, _ in rows for k in p if k != "request"):
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
    """What samples: a plain copy of the model outside FSDP (--engine hf), or vLLM in this process (vllm)."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if cfg.engine == "vllm":
        engine = VLLM(path, dtype, cfg)
    else:
        engine = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, attn_implementation=cfg.attn)
        engine.eval().requires_grad_(False).to(device)
        engine.asleep = False
    engine.stop = stop_ids(engine.generation_config, processor)
    engine.banned = vision_ids(engine.config, device)
    return engine


class VLLM:
    """vLLM in this process, on this rank's GPU; under torchrun cfg.tp neighbouring ranks share one engine.

    Ranks that share an engine must sample and sync together: each runs its part of every layer.
    """

    def __init__(self, path, dtype, cfg):
        # In this process weights are handed over in memory, and ranks that share an engine schedule alike.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        if torch.cuda.is_available():
            place = dict(gpu_memory_utilization=cfg.gpu_memory_utilization, enable_sleep_mode=True)
        else:
            # Threads stay as init_distributed set them, nothing waits for a C++ compiler, and prompts are not
            # cut into chunks, after which seeded sampling fails on CPU.
            os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"}
            place = dict(kv_cache_memory_bytes=2**30, enforce_eager=True, enable_chunked_prefill=False,
                         max_num_batched_tokens=2**15)
        from vllm import LLM
        self.llm = LLM(path, dtype=dtype, max_model_len=-1, tensor_parallel_size=cfg.tp,
                       distributed_executor_backend="external_launcher" if "RANK" in os.environ else None,
                       logprobs_mode="processed_logprobs", limit_mm_per_prompt={"video": 0}, **place)
        self.config, self.dtype, self.tp, self.asleep = self.llm.model_config.hf_config, dtype, cfg.tp, False
        known = self.llm.model_config.try_get_generation_config()
        self.generation_config = transformers.GenerationConfig(**known)

    def sample(self, asked):
        """[(prompt, sampling parameters)] -> [(prompt ids, [(response ids, logprobs, truncated)])]."""
        from vllm import SamplingParams
        images = [prompt["request"]["images"] for prompt, _ in asked]
        requests = [{"prompt_token_ids": prompt["request"]["ids"],
                     "multi_modal_data": {"image": own} if own else {}}
                    for (prompt, _), own in zip(asked, images)]
        params = [SamplingParams(**options, flat_logprobs=True, detokenize=False) for _, options in asked]
        first = 0
        if self.tp > 1 and "RANK" in os.environ:  # answer the questions of all, keep those of this rank
            from vllm.distributed import get_tp_group
            shares, group = [None] * self.tp, get_tp_group()
            dist.all_gather_object(shares, (requests, params), group.cpu_group)
            first = sum(len(share[0]) for share in shares[:group.rank_in_group])
            requests, params = ([x for share in shares for x in share[k]] for k in (0, 1))
        try:
            answers = self.llm.generate(requests, params, use_tqdm=False)[first:first + len(asked)]
        except Exception as error:
            traceback.print_exc()
            sys.exit(f"{Path(sys.argv[0]).name}: vLLM failed: {error}")
        return [(list(answer.prompt_token_ids),
                 [(list(o.token_ids), torch.tensor(o.logprobs.logprobs), o.finish_reason == "length")
                  for o in answer.outputs]) for answer in answers]


def chat_messages(messages, images):
    """build_messages' turns as OpenAI-compatible servers take them: the k-th image mark becomes images[k]."""
    images = iter(images)

    def filled(part):
        if part["type"] != "image":
            return part
        next(images).save(png := io.BytesIO(), "PNG", icc_profile=None)  # a profile could change the colours
        url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        return {"type": "image_url", "image_url": {"url": url}}

    return [turn | {"content": [filled(part) for part in turn["content"]]} for turn in messages]


def generate(engine, prompts, seeds, cfg):
    """Sample one response per prompt; returns (response ids, logprobs under the sampler, truncated) in order.

    prompts: encode_prompt's results; rows that are the same object are samples of one prompt, whose images
    are encoded once. seeds: one int per prompt; each row has its own random stream, so what it samples does
    not depend on its batch (vLLM seeds the samples of a prompt with the first row's seed plus 0, 1, ...).
    cfg: max_new_tokens, temperature (0 = greedy), top_p, top_k. Raises ValueError when the engine reads a
    prompt as other tokens than the trainer.
    """
    if isinstance(engine, torch.nn.Module):
        return decode(engine, prompts, seeds, cfg)
    rows = {}  # a prompt -> its places in the batch
    for i, prompt in enumerate(prompts):
        rows.setdefault(id(prompt), []).append(i)
    shared = {"temperature": cfg.temperature, "top_p": cfg.top_p, "top_k": cfg.top_k,
              "max_tokens": cfg.max_new_tokens, "stop_token_ids": engine.stop, "logprobs": 0,
              "logit_bias": {token: -100.0 for token in engine.banned.tolist()}}
    asked = [(prompts[own[0]], shared | {"n": len(own), "seed": seeds[own[0]]}) for own in rows.values()]
    out = [None] * len(prompts)
    for own, (prompt, _), (seen, samples) in zip(rows.values(), asked, engine.sample(asked)):
        if seen != prompt["input_ids"][0].tolist():
            raise ValueError(f"the engine reads a prompt as {len(seen)} tokens, the trainer as "
                             f"{prompt['input_ids'].shape[1]}: their processors differ")
        for i, sample in zip(own, samples):
            out[i] = sample
    return out


@torch.no_grad()
def decode(engine, prompts, seeds, cfg):
    """`generate` on a transformers model.

    Rows of one prompt share its prefill, only the KV cache is copied; each draws by inverse CDF from its own
    stream. At most cfg.rollout_tokens prompt and response tokens are held at once.
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
               if v.shape == p["input_ids"].shape else v for k, v in p.items() if k != "request"}
              for p in prompts]
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
    """--bench as [(name, Bench)]. Raises ValueError for an unknown name or missing data."""
    if not names:
        present = [(name, bench) for name, bench in BENCHES.items() if Path(bench.path).exists()]
        if not present:
            raise ValueError("no benchmark data found; `python data_prep.py` makes the mini suite")
        return present
    found = []
    for name in names:
        key, _, path = name.partition("=")
        if key in BENCHES:
            local, hub = BENCHES[key].path, BENCHES[key].hub
            path = path or (local if Path(local).exists() or not hub else hub)
            found.append((key, BENCHES[key]._replace(path=path, split=Path(local).stem)))
        elif Path(name).exists():
            found.append((Path(name).stem, Bench(name)))
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


def row_seeds(record, cfg):
    """Seeds of a row's own random streams, so that what is sampled does not depend on the rows before it."""
    first = int(hashlib.sha256(f"{cfg.seed}/{record['id']}".encode()).hexdigest()[:15], 16)
    return [first + k for k in range(cfg.n)]


def no_reply(error):
    """The reply of a row that could not be read or answered: an empty response, which grades as wrong."""
    return {"response": "", "tokens": 0, "truncated": False, "error": error}


def answer_rows(records, engine, processor, cfg):
    """Yield (record, replies) in order, cfg.batch_rows at a time, from an engine in this process.

    A record gets cfg.n replies {"response", "tokens", "truncated"}, or just one with an "error" too.
    """
    for start in range(0, len(records), cfg.batch_rows):
        batch, prompts, replies = records[start:start + cfg.batch_rows], {}, {}
        for i, record in enumerate(batch):
            try:
                prompts[i] = encode_prompt(record, processor, cfg.max_pixels)
            except ValueError as e:
                replies[i] = [no_reply(str(e))]
        samples = [(i, seed) for i in prompts for seed in row_seeds(batch[i], cfg)]
        answers = generate(engine, [prompts[i] for i, _ in samples], [seed for _, seed in samples], cfg)
        for (i, _), (ids, _, truncated) in zip(samples, answers):
            text = processor.tokenizer.decode(ids, skip_special_tokens=True)
            replies.setdefault(i, []).append({"response": text, "tokens": len(ids), "truncated": truncated})
        yield from ((record, replies[i]) for i, record in enumerate(batch))


def api_key(name):
    """An environment variable, or "". Raises ValueError (without the key) if no header can hold it."""
    key = os.environ.get(name, "").strip()
    if not re.fullmatch("[!-~]*", key):
        raise ValueError(f"{name}: blanks and characters outside ASCII cannot be sent")
    return key


def brief(fault):
    """A server's text or an exception as one line of at most 200 characters, without an API key."""
    text = str(getattr(fault, "reason", fault))
    for key in filter(None, map(api_key, ("OPENAI_API_KEY", "JUDGE_API_KEY"))):
        text = text.replace(key, "[key]")
    return " ".join(text.split())[:200]


def send(route, data, cfg):
    """GET BASE_URL/route, or POST JSON bytes to it; return (status, headers, text) whatever the status.

    Raises OSError, HTTPException or ValueError: no connection, one that breaks, or silence for cfg.timeout.
    """
    headers = {"Content-Type": "application/json", "User-Agent": "nanoVLR"}  # many refuse Python-urllib
    request = urllib.request.Request(f"{cfg.base_url.rstrip('/')}/{route}", data, headers)
    # The key is for this server, not for another one or where it may redirect to.
    if key := api_key("JUDGE_API_KEY" if cfg.engine == "judge" else "OPENAI_API_KEY"):
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    deadline, parts = time.monotonic() + cfg.timeout, []
    try:
        reply = urllib.request.urlopen(request, timeout=cfg.timeout)
    except urllib.error.HTTPError as e:
        reply = e
    with reply:
        while part := reply.read1():
            parts.append(part)
            if time.monotonic() > deadline:  # a busy server may send blanks to keep the connection open
                raise TimeoutError(f"no answer within {cfg.timeout:g} s")
    return reply.status, reply.headers, b"".join(parts).decode("utf-8", "replace")


def served_model(cfg):
    """Name of the first model that the server lists. Raises ValueError."""
    try:
        status, _, text = send("models", None, cfg)
    except (OSError, HTTPException, ValueError) as e:
        raise ValueError(f"--base_url {cfg.base_url}: {brief(e)}") from e
    try:
        return str(json.loads(text)["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as e:
        raise ValueError(f"--base_url {cfg.base_url}: HTTP {status} without a list of models, "
                         f"give --api_model or another URL: {brief(text)}") from e


def chat_request(record, model, cfg):
    """The JSON object that asks for a record's answer. Raises BadImage."""
    images = [load_image(image, cfg.max_pixels) for image in record["images"]]
    body = {"model": model, "messages": chat_messages(build_messages(record), images),
            "max_tokens": cfg.max_new_tokens, "temperature": cfg.temperature}
    # Some servers refuse fields that they do not know, so these go only where they matter.
    if cfg.top_p < 1:
        body["top_p"] = cfg.top_p
    if cfg.top_k:
        body["top_k"] = cfg.top_k
    return body


def read_completion(text):
    """The reply that a chat completion's JSON holds. Raises ValueError if it holds none."""
    try:
        completion = json.loads(text)
        choice = completion["choices"][0]
        response, truncated = choice["message"].get("content"), choice.get("finish_reason") == "length"
        tokens = (completion.get("usage") or {}).get("completion_tokens")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"not a chat completion: {brief(text)}") from e
    if response is None and truncated:  # a reasoning model that was cut while it still thought
        response = ""
    if not isinstance(response, str):
        raise ValueError(f"a chat completion without content: {brief(text)}")
    return {"response": response, "tokens": tokens if isinstance(tokens, int) else 0, "truncated": truncated}


def ask_server(body, cfg):
    """A server's reply to a request. Faults that may pass are retried; any other, or the last, is its error.

    The waits have full jitter: many requests that failed together must not come back together.
    """
    data, wait = json.dumps(body).encode(), 0.0
    for attempt in range(cfg.retries + 1):
        time.sleep(wait)
        wait = random.uniform(0, min(30, 2 ** attempt))
        try:
            status, headers, text = send("chat/completions", data, cfg)
            if status < 300:
                return read_completion(text)
            error, later = f"HTTP {status}: {brief(text)}", headers.get("Retry-After", "")
            if status < 500 and status not in (408, 409, 425, 429):
                break
            if later.isdecimal():
                wait = max(wait, min(60, int(later)))
        except (OSError, HTTPException, ValueError) as e:
            error = brief(e)
    return no_reply(error)


def ask_samples(record, model, cfg):
    """A server's replies to a record, as in answer_rows."""
    try:
        body = chat_request(record, model, cfg)
    except ValueError as e:
        return [no_reply(str(e))]
    replies = []
    for seed in row_seeds(record, cfg):
        replies.append(ask_server(body | ({"seed": seed} if cfg.temperature else {}), cfg))
        if "error" in replies[-1]:
            return replies[-1:]
    return replies


def in_parallel(ask, items, cfg):
    """Yield (item, ask(item)) as they are done, cfg.concurrency at a time."""
    pool = ThreadPoolExecutor(cfg.concurrency)
    asked = {pool.submit(ask, item): item for item in items}
    try:
        for future in as_completed(asked):
            yield asked[future], future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C must not have to wait for all other items


def model_names(cfg):
    """The models to evaluate, as their rows will name them. Raises ValueError."""
    if cfg.engine == "api":
        return list(cfg.api_model) or [served_model(cfg)]
    return [resolve_model(model) for model in cfg.model]


def open_engine(model, cfg):
    """A function records -> iterator of (record, replies). Raises ValueError or OSError."""
    if cfg.engine == "api":
        return lambda records: in_parallel(partial(ask_samples, model=model, cfg=cfg), records, cfg)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processor = AutoProcessor.from_pretrained(model)
    engine = build_engine(model, processor, cfg, device)
    return partial(answer_rows, engine=engine, processor=processor, cfg=cfg)


def eval_folder(model):
    """Where the results of a model go: into its own folder, or out/OWNER--NAME if it has none here."""
    own = Path("out", re.sub(r"[^\w.-]", "-", model.replace("/", "--")).strip("-."))
    return (Path(model) if Path(model).is_dir() else own) / "eval"


def write_rows(path, rows):
    """Replace a file of JSON lines: complete or not at all, answers can be expensive."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(unfinished, path)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n")


def answered(path, records, settings):
    """{id: row} of the records that BENCH.jsonl answers under the same settings, if they are unchanged."""
    lines = path.read_text().splitlines(True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]  # a killed run may leave half a line
    wanted = {(r["id"], r["question"], r.get("answer")) for r in records}
    return {row["id"]: row for row in rows if row["settings"] == settings and "error" not in row
            and (row["id"], row["question"], row["answer"]) in wanted}


def grade(response, record):
    """1.0 if a response is right, by the best of the answers that its benchmark accepts; None without any."""
    golds = [record.get("answer"), *record.get("meta", {}).get("accepted", [])]
    return max(accuracy(response, record | {"answer": gold}) for gold in golds) if golds[0] else None


def majority(samples, record):
    """The first of the samples whose answer most agree on, as the grader sees it; of equals the first."""
    groups = []
    for sample in samples:
        same = (group for group in groups
                if accuracy(sample["response"], record | {"answer": group[0]["extracted"]}))
        if group := next(same, None):
            group.append(sample)
        elif sample["extracted"]:
            groups.append([sample])
    return max(groups, key=len)[0] if groups else samples[0]


def graded(record, replies, settings):
    """The line of BENCH.jsonl for a record's replies: of several the majority's, and means over all."""
    samples = [reply | {"extracted": extract_answer(reply["response"]),
                        "correct": grade(reply["response"], record)} for reply in replies]
    best, gold = majority(samples, record), record.get("answer")
    scores = SCORES.get(record["answer_type"], {}) if gold else {}
    row = {"id": record["id"], "question": record["question"], "answer": gold, **best,
           "scores": {name: mean(score(reply["response"], record) for reply in replies)
                      for name, score in scores.items()}, "settings": settings}
    if settings["n"] > 1:
        keys = ("tokens", "truncated", "correct") if gold else ("tokens", "truncated")
        row |= {"samples": samples, **{key: mean(sample[key] for sample in samples) for key in keys}}
        row["scores"] |= {f"maj@{settings['n']}": best["correct"]} if gold else {}
    return row


def judge_server(cfg):
    """The configuration under which the judge is asked."""
    if cfg.judge_url in ("", cfg.base_url):
        return cfg
    return dataclasses.replace(cfg, engine="judge", base_url=cfg.judge_url)


def judged(pair, cfg):
    """A row with what the judge reads as its response's answer, graded by the rules, or with the error."""
    record, row = pair
    asked = build_prompt(record | {"task": "plain"})  # the options, but no order to work it out
    text = JUDGE.replace("{question}", asked).replace("{response}", row["response"][-8000:])
    turn = {"role": "user", "content": [{"type": "text", "text": text}]}
    reply = ask_server({"model": cfg.judge_model, "messages": [turn], "max_tokens": cfg.max_new_tokens,
                        "temperature": 0.0}, judge_server(cfg))
    if "error" in reply:
        return row | {"judge": {"error": reply["error"]}}
    said = extract_answer(reply["response"]) or ""
    return row | {"judge": {"model": cfg.judge_model, "extracted": said,
                            "correct": grade(f"<answer>{said}</answer>", record)}}


def run_bench(name, records, done, todo, fresh, path):
    """Add `fresh`, `todo` rows, to `done` {id: row}, each at once in the file too.

    Returns all rows in the records' order, in which the file then is.
    """
    write_rows(path, done.values())
    with (open(path, "a") as out,
          tqdm(total=len(records), initial=len(records) - todo, desc=name, dynamic_ncols=True) as bar):
        for row in fresh:
            done[row["id"]] = row
            out.write(json.dumps(row) + "\n")
            out.flush()
            bar.update()
    rows = [done[r["id"]] for r in records]
    write_rows(path, rows)
    return rows


def judge_bench(name, records, rows, path, cfg):
    """Have the judge read the wrong rows that it has not read yet; return all rows with its verdicts."""
    done = {row["id"]: row for row in rows}
    todo = [(record, row) for record, row in zip(records, rows) if row["response"] and row["correct"] == 0
            and row.get("judge", {}).get("model") != cfg.judge_model]
    fresh = (row for _, row in in_parallel(partial(judged, cfg=cfg), todo, cfg))
    rows = run_bench(f"{name}, judge", records, done, len(todo), fresh, path)
    return [row | {"correct": row.get("judge", {}).get("correct", row["correct"]),
                   "scores": row["scores"] | {"by the rules": row["correct"]}} for row in rows]


def score_of(rows):
    """n, accuracy, and the means of the further scores of those rows that have them."""
    names = dict.fromkeys(name for row in rows for name in row["scores"])
    each = {name: [row["scores"][name] for row in rows if name in row["scores"]] for name in names}
    return {"n": len(rows), "accuracy": round(sum(row["correct"] for row in rows) / len(rows), 4),
            "scores": {name: round(sum(values) / len(values), 4) for name, values in each.items()}}


def scores_by(field, records, rows):
    """{value: score_of its rows} for a field of the record or its meta; each item of a list is a value."""
    groups = {}
    for record, row in zip(records, rows):
        value = record.get(field, record.get("meta", {}).get(field))
        for item in value if isinstance(value, list) else [value]:
            groups.setdefault(str(item), []).append(row)
    return {value: score_of(groups[value]) for value in sorted(groups)}


def summarise(name, bench, records, rows, seconds):
    """One entry of summary.json: a benchmark's scores, whole and by each value of each field in bench.by."""
    n, whole = len(rows), score_of(rows)
    if bench.macro:
        each = [group["accuracy"] for group in scores_by(bench.macro, records, rows).values()]
        whole["accuracy"] = round(sum(each) / len(each), 4)
    return {"bench": name, **whole, "ci95": wilson(whole["accuracy"], n),
            "by": {field: scores_by(field, records, rows) for field in bench.by},
            "truncated": round(sum(row["truncated"] for row in rows) / n, 4),
            "parse_failed": round(sum(row["extracted"] is None for row in rows) / n, 4),
            "failed": sum("error" in row for row in rows),
            "tokens": round(sum(row["tokens"] for row in rows) / n, 1), "seconds": round(seconds, 1)}


def run_model(model, name, loaded, cfg):
    """Run benchmarks [(name, Bench, records)] with one model; return their summary and the failed rows.

    `name` is where its results go. The model is loaded only if a row lacks an answer.
    """
    folder = eval_folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    flags = ("max_new_tokens", "n", "temperature", "top_p", "top_k", "seed", "max_pixels", "task")
    shared = {"engine": cfg.engine, "model": model, **{name: getattr(cfg, name) for name in flags}}
    settings = [shared | {"data": bench.path} for _, bench, _ in loaded]
    done = [answered(folder / f"{key}.jsonl", records, own)
            for (key, _, records), own in zip(loaded, settings)]
    todo = [[r for r in records if r["id"] not in own] for own, (_, _, records) in zip(done, loaded)]
    answer, summary, failed = open_engine(model, cfg) if any(todo) else None, [], []
    for (key, bench, records), own, left, own_settings in zip(loaded, done, todo, settings):
        began, path = time.time(), folder / f"{key}.jsonl"
        fresh = (graded(record, replies, own_settings)
                 for record, replies in (answer(left) if left else ()))
        rows = run_bench(key, records, own, len(left), fresh, path)
        if cfg.judge == "api":
            rows = judge_bench(key, records, rows, path, cfg)
        compared = [(record, row) for record, row in zip(records, rows) if record.get("answer")]
        if compared:
            summary.append(summarise(key, bench, *zip(*compared), time.time() - began))
        if len(compared) < len(rows):
            print(f"{key}: {len(rows) - len(compared)} rows without a gold answer are answered in {path}")
        failed += [f"{key} {row['id']}: {error}" for row in rows
                   if (error := row.get("error") or row.get("judge", {}).get("error"))]
        write_json(folder / "summary.json", summary)
    return summary, failed


def with_averages(summary):
    """A summary and the averages in AVERAGES whose benchmarks it has, each with its rule in words."""
    by_name, out = {entry["bench"]: entry for entry in summary}, list(summary)
    for name, parts in AVERAGES.items():
        own = [by_name[part] for part in parts if part in by_name]
        if len(own) == len(parts):
            out.append({"bench": f"{name} average", "rule": f"mean of {', '.join(parts)}, each alike",
                        "n": sum(entry["n"] for entry in own), "by": {},
                        "accuracy": sum(entry["accuracy"] for entry in own) / len(own),
                        "scores": {key: sum(entry["scores"][key] for entry in own) / len(own)
                                   for key in own[0]["scores"]}})
    return out


def comparison(found):
    """Markdown lines for {model: with_averages(summary)}: a line per benchmark and group, a column per model.

    A cell is the accuracy in percent, and behind it the further scores.
    """
    def cell(entry):
        return " ".join([f"{100 * entry['accuracy']:.1f}",
                         *(f"({name} {100 * value:.1f})" for name, value in entry["scores"].items())])

    lines = [f"| benchmark | n | {' | '.join(found)} |", "|---|---|" + "---|" * len(found)]
    for entries in zip(*found.values()):
        first = entries[0]
        lines.append(f"| {first['bench']} | {first['n']} | {' | '.join(map(cell, entries))} |")
        for field, groups in first["by"].items():
            lines += [f"| {first['bench']}, {field} {value} | {group['n']} | "
                      + " | ".join(cell(entry["by"][field][value]) for entry in entries) + " |"
                      for value, group in groups.items()]
    rules = {entry["bench"]: entry["rule"] for entry in next(iter(found.values())) if "rule" in entry}
    return lines + ["", *(f"{name}: {rule}" for name, rule in rules.items())] if rules else lines


def details(summary):
    """Markdown lines on one model's run: intervals, and what the responses were like."""
    lines = ["| benchmark | 95 % interval | truncated | no answer | tokens | seconds |",
             "|---|---|---|---|---|---|"]
    return lines + [f"| {s['bench']} | {100 * s['ci95'][0]:.1f} - {100 * s['ci95'][1]:.1f} "
                    f"| {100 * s['truncated']:.1f} % | {100 * s['parse_failed']:.1f} % "
                    f"| {s['tokens']} | {s['seconds']} |" for s in summary]


def check(cfg):
    """Refuse flags that cannot work. Raises ValueError naming the flag."""
    if bool(cfg.image) != bool(cfg.prompt):
        raise ValueError("--image and --prompt go together")
    if cfg.task and cfg.task not in PROMPTS:
        raise ValueError(f"--task {cfg.task}: use {' | '.join(PROMPTS)}")
    if cfg.engine not in ("hf", "vllm", "api"):
        raise ValueError(f"--engine {cfg.engine}: use hf | vllm | api")
    if cfg.engine == "vllm" and not importlib.util.find_spec("vllm"):
        raise ValueError("--engine vllm: vLLM is not installed, see requirements-gpu.txt")
    for name, url in ("base_url", cfg.base_url), ("judge_url", cfg.judge_url or cfg.base_url):
        if not re.match("https?://[^/]", url):
            raise ValueError(f"--{name} {url}: must begin with http://HOST or https://HOST")
    for name, least in (("concurrency", 1), ("timeout", 0.001), ("retries", 0)):
        if not least <= getattr(cfg, name) <= 1e6:
            raise ValueError(f"--{name} {getattr(cfg, name)}: must be at least {least} and at most a million")
    for name in "OPENAI_API_KEY", "JUDGE_API_KEY":
        api_key(name)
    if cfg.n < 1 or cfg.n > 1 and not cfg.temperature:
        raise ValueError(f"--n {cfg.n}: " + ("must be at least 1" if cfg.n < 1 else
                         "at temperature 0 all samples are the same; give --temperature 0.6, say"))
    if cfg.judge not in ("off", "api"):
        raise ValueError(f"--judge {cfg.judge}: use off | api")
    if cfg.judge == "api" and cfg.n > 1:
        raise ValueError("--judge api: reads one response per row, so leave --n at 1")


def main(cfg):
    """Answer the one question, or run the benchmarks with every model and print their table."""
    disable_progress_bar()
    try:
        check(cfg)
        models = model_names(cfg)
        if cfg.image:
            record = {"id": "0", "question": cfg.prompt, "images": list(cfg.image), "answer_type": "text",
                      "task": cfg.task or "plain"}
            (_, replies), = open_engine(models[0], cfg)([record])
            for reply in replies:
                sys.exit(f"eval.py: {reply['error']}") if "error" in reply else print(reply["response"])
            return
        if cfg.judge == "api":
            cfg = dataclasses.replace(cfg, judge_model=cfg.judge_model or served_model(judge_server(cfg)))
        loaded = [(name, bench, read_records(bench.path, bench.split, need=()))
                  for name, bench in find_benches(cfg.bench)]
        for name, bench, records in loaded:
            if bench.size and len(records) != bench.size:
                print(f"{name}: {len(records)} rows, the official split has {bench.size}: "
                      "not comparable with published numbers")
        own_prompt = {"task": cfg.task} if cfg.task else {}
        loaded = [(name, bench, [record | own_prompt for record in records[:cfg.limit or None]])
                  for name, bench, records in loaded]
        found, failed = {}, []
        for model, name in zip(models, models if cfg.engine == "api" else cfg.model):
            found[model], lost = run_model(model, name, loaded, cfg)
            failed += [f"{model}: {line}" for line in lost] if len(models) > 1 else lost
    except (ValueError, OSError) as e:
        sys.exit(f"{Path(sys.argv[0]).name}: {str(e).strip().splitlines()[0]}")
    if any(found.values()):  # questions without a gold answer have no scores
        folder = eval_folder(name) if len(models) == 1 else Path("out/eval")
        table = {model: with_averages(summary) for model, summary in found.items()}
        judge = f", judge {cfg.judge_model}" if cfg.judge == "api" else ""
        lines = [f"{cfg.engine}, temperature {cfg.temperature:g}, at most {cfg.max_new_tokens} tokens{judge}",
                 "", *comparison(table)]
        for model, summary in found.items():
            lines += ["", model, "", *details(summary)]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.md").write_text("\n".join(lines) + "\n")
        write_json(folder / "table.json", table)
        print("", *lines, sep="\n")
    if failed:
        print(f"\n{len(failed)} failed, counted as wrong; the same command asks them again:", *failed[:10],
              *([f"and {len(failed) - 10} more"] if len(failed) > 10 else []), sep="\n")


if __name__ == "__main__":
    main(parse_config(Config))
