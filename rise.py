"""RISE: records with an annotation -> rationales from which it can be reconstructed, and SFT data from them.

RISE-CoT (arXiv 2508.13229) asks the policy twice. Hop 1 shows the image and its annotation and asks for a
rationale z that does not give the annotation away; what does is scrubbed. Hop 2 shows the image and the
scrubbed rationale and asks for the annotation. G rationales a record, one reconstruction of each:

    z_i ~ pi(. | image, problem with the annotation)       y_i ~ pi(. | image, scrub(z_i))
    r_i  = agreement(y_i) * (leak_penalty if z_i leaks, else 1) + format_weight * format(y_i)
    A_i  = (r_i - mean(r)) / (std(r) + 1e-4)               over the G rationales of a record
    loss = that of grpo.py with A_i on the tokens of z_i (--graded cot), of y_i (reconstruction), or of both,
           each behind its own prompt

`--phase annotate` is what comes then: sample G rationales a record, keep the best if its reconstruction
agrees to --tau and it does not leak, and write records of the task's own prompt, rationale and gold answer.
RISE-R1 is sft.py on those, then grpo.py with the task's reward.

What differs from the paper and its released code, and why:
  1. The released trainer samples the rationales without gradient and grades the reconstruction's tokens only:
     it learns to read rationales, not to write them (`--graded reconstruction`). The default credits the
     rationale's tokens with what could be reconstructed from them.
  2. A leak is looked for in the rationale as it was sampled. The released code looks at the scrubbed one:
     no decimal is left there, and boxes count only if the rationale is nothing but a list of numbers.
  3. A rationale that is cut at --max_new_tokens, or of which scrubbing leaves nothing, has reward 0 and is
     not exported. The released code has no rule for either.
  4. Both hops are sampled at the temperature at which they are scored; the released second hop samples at 0.7
     with a repetition penalty and scores without.
  5. Hop 2 sees the image, so a rationale may be reconstructed from pixels alone. With `--blind` it sees
     nothing but the rationale.
  6. Filter, threshold and export are in the abstract, not in the code: --tau is ours.
  7. The token mean, a reference only with --kl_beta, and the rest of the objective are those of grpo.py.

    python sft.py --data data/mini/mood_see.jsonl --steps 300 --out out/see    # mini suite, laptop
    python sft.py --model out/see --data data/mini/mood_talk.jsonl --steps 500 --out out/talk
    python rise.py                                               # out/talk -> out/rise
    python rise.py --phase annotate                              # out/rise -> out/annotate/sft.jsonl
    torchrun --nproc_per_node 8 rise.py --model Qwen/Qwen2-VL-2B-Instruct --data boxes.jsonl --engine vllm
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 rise.py ...
    python rise.py --resume                                      # from the newest complete step of --out

Shapes: B rows in a micro-batch, T padded length, H hidden size, V vocabulary, N response tokens, Q questions,
G rationales per question.
Tensors over tokens are (B, T-1), aligned to the predicted token: column t belongs to token t+1.
"""
import argparse
import dataclasses
import difflib
import functools
import http.client
import importlib.util
import inspect
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MethodType

import torch
import torch.distributed as dist
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_layers import GradientCheckpointingLayer

from data_prep import (build_messages, chat_messages, check_record, check_records, complete_rows, load_image,
                       newest_step, read_records, resolve_model, save_image, write_records)
from rewards import (REWARDS, accuracy, agreement, cot_prompt, extract_answer, format_think_answer,
                     gold_distribution, leaks, parse_boxes, parse_distribution, reconstruct_prompt, scrub)


@dataclass(frozen=True)
class Config:
    # i/o
    phase: str = "cot"  # cot (train the rationales) | annotate (sample, filter, export)
    model: str = ""  # Hub id, model folder or run directory, "" = out/talk, or out/rise to annotate
    data: str = "data/mini/mood_train.jsonl"  # records with an annotation; annotate: or a rationales.jsonl
    out: str = ""  # run directory, "" = out/rise, or out/annotate
    resume: bool = False  # go on from the newest complete step of --out
    strict: bool = False  # stop at an unreadable image instead of skipping its question
    seed: int = 0  # data order and sampling
    # rationales
    engine: str = "hf"  # hf (transformers) | vllm (in this process, on this GPU) | server (--servers)
    tp: int = 1  # ranks that share one vLLM engine (tensor parallel)
    gpu_memory_utilization: float = 0.5  # share of the GPU that vLLM may use while the trainer waits
    servers: tuple[str, ...] = ()  # base URLs of `vllm serve` processes, for --engine server
    prompts_per_step: int = 16  # questions per step, over all ranks
    group_size: int = 8  # rationales per question (G)
    max_prompt_tokens: int = 8192  # questions whose first hop is longer are skipped
    max_new_tokens: int = 72  # tokens of a rationale, and of a reconstruction, at most
    temperature: float = 1.0  # for sampling and for scoring alike
    top_p: float = 1.0  # nucleus sampling
    top_k: int = 0  # 0 = off
    rollout_tokens: int = 65536  # prompt and response tokens generated at once on a rank
    blind: bool = False  # hop 2 without the image
    leak_penalty: float = 0.1  # factor on the agreement of a rationale that leaks
    format_weight: float = 1.0  # weight of the reconstruction's format
    tau: float = 0.9  # annotate: agreement at least, for a rationale to be exported
    # objective
    graded: str = "cot"  # tokens that the reward credits: cot | reconstruction | both
    adv_std: bool = True  # divide advantages by the group's standard deviation
    clip_low: float = 0.2  # ratio clipped below 1 - clip_low
    clip_high: float = 0.28  # ratio clipped above 1 + clip_high
    kl_beta: float = 0.0  # weight of the k3 KL to the frozen start model, 0 = no reference model
    loss_mean: str = "token"  # token | sequence
    is_cap: float = 2.0  # cap of the importance weight trainer / sampler
    updates: int = 1  # optimizer updates per batch of rationales
    # optimisation
    steps: int = 20  # batches of rationales
    lr: float = 3e-4  # peak learning rate (2e-6 for Qwen2-VL-2B in the released scripts)
    warmup: int = 2  # steps of linear warm-up
    schedule: str = "constant"  # cosine | linear | constant
    lr_floor: float = 0.1  # final learning rate as a share of the peak (cosine, linear)
    weight_decay: float = 0.0  # AdamW
    max_grad_norm: float = 1.0  # gradient clipping
    token_budget: int = 16384  # padded tokens in a micro-batch
    # memory and model
    workers: int = 1  # processes that prepare images, per rank
    max_pixels: int = 1003520  # larger images are scaled down to this many pixels
    freeze_vision: bool = False  # train the language model only
    param_dtype: str = "fp32"  # weights and AdamW moments: fp32 | bf16
    gradient_checkpointing: bool = False  # redo activations in backward: less memory, a third more compute
    cpu_offload: bool = False  # keep weights and moments in host memory
    attn: str = "sdpa"  # attention kernel: sdpa | flash_attention_2 | eager
    # cadence
    eval_data: str = "data/mini/mood_id.jsonl"  # held-out records, "" = no evaluation
    eval_every: int = 4  # steps between evaluations
    eval_n: int = 200  # held-out questions used
    save_every: int = 20  # steps between checkpoints (one is always written at the end)
    keep: int = 2  # checkpoints kept


# ----- twins: setup (identical in sft.py, grpo.py, rise.py; tests/test_twins.py) ---------------------------

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


def init_distributed():
    """Join torchrun's process group, or make one of a single process. Returns (rank, world_size, device)."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the workers' fork
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    rank, world, local, neighbours = (int(os.environ.get(name, default)) for name, default in names.items())
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", local), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    else:
        # One core stays free for the process that prepares images:
        # OpenMP threads that spin on a busy core are 20x slower.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // neighbours - 1))
        device, backend = torch.device("cpu"), "gloo"
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group(backend, **alone)
    transformers.utils.logging.disable_progress_bar()
    return rank, world, device


def global_sum(values):
    """Add each number up over all ranks."""
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def global_max(value):
    """Largest of a number over all ranks."""
    most = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.item()


def load_policy(path, cfg, device, trainable=True):
    """Load an image-text-to-text model and its processor; shard it with FSDP2 (world size 1 included).

    Master weights are cfg.param_dtype (a frozen reference: bf16 on GPU), compute is bf16 on GPU. One layer at
    a time is cast and moved, so the GPU never holds an unsharded model.
    """
    policy = AutoModelForImageTextToText.from_pretrained(path, dtype="auto", attn_implementation=cfg.attn)
    processor = AutoProcessor.from_pretrained(path)
    vision = re.compile(r"(^|\.)(visual|vision_tower|vision_model)\.")
    for name, p in policy.named_parameters():
        p.requires_grad_(trainable and not (cfg.freeze_vision and vision.search(name)))
    if trainable and cfg.gradient_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy.train(trainable)
    on_gpu = device.type == "cuda"
    master = torch.bfloat16 if cfg.param_dtype == "bf16" or on_gpu and not trainable else torch.float32
    shard = functools.partial(
        fully_shard, mesh=dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),)),
        mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32) if on_gpu else MixedPrecisionPolicy(),
        offload_policy=CPUOffloadPolicy() if cfg.cpu_offload and on_gpu else OffloadPolicy())
    for block in [m for m in policy.modules() if isinstance(m, GradientCheckpointingLayer)] + [policy]:
        shard(block.to(master))
    policy.banned = vision_ids(policy.config, device)
    policy.token_logprobs = MethodType(token_logprobs, policy)
    register_fsdp_forward_method(policy, "token_logprobs")
    return policy, processor


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


def lr_at(step, cfg):
    """Learning rate of a step: linear warm-up, then cosine or linear decay to lr_floor * lr, or constant."""
    if step < cfg.warmup:
        return cfg.lr * step / cfg.warmup
    progress = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
    return cfg.lr * (cfg.lr_floor + (1 - cfg.lr_floor) * shape[cfg.schedule])


def make_optimizer(policy, cfg):
    """AdamW over the trained parameters; norms and biases (1-D) are not decayed."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": cfg.weight_decay},
              {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95))


def describe(policy, cfg, copies):
    """Parameters and an estimate of memory per rank; `copies` further models (reference, engine) are held.

    Activations: 34 bytes a token, layer and hidden unit in bf16, 2 with checkpointing (Korthikanti et al.,
    arXiv 2205.05198, without the attention matrix, which the kernels here do not keep).
    """
    total = sum(p.numel() for p in policy.parameters())
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    width = 2 if cfg.param_dtype == "bf16" else 4
    states = (total * width + trained * 3 * width) / dist.get_world_size()
    compute = 2 if policy.banned.device.type == "cuda" else 4  # bytes a number
    text = policy.config.get_text_config()
    activations = cfg.token_budget * text.num_hidden_layers * text.hidden_size * compute / 2
    activations *= 2 if cfg.gradient_checkpointing else 34
    vocab = policy.get_output_embeddings().weight.shape[0]
    return (f"{type(policy).__name__.removeprefix('FSDP')}: {total / 1e6:.1f}M parameters, "
            f"{trained / 1e6:.1f}M trained, vocabulary {vocab}\n"
            f"memory per rank: {states / 2**30:.2f} GiB weights, gradients and moments, "
            f"{copies * total * compute / 2**30:.2f} GiB model copies, about {activations / 2**30:.2f} GiB "
            f"activations at --token_budget {cfg.token_budget}")


# ----- twins: batches (identical in sft.py, grpo.py, rise.py) ----------------------------------------------


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


def schedule(total, per_step, done, steps, seed):
    """Record indices of steps done+1..steps: slices of endless seeded permutations, no index twice in a step.

    A function of the seed alone, so a resumed run needs no saved cursor.
    """
    epochs = (random.Random(f"{seed}/{epoch}").sample(range(total), total) for epoch in itertools.count())
    stream = itertools.islice(itertools.chain.from_iterable(epochs), done * per_step, None)
    return [list(dict.fromkeys(itertools.islice(stream, per_step))) for _ in range(done, steps)]


def prepared(batches, encode, workers):
    """Iterate over lists of record indices, as lists of (index, encode(index)) prepared ahead in processes.

    Processes, not threads: a processor call is mostly Python, and would hold the trainer's GIL. A record that
    cannot be encoded (an unreadable image, a stray placeholder token) comes back as (index, ValueError).
    """
    class Rows:
        def __getitem__(self, i):
            try:
                return i, encode(i)
            except ValueError as error:
                return i, error

    def end_with(trainer):  # if that is killed, a worker waits for ever to hand over its last batch
        while os.getppid() == trainer:
            time.sleep(1)
        os._exit(1)

    def watch(worker, trainer=os.getpid()):
        threading.Thread(target=end_with, args=(trainer,), daemon=True).start()

    return DataLoader(Rows(), batch_sampler=batches, num_workers=workers, collate_fn=list,
                      worker_init_fn=watch, multiprocessing_context="fork" if workers else None)


def micro_batches(lengths, budget):
    """Group row indices, long with long: rows x longest row <= budget tokens, equally many groups per rank.

    FSDP's collectives run per forward pass, so a rank with fewer groups gets empty ones (collate fills in the
    dummy).
    """
    groups = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups + [[]] * (int(global_max(len(groups))) - len(groups))


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


class ResponseLogprob(torch.autograd.Function):
    """log softmax(h W' / temperature)[target] at N positions; both passes hold logits a chunk at a time."""

    @staticmethod
    def chunks(hidden, weight, temperature, banned):
        size = max(1, 2**25 // weight.shape[0])  # 2^25 fp32 logits = 128 MiB
        for start in range(0, len(hidden), size):
            logits = (hidden[start:start + size] @ weight.T).float().div_(temperature)  # (n, V)
            logits[:, banned] = -torch.inf
            yield slice(start, start + size), logits

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, banned):
        ctx.save_for_backward(hidden, weight, targets, banned)
        ctx.temperature = temperature
        logps = torch.empty(len(hidden), device=hidden.device)  # (N,)
        for rows, logits in ResponseLogprob.chunks(hidden, weight, temperature, banned):
            logps[rows] = logits.gather(1, targets[rows, None])[:, 0] - logits.logsumexp(1)
        return logps

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, banned = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for rows, logits in ResponseLogprob.chunks(hidden, weight, ctx.temperature, banned):
            g = grad[rows, None] / ctx.temperature
            logits = logits.sub_(logits.logsumexp(1, keepdim=True)).exp_().mul_(-g)
            d_logits = logits.scatter_add_(1, targets[rows, None], g).to(weight.dtype)  # g (onehot - softmax)
            d_hidden[rows] = d_logits @ weight
            if d_weight is not None:
                d_weight.addmm_(d_logits.T, hidden[rows])
        return d_hidden, d_weight, None, None, None


def token_logprobs(policy, inputs, mask, temperature=1.0):
    """Log-probability of each response token under the policy, (B, T-1), 0 outside `mask`.

    The output head runs at response positions only and in chunks, so a (B, T, V) tensor never exists.
    """
    hidden = policy.model(**inputs).last_hidden_state[:, :-1]  # (B, T-1, H)
    targets = inputs["input_ids"][:, 1:][mask]  # (N,)
    head = policy.get_output_embeddings().weight  # (V, H)
    logps = ResponseLogprob.apply(hidden[mask], head, targets, temperature, policy.banned)
    return torch.zeros(mask.shape, device=logps.device).masked_scatter(mask, logps)


# ----- twins: rollouts (identical in grpo.py, rise.py; build_engine and generate also in eval.py) ----------


@dataclass
class Rollout:
    """One response from sampling to loss. Images stay with the dataset: `question` is an index."""
    question: int
    response: list[int]  # token ids, with the stop token unless truncated
    sampler_logps: torch.Tensor  # (len(response),) under the engine as it sampled, nan for forced tokens
    truncated: bool
    text: str
    reward: float = 0.0
    advantage: float = 0.0
    old_logps: torch.Tensor | None = None  # (len(response),) under the trainer, before this batch's updates
    ref_logps: torch.Tensor | None = None
    trigger: tuple[int, int] | None = None  # the forced tokens response[start:stop], if any
    rewound: int = 0  # tokens of its first ending that were dropped before the trigger


def rollout_seed(cfg, step, question, sample):
    """The random stream of one rollout, independent of rank and batch."""
    return random.Random(f"{cfg.seed}/{step}/{question}/{sample}").getrandbits(62)


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


@torch.no_grad()
def sync_weights(policy, engine):
    """Hand the trained weights to the engine, one full tensor at a time, and forget what it cached.

    Frozen weights are where they were, unless the engine slept: that dropped them all.
    """
    policy.reshard()  # a forward without backward leaves the root's parameters gathered, in compute dtype
    moved = ((name, p.detach().to(engine.dtype)) for name, p in policy.named_parameters()
             if p.requires_grad or engine.asleep)
    full = ((name, p.full_tensor() if isinstance(p, DTensor) else p) for name, p in moved)
    if isinstance(engine, torch.nn.Module):
        target = dict(engine.named_parameters())
        for name, weight in full:
            target[name].copy_(weight)
        return
    # Other engines know parameters by the names that checkpoints of the family use.
    named = (pair for name, weight in full
             for pair in revert_weight_conversion(policy, {name: weight}).items())
    if isinstance(engine, Server):
        return engine.reload(named)
    if engine.asleep:
        torch.cuda.empty_cache()  # waking up needs what the trainer's allocator keeps
        engine.llm.wake_up(["weights"])
    engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named})
    engine.llm.apply_model(repack_heads)
    if engine.asleep:
        engine.llm.wake_up(["kv_cache"])
        engine.asleep = False
    engine.llm.reset_prefix_cache()
    engine.llm.reset_mm_cache()
    engine.llm.llm_engine.reset_encoder_cache()


def repack_heads(model):
    """On CPU vLLM keeps a packed copy of the output head; reloading tied embeddings leaves it behind."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def sleep_engine(engine):
    """Lend vLLM's GPU memory to the trainer until sync_weights: level 2 drops weights and KV cache."""
    if isinstance(engine, VLLM) and torch.cuda.is_available():
        engine.llm.sleep(level=2)
        engine.asleep = True


class Server:
    """vLLM servers on other GPUs or nodes: rollouts over HTTP, weights through a folder that all can read.

    Each is started with the --model of this run by
        VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --generation-config vllm --logprobs-mode processed_logprobs
    Rank r asks server r modulo their number.
    """

    def __init__(self, path, processor, cfg):
        self.urls, self.folder, self.asleep = cfg.servers, Path(cfg.out).resolve() / "weights", False
        self.url = cfg.servers[dist.get_rank() % len(cfg.servers)]
        self.name = self.call(self.url, "/v1/models")["data"][0]["id"]
        self.dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        self.stop = stop_ids(transformers.GenerationConfig.from_pretrained(path), processor)
        self.banned = vision_ids(transformers.AutoConfig.from_pretrained(path), "cpu")

    def call(self, url, route, body=None):
        """POST (or GET) JSON; a server that fails or is gone ends the run."""
        request = urllib.request.Request(url.rstrip("/") + route, None if body is None else
                                         json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=3600) as reply:
                return json.loads(reply.read() or "null")
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = error.read()[:300].decode(errors="replace") if hasattr(error, "read") else ""
            sys.exit(f"{Path(sys.argv[0]).name}: rollout server {url}{route}: {error} {reason}")

    def sample(self, asked):
        """As VLLM.sample; all prompts are sent at once, the server queues them."""
        def ask(pair):
            prompt, options = pair
            messages = chat_messages(prompt["request"]["messages"], prompt["request"]["images"])
            reply = self.call(self.url, "/v1/chat/completions", {
                **options, "model": self.name, "messages": messages, "logprobs": True,
                "return_token_ids": True})
            return reply["prompt_token_ids"], [
                (c["token_ids"], torch.tensor([t["logprob"] for t in c["logprobs"]["content"]]),
                 c["finish_reason"] == "length") for c in reply["choices"]]
        with ThreadPoolExecutor(256) as pool:
            return list(pool.map(ask, asked))

    def reload(self, weights):
        """Write (name, tensor) pairs as safetensors of about 4 GiB and have every server load them."""
        writer, shard, files = dist.get_rank() == 0, {}, itertools.count()
        if writer:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
        for name, weight in itertools.chain(weights, [(None, None)]):
            if writer and (name is None or sum(w.nbytes for w in shard.values()) > 2**32):
                save_file(shard, self.folder / f"{next(files):05d}.safetensors")
                shard = {}
            if writer and name:  # all ranks take part in gathering, one keeps the result
                shard[name] = weight.cpu()
        if writer:
            path = {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder)}}
            for route, body in [("collective_rpc", path), ("reset_prefix_cache", {}), ("reset_mm_cache", {}),
                                ("reset_encoder_cache", {})]:
                for url in self.urls:
                    self.call(url, f"/{route}", body)
        dist.barrier()


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


# ----- twins: objective (identical in grpo.py, rise.py) ----------------------------------------------------


def all_logprobs(policy, rollouts, prompts, dummy, cfg):
    """Trainer-side log-probabilities of each rollout, without gradient: CPU tensors (len(response),)."""
    out, device = [None] * len(rollouts), policy.banned.device
    lengths = [prompts[r.question]["input_ids"].shape[1] + len(r.response) for r in rollouts]
    with torch.no_grad():
        for group in micro_batches(lengths, cfg.token_budget):
            rows = [(prompts[rollouts[i].question], rollouts[i].response) for i in group]
            inputs, mask = collate(rows, dummy, 0, device)
            logps = policy.token_logprobs(inputs, mask, cfg.temperature)
            for i, row in zip(group, logps[mask].cpu().split([len(rollouts[i].response) for i in group])):
                out[i] = row
    return out


def group_advantages(rewards, std=True, eps=1e-4):
    """(Q, G) rewards -> advantages r - mean, over the sample std + eps if `std`; equal rewards give 0."""
    centred = rewards - rewards.mean(1, keepdim=True)
    same = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return torch.where(same, 0.0, centred / (rewards.std(1, keepdim=True) + eps) if std else centred)


def grpo_loss(logps, old_logps, sampler_logps, ref_logps, advantages, weights, cfg):
    """The clipped objective of the module docstring. Tensors (B, T-1); `weights` are 0 outside the response.

    Returns the loss (a sum, since the weights carry the global denominator) and weighted sums for the log.
    ref_logps may be None when cfg.kl_beta = 0. KL estimator: Schulman's k3, exp(d) - d - 1, d = ref - policy.
    """
    ratio = (logps - old_logps).exp()
    correction = (old_logps - sampler_logps).exp().clamp(max=cfg.is_cap)
    clipped = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    loss = -(weights * correction * surrogate).sum()
    stats = {"loss/policy": loss.detach(),
             "loss/clip_low": (weights * ((ratio < 1 - cfg.clip_low) & (advantages < 0))).sum(),
             "loss/clip_high": (weights * ((ratio > 1 + cfg.clip_high) & (advantages > 0))).sum()}
    if cfg.kl_beta:
        gap = ref_logps - logps
        kl = (weights * (gap.exp() - gap - 1)).sum()
        loss, stats["loss/kl"] = loss + cfg.kl_beta * kl, kl.detach()
    return loss, stats


# ----- twins: persistence (identical in sft.py, grpo.py, rise.py) ------------------------------------------


def save_checkpoint(cfg, step, policy, processor, optimizer, extra=None):
    """Write out/step_000200, complete or not at all: HF weights and processor, one trainer file per rank.

    `extra` is what else this rank needs to go on, of plain containers and tensors.

    Everything goes to step_000200.tmp, is fsynced and renamed; only then are checkpoints beyond cfg.keep
    removed. With several nodes --out must be on a file system they share. On a full disk it raises OSError
    and earlier checkpoints stay as they are.
    """
    policy.reshard()  # a forward without backward leaves the root's parameters gathered, in compute dtype
    final = Path(cfg.out) / f"step_{step:06d}"
    tmp, rank = final.with_suffix(".tmp"), dist.get_rank()
    if rank == 0:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir()
    dist.barrier()
    weights = {}
    for name, p in policy.named_parameters():
        full = p.detach().full_tensor() if isinstance(p, DTensor) else p.detach()
        if rank == 0:  # all ranks take part in gathering, one keeps the result
            weights[name] = full.cpu()
    if rank == 0:
        policy.save_pretrained(tmp, state_dict=weights)
        processor.save_pretrained(tmp)
        (tmp / "meta.json").write_text(json.dumps({"step": step, "world_size": dist.get_world_size()}))
    moments = {name: {k: v.to_local() if isinstance(v, DTensor) else v for k, v in optimizer.state[p].items()}
               for name, p in policy.named_parameters() if p in optimizer.state}
    torch.save({"optimizer": moments, "rng": torch.get_rng_state(), "extra": extra},
               tmp / f"trainer_rank{rank}.pt")
    dist.barrier()
    if rank == 0:
        for path in [*tmp.iterdir(), tmp]:
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        tmp.rename(final)
        for old in sorted(Path(cfg.out).glob("step_??????"))[:-cfg.keep]:
            shutil.rmtree(old)
    dist.barrier()


def load_checkpoint(path, policy, optimizer):
    """Restore save_checkpoint's optimizer moments and RNG (weights came with load_policy).

    Returns (step, extra). Raises ValueError when the run was saved with another number of ranks.
    """
    meta = json.loads((path / "meta.json").read_text())
    if meta["world_size"] != dist.get_world_size():
        raise ValueError(f"{path} was saved by {meta['world_size']} rank(s), "
                         f"this run has {dist.get_world_size()}")
    state = torch.load(path / f"trainer_rank{dist.get_rank()}.pt", weights_only=True)
    for name, p in policy.named_parameters():
        for key, value in state["optimizer"].get(name, {}).items():
            if isinstance(p, DTensor) and key != "step":
                value = DTensor.from_local(value.to(p.device), p.device_mesh, p.placements,
                                           shape=p.shape, stride=p.stride())
            optimizer.state[p][key] = value
    torch.set_rng_state(state["rng"])
    return meta["step"], state["extra"]


class RunLog:
    """Writes config.json, the JSON lines of a run and the progress bar, on rank 0.

    A new run moves an existing directory aside; a resumed one drops the lines written after its checkpoint.
    """

    def __init__(self, cfg, start=0):
        self.out, self.rank, self.began = Path(cfg.out), dist.get_rank(), time.time()
        if self.rank == 0:
            if self.out.exists() and not cfg.resume:
                olds = (self.out.with_name(f"{self.out.name}.old{i}") for i in itertools.count(1))
                aside = next(path for path in olds if not path.exists())
                self.out.rename(aside)
                print(f"{self.out} existed: moved to {aside}")
            self.out.mkdir(parents=True, exist_ok=True)
            written = ("metrics.jsonl", "samples.jsonl", "rationales.jsonl")
            for path in filter(Path.exists, map(self.out.joinpath, written)):
                lines = path.read_text().splitlines(True)
                kept = [x for x in lines if start and x.endswith("\n") and json.loads(x)["step"] <= start]
                path.write_text("".join(kept))
            git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent,
                                 capture_output=True, text=True)
            (self.out / "config.json").write_text(json.dumps({
                "config": dataclasses.asdict(cfg), "argv": sys.argv, "git": git.stdout.strip(),
                "world_size": dist.get_world_size(),
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            }, indent=1))
        # Piped into a file, a line every ten seconds is enough.
        self.bar = tqdm(total=cfg.steps, initial=start, disable=self.rank > 0, dynamic_ncols=True,
                        mininterval=0.2 if sys.stderr.isatty() else 10)
        dist.barrier()

    def note(self, text):
        if self.rank == 0:
            self.bar.write(text)

    def fail(self, text):
        self.bar.close()
        sys.exit(f"{Path(sys.argv[0]).name}: {text}")

    def write(self, name, rows):
        if self.rank == 0:
            with open(self.out / name, "a") as f:
                f.writelines(json.dumps(row) + "\n" for row in rows)

    def step(self, step, metrics, shown):
        self.write("metrics.jsonl", [{"step": step, **metrics}])
        self.bar.set_postfix({k: f"{metrics[k]:.3g}" for k in shown if k in metrics}, refresh=False)
        self.bar.update()


# ----- this stage ------------------------------------------------------------------------------------------


def hop(record, question, images):
    """Another question about a record, already in full: the task's own prompt must not wrap it."""
    question = question if images else question.replace("<image>", "")
    return {"question": question, "images": images, "answer_type": record["answer_type"], "task": "plain"}


def encode_cot(record, processor, cfg):
    """encode_prompt of hop 1. Raises ValueError beyond --max_prompt_tokens: no prompt is ever cut."""
    prompt = encode_prompt(hop(record, cot_prompt(record), record["images"]), processor, cfg.max_pixels)
    if (length := prompt["input_ids"].shape[1]) > cfg.max_prompt_tokens:
        raise ValueError(f"its prompt has {length} tokens, --max_prompt_tokens is {cfg.max_prompt_tokens}")
    return prompt


def readable(drawn, records, log, cfg):
    """{question: prompt} of what could be encoded; the rest is named, or ends the run with --strict."""
    prompts = {q: prompt for q, prompt in drawn if not isinstance(prompt, ValueError)}
    for q, error in drawn:
        if q not in prompts:
            if cfg.strict:
                log.fail(error)
            log.note(f"question {records[q]['id']} skipped: {error}")
    return prompts


def sample(engine, keys, prompts, seeds, tokenizer, cfg):
    """One rollout for each key of `prompts`."""
    samples = generate(engine, [prompts[key] for key in keys], seeds, cfg)
    texts = tokenizer.batch_decode([ids for ids, _, _ in samples], skip_special_tokens=True)
    return [Rollout(key, *drawn, text) for key, drawn, text in zip(keys, samples, texts)]


def two_hops(engine, prompts, records, processor, step, cfg):
    """G rationales a question and a reconstruction from each: (rationales, scrubbed texts, reconstructions).

    Three lists of Q * G, those of a question side by side. `prompts` {question: hop 1} gains the prompts of
    hop 2 under (question, sample), which is the `question` of a reconstruction's rollout.
    """
    asked = [(q, g) for q in prompts for g in range(cfg.group_size)]
    tokenizer, seed = processor.tokenizer, functools.partial(rollout_seed, cfg, step)
    cots = sample(engine, [q for q, _ in asked], prompts, [seed(q, g) for q, g in asked], tokenizer, cfg)
    # A placeholder that the policy spelled out would be read as an image.
    special = [re.escape(t.content) for t in tokenizer.added_tokens_decoder.values() if t.special]
    texts = [re.sub("|".join(special) or "(?!)", " ", scrub(cot.text, records[cot.question])) for cot in cots]
    for (q, g), text in zip(asked, texts):
        images = [] if cfg.blind else prompts[q]["request"]["images"]
        second = hop(records[q], reconstruct_prompt(records[q], text), images)
        prompts[q, g] = encode_prompt(second, processor, cfg.max_pixels)
    seeds = [seed(q, f"{g}/reconstruction") for q, g in asked]
    return cots, texts, sample(engine, asked, prompts, seeds, tokenizer, cfg)


def scored(cots, texts, backs, records, cfg):
    """[(question, sample, parts of the reward)] of what two_hops returns."""
    return [(*back.question, score(cot, text, back, records[cot.question], cfg))
            for cot, text, back in zip(cots, texts, backs)]


def score(cot, text, back, record, cfg):
    """The reward of a rationale and what it is made of, as rationales.jsonl has them."""
    whole, said = f"<think> {text} </think> {back.text}", leaks(cot.text, record)
    agrees, form = agreement(whole, record), REWARDS[format_name(record)](whole, record)
    worth = agrees * (cfg.leak_penalty if said else 1) + cfg.format_weight * form
    return {"cot": cot.text, "rationale": text, "reconstruction": back.text,
            "reward": worth if text.strip() and not cot.truncated else 0.0,
            "agreement": agrees, "format": form, "leaks": said, "parsed": is_parsed(whole, record),
            "truncated": cot.truncated, "tokens": len(cot.response)}


def format_name(record):
    """The format reward of a record: probabilities must add up, a single box must be flat."""
    kinds = {"distribution": "distribution_format", "ground": "grounding_format"}
    return kinds.get(record.get("task")) or kinds.get(record["answer_type"], "format")


def is_parsed(response, record):
    """Whether an answer could be read, right or wrong."""
    if record["answer_type"] == "boxes":
        return bool(parse_boxes(response))
    if record["answer_type"] == "distribution":
        return parse_distribution(response, gold_distribution(record)) is not None
    return extract_answer(response) is not None


def gathered(rows, questions):
    """All ranks' (question, sample, parts), in the order of `questions`. Collective."""
    shares, place = [None] * dist.get_world_size(), {q: j for j, q in enumerate(questions)}
    dist.all_gather_object(shares, rows)
    return sorted(itertools.chain(*shares), key=lambda row: (place[row[0]], row[1]))


def write_rationales(log, step, rows, records):
    """Append the step's rationales to rationales.jsonl with the records they are about, images as paths."""
    def path(ref):
        return ref if isinstance(ref, str) else str((log.out / save_image(ref, log.out)).resolve())

    if log.rank == 0:
        kept = {q: {k: v for k, v in records[q].items() if k != "response"} for q, *_ in rows}
        kept = {q: record | {"images": [path(ref) for ref in record["images"]]} for q, record in kept.items()}
        log.write("rationales.jsonl", [{"step": step, "sample": g, **parts, "record": kept[q]}
                                       for q, g, parts in rows])


def update(policy, optimizer, rollouts, denominator, prompts, dummy, cfg):
    """One optimizer step on this rank's rollouts, of either hop.

    denominator: the global count of tokens (or rollouts) in the policy loss. Fills in missing old_logps: this
    very policy sampled those rollouts.
    """
    device, stats = policy.banned.device, {}
    lengths = [prompts[r.question]["input_ids"].shape[1] + len(r.response) for r in rollouts]
    for group in micro_batches(lengths, cfg.token_budget):
        rows = [rollouts[i] for i in group]
        inputs, mask = collate([(prompts[r.question], r.response) for r in rows], dummy, 0, device)

        def spread(parts):  # one value a response token -> (B, T-1)
            values = torch.cat([*parts, torch.zeros(0)]).to(device)
            return torch.zeros(mask.shape, device=device).masked_scatter(mask, values)

        logps = policy.token_logprobs(inputs, mask, cfg.temperature)
        for r, own in zip(rows, logps.detach()[mask].cpu().split([len(r.response) for r in rows])):
            r.old_logps = own if r.old_logps is None else r.old_logps
        old = spread([r.old_logps for r in rows])
        sampler = spread([r.sampler_logps for r in rows])
        reference = spread([r.ref_logps for r in rows]) if cfg.kl_beta else None
        advantages = spread([torch.full((len(r.response),), r.advantage) for r in rows])
        ones = [torch.ones(len(r.response)) for r in rows]
        weights = spread([one / (denominator if cfg.loss_mean == "token" else denominator * len(one))
                          for one in ones])
        loss, extra = grpo_loss(logps, old, sampler, reference, advantages, weights, cfg)
        # FSDP averages gradients over ranks; the weights already sum to 1 over all ranks together.
        (loss * dist.get_world_size()).backward()
        gap = (old - sampler)[mask].abs()
        for k, v in {**extra, "gap": gap.sum(), "tokens": mask.sum()}.items():
            stats[k] = stats.get(k, 0.0) + v.item()
        stats["gap_max"] = max([stats.get("gap_max", 0.0), *gap.tolist()])
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
    stats["norm"] = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    if math.isfinite(stats["norm"]):
        optimizer.step()
    optimizer.zero_grad()
    return stats


def quality(rows):
    """Means over the rationales of all ranks, of which there may be none."""
    parts, n = [parts for *_, parts in rows], max(1, len(rows))
    return {"reward/mean": sum(p["reward"] for p in parts) / n,
            "reward/agreement": sum(p["agreement"] for p in parts) / n,
            "reward/format": sum(p["format"] for p in parts) / n,
            "cot/leaks": sum(bool(p["leaks"]) for p in parts) / n,
            "cot/empty": sum(not p["rationale"].strip() for p in parts) / n,
            "reconstruction/parsed": sum(p["parsed"] for p in parts) / n,
            "len/mean": sum(p["tokens"] for p in parts) / n,
            "len/truncated": sum(p["truncated"] for p in parts) / n}


def step_metrics(rows, rollouts, trained, totals, cfg):
    """The step's numbers over all ranks: `rows` are of all, rollouts and totals of this one."""
    rewards = torch.tensor([parts["reward"] for *_, parts in rows]).view(-1, cfg.group_size)  # (Q, G)
    metrics = {**quality(rows), "reward/std": rewards.std(1).mean().nan_to_num().item(),
               "groups/effective_frac": (rewards != rewards[:, :1]).any(1).float().mean().nan_to_num().item()}
    metrics["groups/zero_adv_frac"] = 1 - metrics["groups/effective_frac"]
    keys = ["loss/policy", "loss/clip_low", "loss/clip_high", "loss/kl"]
    metrics |= dict(zip(keys, global_sum([sum(t.get(k, 0.0) for t in totals) / cfg.updates for k in keys])))
    gap, tokens, metrics["tokens/gen"], metrics["tokens/train"] = global_sum(
        [sum(t["gap"] for t in totals), sum(t["tokens"] for t in totals),
         sum(len(r.response) for r in rollouts),
         sum(len(r.response) for r in trained)])
    metrics["mismatch/mean"] = gap / max(1, tokens)
    metrics["mismatch/max"] = global_max(max((t["gap_max"] for t in totals), default=0.0))
    metrics["optim/grad_norm"] = totals[-1]["norm"] if totals else 0.0
    return metrics


def evaluate(engine, records, processor, cfg):
    """Both hops once on held-out records, sharded over ranks: agreement, leaks and length.

    Sampled as in training, since it is samples that --phase annotate keeps.
    """
    share = [list(range(dist.get_rank(), len(records), dist.get_world_size()))]
    encode = functools.partial(encode_cot, processor=processor, cfg=cfg)
    drawn = [pair for batch in prepared(share, lambda i: encode(records[i]), cfg.workers) for pair in batch]
    prompts = {i: prompt for i, prompt in drawn if not isinstance(prompt, ValueError)}  # the rest counts as 0
    once = dataclasses.replace(cfg, group_size=1)
    rows = scored(*two_hops(engine, prompts, records, processor, 0, once), records, cfg)
    parts = [parts for *_, parts in rows]
    agrees, leaky, length, n = global_sum(
        [sum(p["agreement"] for p in parts), sum(bool(p["leaks"]) for p in parts),
         sum(p["tokens"] for p in parts), len(drawn)])
    return {"eval/agreement": agrees / n, "eval/leaks": leaky / n, "eval/len": length / n}


# ----- annotate: filter and export


def read_rationales(path):
    """Lines of a rationales.jsonl; a last one that was cut off is left out. Raises ValueError."""
    rows = complete_rows(path)
    for number, row in enumerate(rows, 1):
        missing = {"record", "rationale", "reward", "agreement", "leaks", "truncated"} - row.keys()
        if missing:
            raise ValueError(f"{path} line {number}: no {sorted(missing)[0]!r}; is it from rise.py?")
        check_record(row["record"], f"{path} line {number}")
    return rows


def sft_response(row):
    """What SFT learns: the rationale, then the gold annotation, not the reconstruction."""
    return f"<think> {row['rationale']} </think> <answer> {row['record']['answer']} </answer>"


def refusal(row, tau):
    """Why a rationale is not worth learning, "" if it is."""
    if row["leaks"]:
        return "leak"
    if row["truncated"] or not row["rationale"].strip():
        return "cut off or empty"
    if row["agreement"] < tau:
        return f"below --tau {tau}"
    told = sft_response(row), row["record"]
    return "" if accuracy(*told) == format_think_answer(*told) == 1 else "unreadable as a response"


def best_of(rows, tau):
    """SFT records of each record's best rationale, and a count of what was left out and why.

    Best by reward, then agreement, then the shorter rationale, then the first in the file.
    """
    best, reasons = {}, Counter()
    for row in rows:
        reason, name = refusal(row, tau), row["record"]["id"]
        reasons[reason] += 1
        rank = (row["reward"], row["agreement"], -len(row["rationale"]))
        if not reason and (name not in best or rank > best[name][0]):
            best[name] = rank, row
    reasons["not the best"] = reasons.pop("", 0) - len(best)
    return [row["record"] | {"response": sft_response(row)} for _, row in best.values()], reasons


def annotate(cfg, rank, world, device):
    """Sample G rationales of every record, then write the best ones as SFT records, to OUT/sft.jsonl.

    A --data named rationales.jsonl has been sampled already, perhaps in training, and is filtered only.
    """
    source = Path(cfg.data)
    if source.name != "rationales.jsonl":
        records, first = read_records(cfg.data), resolve_model(cfg.model)
        cfg = dataclasses.replace(cfg, steps=math.ceil(len(records) / cfg.prompts_per_step))
        source, processor = Path(cfg.out) / "rationales.jsonl", AutoProcessor.from_pretrained(first)
        engine = (Server(first, processor, cfg) if cfg.engine == "server"
                  else build_engine(first, processor, cfg, device))
        begun = read_rationales(source) if rank == 0 and cfg.resume else []
        # The last step may have been cut short.
        done = int(global_max(begun[-1]["step"] - 1 if begun else 0))
        log = RunLog(cfg, done)
        plan = [range(len(records))[i:i + cfg.prompts_per_step]
                for i in range(done * cfg.prompts_per_step, len(records), cfg.prompts_per_step)]
        share = prepared([[*drawn[rank::world]] for drawn in plan],
                         lambda i: encode_cot(records[i], processor, cfg), cfg.workers)
        for step, questions, drawn in zip(itertools.count(done + 1), plan, share):
            prompts = readable(drawn, records, log, cfg)
            rows = scored(*two_hops(engine, prompts, records, processor, step, cfg), records, cfg)
            rows = gathered(rows, questions)
            write_rationales(log, step, rows, records)
            log.step(step, quality(rows), ("reward/mean", "reward/agreement", "cot/leaks"))
        log.bar.close()
    if rank == 0:
        rows = read_rationales(source)
        kept, reasons = best_of(rows, cfg.tau)
        counts = (f"{len(kept)} of {len({row['record']['id'] for row in rows})} records; left out of "
                  f"{len(rows)} rationales: {', '.join(f'{n} {why}' for why, n in sorted(reasons.items()))}")
        path = Path(cfg.out) / "sft.jsonl"
        write_records(path, check_records(kept, f"{source} ({counts})", need=("answer", "response")))
        print(f"{path}: {counts}")
    if cfg.engine != "vllm":  # vLLM takes the process group down itself when Python exits
        dist.destroy_process_group()


def check(cfg):
    """Refuse what cannot work. Raises ValueError naming the flag."""
    for flag, allowed in (("phase", ("cot", "annotate")), ("graded", ("cot", "reconstruction", "both")),
                          ("engine", ("hf", "vllm", "server")), ("loss_mean", ("token", "sequence")),
                          ("schedule", ("cosine", "linear", "constant")),
                          ("param_dtype", ("fp32", "bf16"))):
        if getattr(cfg, flag) not in allowed:
            raise ValueError(f"--{flag} {getattr(cfg, flag)}: use {' | '.join(allowed)}")
    for flag in ("steps", "prompts_per_step", "group_size", "max_prompt_tokens", "max_new_tokens",
                 "rollout_tokens", "updates", "tp", "token_budget", "eval_every", "eval_n", "save_every",
                 "keep"):
        if getattr(cfg, flag) < 1:
            raise ValueError(f"--{flag} must be at least 1")
    if cfg.phase == "cot" and cfg.group_size < 2:
        raise ValueError("--group_size must be at least 2: the advantage compares the rationales of a group")
    if not 0 <= cfg.tau <= 1:
        raise ValueError(f"--tau {cfg.tau}: agreement lies between 0 and 1")
    if cfg.engine == "vllm" and not importlib.util.find_spec("vllm"):
        raise ValueError("--engine vllm: vLLM is not installed, see requirements-gpu.txt")
    if (cfg.engine == "server") != bool(cfg.servers):
        raise ValueError("--engine server and --servers URL... go together")
    if cfg.tp > 1 and (cfg.engine != "vllm" or dist.get_world_size() % cfg.tp):
        raise ValueError(f"--tp {cfg.tp} needs --engine vllm and a multiple of {cfg.tp} ranks")
    if not 0 < cfg.gpu_memory_utilization <= 1:
        raise ValueError("--gpu_memory_utilization is a share, above 0 and at most 1")
    if cfg.temperature <= 0:
        raise ValueError("--temperature must be above 0: greedy rationales of a group are all the same")


def main(cfg):
    """Train, or annotate. A training step has ten beats, numbered below."""
    rank, world, device = init_distributed()
    try:
        check(cfg)
        usual = {"cot": ("out/talk", "out/rise"), "annotate": ("out/rise", "out/annotate")}[cfg.phase]
        cfg = dataclasses.replace(cfg, model=cfg.model or usual[0], out=cfg.out or usual[1])
        # The default held-out file belongs to the default data.
        eval_data = cfg.eval_data if cfg.data == Config.data or cfg.eval_data != Config.eval_data else ""
        start = newest_step(cfg.out) if cfg.resume else None
        if cfg.phase == "annotate":
            return annotate(cfg, rank, world, device)
        first = resolve_model(cfg.model)
        origin = Path(first).resolve()
        if not cfg.resume and Path(cfg.out).resolve() in [origin, *origin.parents]:
            raise ValueError(f"--out {cfg.out} holds the model to start from: "
                             "name another --out, or --resume")
        records = read_records(cfg.data, need=("answer",))
        held_out = read_records(eval_data, limit=cfg.eval_n) if eval_data else []
        policy, processor = load_policy(start or first, cfg, device)
        optimizer = make_optimizer(policy, cfg)
        done = load_checkpoint(start, policy, optimizer)[0] if start else 0
        engine = (Server(first, processor, cfg) if cfg.engine == "server"
                  else build_engine(first, processor, cfg, device))
        log = RunLog(cfg, done)
    except (ValueError, OSError) as e:
        sys.exit(f"{Path(sys.argv[0]).name}: {str(e).strip().splitlines()[0]}")
    reference = load_policy(first, cfg, device, trainable=False)[0] if cfg.kl_beta else None
    sync_weights(policy, engine)
    blank = {"question": "", "images": [Image.new("RGB", (56, 56))], "answer_type": "text"}
    dummy = encode_prompt(blank, processor, cfg.max_pixels)
    log.note(describe(policy, cfg, (cfg.engine == "hf") + bool(cfg.kl_beta)))
    log.note(f"{len(records)} records; a step: {cfg.prompts_per_step} x {cfg.group_size} rationales "
             f"on {world} rank(s)")
    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    if held_out and not done:
        before = evaluate(engine, held_out, processor, cfg)
        log.write("metrics.jsonl", [{"step": 0, **before}])
        log.note(f"before training: agreement {before['eval/agreement']:.3f} "
                 f"on {len(held_out)} held-out records")

    plan = schedule(len(records), cfg.prompts_per_step, done, cfg.steps, cfg.seed)
    share = prepared([drawn[rank::world] for drawn in plan],
                     lambda i: encode_cot(records[i], processor, cfg), cfg.workers)
    failures = 0
    for step, questions, drawn in zip(itertools.count(done + 1), plan, share):
        clock = [time.time()]

        def tick():
            clock.append(time.time())
            return clock[-1] - clock[-2]

        # 1. draw this rank's questions; their images were prepared in the background
        prompts = readable(drawn, records, log, cfg)
        unreadable = len(drawn) - len(prompts)
        if step == done + 1 and prompts:
            ids = next(iter(prompts.values()))["input_ids"][0]
            log.note("first prompt: " + processor.tokenizer.decode(ids))

        # 2. generate G rationales of each, and reconstruct the annotation from every one
        cots, texts, backs = two_hops(engine, prompts, records, processor, step, cfg)
        sleep_engine(engine)
        seconds = {"time/gen": tick()}
        if step == done + 1 and backs:
            ids = prompts[backs[0].question]["input_ids"][0]
            log.note("first prompt of hop 2: " + processor.tokenizer.decode(ids))

        # 3. score
        mine = scored(cots, texts, backs, records, cfg)
        rows = gathered(mine, questions)
        seconds["time/score"] = tick()

        # 4. advantages within each group, the same for a rationale and its reconstruction
        rewards = torch.tensor([parts["reward"] for *_, parts in mine]).view(-1, cfg.group_size)  # (Q, G)
        advantages = group_advantages(rewards, cfg.adv_std)
        for cot, back, a in zip(cots, backs, advantages.flatten().tolist()):
            cot.advantage = back.advantage = a

        # 5. the tokens that are graded, each with the update it belongs to
        place = {q: j for j, q in enumerate(questions)}
        hops = {"cot": [cots], "reconstruction": [backs], "both": [cots, backs]}[cfg.graded]
        batch = [(place[cot.question] * cfg.updates // len(questions), r)
                 for graded in hops for cot, r in zip(cots, graded)]
        trained = [r for _, r in batch if r.advantage or cfg.kl_beta]

        # 6. logprobs before the updates; with one update they are those of the update itself
        if cfg.updates > 1:
            for r, logps in zip(trained, all_logprobs(policy, trained, prompts, dummy, cfg)):
                r.old_logps = logps
        if reference:
            for r, logps in zip(trained, all_logprobs(reference, trained, prompts, dummy, cfg)):
                r.ref_logps = logps

        # 7. update: slices of questions, cut alike for every number of ranks
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, cfg)
        totals = []
        for u in range(cfg.updates):
            part = [r for update, r in batch if update == u]
            mine = [r for r in part if r.advantage or cfg.kl_beta]
            size = sum(len(r.response) for r in part) if cfg.loss_mean == "token" else len(part)
            denominator, active = global_sum([size, len(mine)])
            if active:
                totals.append(update(policy, optimizer, mine, denominator, prompts, dummy, cfg))
                failures = 0 if math.isfinite(totals[-1]["norm"]) else failures + 1
        if failures >= 3:
            log.fail(f"step {step}: gradient norm not finite {failures} times in a row; "
                     f"the last checkpoint in {cfg.out} is sound, lower --lr")
        seconds["time/train"] = tick()

        # 8. sync
        sync_weights(policy, engine)
        seconds["time/sync"] = tick()

        # 9. log; every rationale is kept, for --phase annotate
        write_rationales(log, step, rows, records)
        metrics = step_metrics(rows, cots + backs, trained, totals, cfg)
        metrics["data/unreadable"], stop_now = global_sum([unreadable, len(stopping)])
        metrics |= {"optim/lr": lr_at(step, cfg), **seconds, "time/step": clock[-1] - clock[0],
                    "mem/peak_gb": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda"
                    else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}

        # 10. evaluate and save
        if held_out and (step % cfg.eval_every == 0 or step == cfg.steps):
            metrics |= evaluate(engine, held_out, processor, cfg)
            log.note(f"step {step}: agreement {metrics['eval/agreement']:.3f} on {len(held_out)} held-out "
                     f"records, {100 * metrics['eval/leaks']:.1f} % leak")
        log.step(step, metrics, ("reward/mean", "reward/agreement", "cot/leaks", "eval/agreement"))
        if step % cfg.save_every == 0 or step == cfg.steps or stop_now:
            save_checkpoint(cfg, step, policy, processor, optimizer)
        if stop_now:
            log.note(f"SIGTERM: saved step {step}; go on with --resume")
            break
    if cfg.engine != "vllm":  # vLLM takes the process group down itself when Python exits
        dist.destroy_process_group()


if __name__ == "__main__":
    main(parse_config(Config))
