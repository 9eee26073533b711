"""SFT: records with a response -> a checkpoint that answers the way they do.

    loss = - sum_t w_t log pi(y_t | image, question, y_<t)      w_t = 1 / response tokens of the global batch

Only the response and the token that ends the turn are learnt. The kernel is the one with which grpo.py scores
rollouts (token_logprobs), so the vision placeholder ids that it bans have no probability here either.

What differs from the usual recipe, and why:
  1. The denominator is the response-token count of the whole step over all ranks and micro-batches, so that
     1 GPU and 64, small and large micro-batches give the same update.
  2. Rows are packed into micro-batches by a token budget, long with long, instead of a fixed number of rows.
  3. No truncation: a row longer than --max_tokens is left out and counted. A cut could part an image from its
     tokens or a thought from its answer.

    python sft.py                                                # mini suite, laptop: out/tiny -> out/sft
    torchrun --nproc_per_node 8 sft.py --model Qwen/Qwen2.5-VL-7B-Instruct --data x.jsonl --lr 1e-5 --epochs 1
    python sft.py --resume                                       # from the newest complete step of --out

Shapes: B rows in a micro-batch, T padded length, H hidden size, V vocabulary, N response tokens.
Tensors over tokens are (B, T-1), aligned to the predicted token: column t belongs to token t+1.
"""
import collections
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import faulthandler
import fcntl
import functools
import importlib.util
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import traceback
import weakref
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import NamedTuple

if __name__ == "__main__":  # Ctrl-C while the libraries below are loaded: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import (CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy,
                                    fully_shard, register_fsdp_forward_method)
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import is_flash_attn_2_available

from data_prep import (build_messages, check_at_least, complete_rows, instead_of, load_image, newest_step,
                       parse_config, read_json, read_records, resolve_model, write_json, write_text)


@dataclass(frozen=True)
class Config:
    # i/o
    model: str = "out/tiny"  # Hub id, model folder or run directory to start from
    data: str = "data/mini/counting_lessons.jsonl"  # records with a response: file or Hub id, known format
    out: str = "out/sft"  # run directory
    resume: bool = False  # go on from the newest complete step of --out
    strict: bool = False  # stop at an unreadable image instead of skipping its row
    seed: int = 0  # data order
    # optimisation
    steps: int = 1200  # optimizer steps
    epochs: float = 0.0  # passes over the data instead of --steps, 0 = use --steps
    batch_size: int = 8  # rows per step, over all ranks
    lr: float = 1.5e-3  # peak learning rate (1e-5 is usual for a 7B model)
    warmup: int = 50  # steps of linear warm-up
    schedule: str = "cosine"  # cosine | linear | constant
    lr_floor: float = 0.02  # final learning rate as a share of the peak (cosine, linear)
    weight_decay: float = 0.0  # AdamW
    max_grad_norm: float = 1.0  # gradient clipping
    token_budget: int = 16384  # padded tokens in a micro-batch; those of long rows count more
    max_tokens: int = 8192  # rows with more tokens, prompt and response, are left out
    # memory and model
    workers: int = -1  # processes that prepare images, per rank; 0 = none, -1 = by the cores
    max_pixels: int = 1003520  # larger images are scaled down to this many pixels
    freeze_vision: bool = False  # train the language model only
    lora_rank: int = 0  # train adapters of this rank beside the frozen weights, 0 = all weights
    lora_alpha: float = 0.0  # an adapter's output is multiplied by alpha / rank, 0 = by 2
    lora_targets: tuple[str, ...] = ()  # ends of layer names, as regex; none = all of the language model
    gradient_checkpointing: bool = False  # redo activations in backward: less memory, a third more compute
    cpu_offload: bool = False  # keep weights and moments in host memory
    shard_ranks: int = 0  # ranks that share a copy of the weights, a node's say; 0 = all of them
    attn: str = "auto"  # auto | sdpa | flash_attention_2 | flash_attention_3 | flex_attention | eager
    # cadence
    eval_data: str = "data/mini/counting_id.jsonl"  # held-out records with a response, "" = no evaluation
    eval_every: int = 400  # steps between evaluations
    eval_n: int = 200  # held-out rows used
    save_every: int = 400  # steps between checkpoints (one is always written at the end)
    keep: int = 1  # checkpoints kept
    log: str = "off"  # where metrics, samples and flags go as well: off | wandb | tensorboard
    stall: float = 20.0  # end the run when a step takes this many medians (10 minutes at least), 0 = never
    dist_timeout: float = 60.0  # minutes that a rank waits for the others


# ----- processes -------------------------------------------------------------------------------------------


def fail(text, waits=True):
    """End this process with one line. What all ranks meet is told by rank 0 alone.

    waits=False: not for threads that are still at something, as Python does when it exits.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        # When rank 0 ends, torchrun ends the others: one that still lives then has a fault of its own.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    line = f"{Path(sys.argv[0]).name}: {text}"
    if waits:
        sys.exit(line)
    sys.stdout.flush()
    print(f"\n{line}", file=sys.stderr, flush=True)  # the progress bar may be on this line
    os._exit(1)


@contextlib.contextmanager
def one_line_errors():
    """A wrong flag, file or model is the user's to mend: it ends the run in one line, not in a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(str(error).strip().splitlines()[0])
    except ImportError as error:  # some processors need a package; how to get it stands on a later line
        fail(" ".join(str(error).split()))


def init_distributed(minutes=60.0):
    """Join torchrun's process group, or make one of a single process. Returns (rank, world_size, device).

    minutes: how long a rank that lives is waited for (--dist_timeout). One that died is noticed at once.
    """
    if not 0 < minutes <= 1e6:
        fail(f"--dist_timeout {minutes:g}: must be above 0 and at most a million minutes")
    timeout = timedelta(minutes=minutes)
    # Groups that are made later, those of a mesh or of vLLM, would have torch's own: with NCCL ten minutes.
    dist.distributed_c10d.default_pg_timeout = timeout
    dist.distributed_c10d.default_pg_nccl_timeout = timeout
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the workers' fork
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))

    # The usual soft limit of a login shell, 1,024, is little for sockets, workers and an engine.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2**16 if most == resource.RLIM_INFINITY else most  # macOS says infinity and takes less
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))

    if torch.cuda.is_available():
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    else:
        # One core stays free for the process that prepares images:
        # OpenMP threads that spin on a busy core are 20x slower.
        torch.set_num_threads(max(1, own_cores() - 1))
        device, backend = torch.device("cpu"), "gloo"
    if "RANK" in os.environ:
        follow_torchrun()
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    transformers.utils.logging.disable_progress_bar()
    return rank, world, device


def own_cores():
    """How many of this machine's cores each of its ranks has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def compute_dtype(device):
    """What models compute with, and so what pixels are kept in."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def global_sum(values):
    """Add each number of a list up over all ranks."""
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def global_max(value):
    """Largest of a number over all ranks."""
    most = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.item()


def gather(value, group=None):
    """[a picklable value of each rank], on all of them. Without a process group there is one rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group)
    return values


def agree(work, *args):
    """work(*args), done by every rank or by none. Collective.

    Raises RanksFailed, on all, with the first reason of a rank: a ValueError or OSError.
    """
    result, fault = None, ""
    try:
        result = work(*args)
    except (ValueError, OSError) as error:
        fault = first_reason(error)
    for reason in gather(fault):
        if reason:
            raise RanksFailed(reason)
    return result


class RanksFailed(ValueError):
    """All ranks have it, so they are still in step, and may go on with something else."""


def follow_torchrun():
    """Have this rank stopped when torchrun dies, even by kill -9; end it if torchrun is gone already."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    signal_with_parent(signal.SIGTERM)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # ranks meet at torchrun's own port
        meeting = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            socket.create_connection(meeting, timeout=60).close()
        except OSError as error:
            fail(f"torchrun is gone ({error})")


def signal_with_parent(number):
    """Have the kernel send this process a signal when its parent dies (Linux)."""
    if sys.platform == "linux":
        parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(parent_death_signal, number)


STOPS = (signal.SIGTERM, signal.SIGINT)  # what an operator stops a run with; SIGINT is Ctrl-C


def end_on_signals():
    """From here on SIGTERM and Ctrl-C end this process at once, in one line: there is nothing to save yet.

    And when another rank ends, what fails for want of it ends this one in a line, too.
    """
    for number in STOPS:
        signal.signal(number, end_at_once)
    sys.excepthook = functools.partial(tell_lost_process, usual=sys.excepthook)


def end_at_once(number, _):
    """Signal handler. No clean-up, which might wait for something; rank 0 speaks for all."""
    if int(os.environ.get("RANK", 0)) == 0:
        name = signal.Signals(number).name
        text = f"\n{Path(sys.argv[0]).name}: ended by {name}\n"  # the progress bar may be on this line
        os.write(2, text.encode())  # print could be what was interrupted
    os._exit(128 + number)


def tell_lost_process(kind, error, trace, usual):
    """sys.excepthook: one line where gloo lost a rank, `usual` for everything else."""
    late = "Timed out waiting" in str(error)
    if "gloo" not in str(error) or not (late or "peer" in str(error)):
        return usual(kind, error, trace)
    why = "was not there within --dist_timeout" if late else "did"
    told = f"rank {os.environ['RANK']} ends because another rank {why}"
    print(f"\n{Path(sys.argv[0]).name}: {told}", file=sys.stderr, flush=True)
    os._exit(1)  # to leave the process group in order would wait for the lost rank


STOPPING = []  # when this process was told to end: by a signal, or by a checkpoint that cannot be written


def catch_signals():
    """STOPPING, which SIGTERM and Ctrl-C fill: a loop that sees it filled saves its step and ends.

    A second signal ends this process at once. torchrun passes signals on, and one who stops a whole process
    group reaches each rank twice: under torchrun what comes within five seconds is still the first.
    """
    STOPPING.clear()
    passed_on = 5 if "TORCHELASTIC_RUN_ID" in os.environ else 0

    def stop(number, frame):
        if STOPPING and time.monotonic() > STOPPING[0] + passed_on:
            end_at_once(number, frame)
        STOPPING.append(time.monotonic())

    for number in STOPS:
        signal.signal(number, stop)
    return STOPPING


@contextlib.contextmanager
def stops_blocked():
    """A process that is forked in here never gets a stop signal: its trainer does, and says when to end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ----- the policy ------------------------------------------------------------------------------------------


VISION = re.compile(r"(^|\.)(visual|vision_tower|vision_model)\.")  # in the names of the vision tower


def load_policy(path, cfg, device, trainable=True):
    """Load an image-text-to-text model and its processor; shard it with FSDP2 (world size 1 included).

    Trained weights are fp32, frozen ones and all computing bf16 on GPU. One layer at a time is cast and
    moved, so the GPU never holds an unsharded model. The policy is always in eval mode: one that
    drops units, or whose batch norm looks at the batch, is not the one that was sampled from.
    """
    policy = load_model(path, "auto", cfg.attn)
    processor = AutoProcessor.from_pretrained(path)
    if not processor.chat_template:
        raise ValueError(f"{path}: the processor of {policy.config.model_type} has no chat template; take an "
                         "instruction-tuned model, or put its chat_template.jinja beside the weights")
    for name, p in policy.named_parameters():
        frozen = cfg.freeze_vision and VISION.search(name)
        p.requires_grad_(trainable and not frozen)
    if trainable and cfg.lora_rank:
        add_adapters(policy, cfg)
    policy.eval()
    blocks = [m for m in policy.modules() if isinstance(m, GradientCheckpointingLayer)]
    if trainable and cfg.gradient_checkpointing:
        # Newer transformers have another name for it, the older ones of requirements.txt know only the first.
        enable = getattr(policy, "activation_checkpointing_enable", policy.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
        if hasattr(policy, "_require_grads_hook"):  # or gradients are taken through a frozen tower, too
            policy.disable_input_require_grads()
        for block in blocks:
            block.training = True  # or it keeps its activations; what is inside it stays in eval mode

    on_gpu = device.type == "cuda"
    mesh = rank_mesh(device, cfg.shard_ranks)
    offload = CPUOffloadPolicy() if cfg.cpu_offload and on_gpu else OffloadPolicy()
    policy.compute_dtype = compute_dtype(device)
    precision = MixedPrecisionPolicy(policy.compute_dtype, torch.float32)  # gradients are added up in fp32
    # The root's weights are whole from the first layer to the last gradient. Embedding and head would be
    # among them, 20 GB at 72B with their gradients; as groups of their own they are whole while they compute.
    # Tied, they are one matrix, which is needed at both ends: it stays with the root.
    embedding, matrix = policy.get_input_embeddings(), policy.get_output_embeddings()
    matrix.logprobs = MethodType(head_logprobs, matrix)
    ends = [] if embedding.weight is matrix.weight else [embedding, matrix]
    for block in [*blocks, *ends, policy]:
        cast_parameters(block, policy.compute_dtype)
        fully_shard(block, mesh=mesh, mp_policy=precision, offload_policy=offload)
    if ends:
        embedding.set_unshard_in_backward(False)  # the gradient of rows that were looked up needs no weight
        register_fsdp_forward_method(matrix, "logprobs")

    policy.banned = vision_ids(policy.config, device)
    policy.head = head_of(policy.config)
    policy.packs = False  # whether responses may share a row; self_check finds out
    policy.token_logprobs = MethodType(token_logprobs, policy)
    register_fsdp_forward_method(policy, "token_logprobs")  # it needs the root's parameters, as forward does
    return policy, processor


def rank_mesh(device, shard_ranks):
    """The ranks as FSDP divides them: `shard_ranks` neighbours share a copy of the weights, 0 = all.

    With several copies a gradient is summed over neighbours, then over copies. Weights travel among
    neighbours alone, which within a node is ten times faster than between nodes.
    """
    world = dist.get_world_size()
    if shard_ranks in (0, world):
        return dist.device_mesh.init_device_mesh(device.type, (world,))
    shape = world // shard_ranks, shard_ranks
    return dist.device_mesh.init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def load_model(path, dtype, attn):
    """An image-text-to-text model. Raises ValueError that names --attn if its family has no such kernel.

    attn "auto": sdpa, which takes the mask of rows that hold several responses; eager where a family has no
    other. On a GPU with flash-attn the vision tower has that: sdpa would go through its windows one by one.
    """
    load = functools.partial(AutoModelForImageTextToText.from_pretrained, path, dtype=dtype)
    try:
        model = load(attn_implementation="sdpa" if attn == "auto" else attn)
    except ValueError as error:
        reason, _, advice = str(error).partition(" yet. Please request")
        if not advice:
            raise
        if attn != "auto":
            raise ValueError(f"--attn {attn}: {reason}; try --attn auto") from error
        model = load(attn_implementation="eager")
    if attn == "auto" and is_flash_attn_2_available():
        with contextlib.suppress(ValueError):  # this tower has no such kernel
            model.set_attn_implementation({"vision_config": "flash_attention_2"})
    return model


def cast_parameters(module, compute_dtype):
    """Cast trained parameters to fp32, frozen ones to what is computed with.

    Never buffers: rotary frequencies in bf16 turn distant tokens by wrong angles.
    """
    for p in module.parameters():
        dtype = torch.float32 if p.requires_grad else compute_dtype
        if p.dtype != dtype:
            p.data = p.data.to(dtype)


class Head(NamedTuple):
    """What a family does to its logits behind the output matrix."""
    scale: float = 1.0  # logits are multiplied by it
    cap: float = 0.0  # soft-capping: cap * tanh(logits / cap), 0 = none

    def __call__(self, logits):
        logits = logits * self.scale if self.scale != 1 else logits
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits

    def slope(self, logits):
        """d head(raw) / d raw, from the logits behind the head."""
        return self.scale * (1 - (logits / self.cap) ** 2) if self.cap else self.scale


def head_of(config):
    """The Head that a configuration speaks of; self_check finds out whether the model does it."""
    text = config.get_text_config()
    scale = getattr(text, "logit_scale", None) or 1.0  # Cohere
    scale = scale / (getattr(text, "logits_scaling", None) or 1.0)  # Granite
    return Head(scale, getattr(text, "final_logit_softcapping", None) or 0.0)  # Gemma


def vision_ids(config, device):
    """Ids of image, video and audio placeholders. A response must hold none: the model looks for features."""
    kinds = "image|img|video|visual|vision|audio|boi|eoi|boa|eoa"
    placeholder = re.compile(rf"(^|_)({kinds})\w*_token_(id|ids|index)$")
    found = set()
    for name, value in config.to_dict().items():
        if placeholder.search(name):
            ids = value if isinstance(value, list) else [value]
            found.update(i for i in ids if isinstance(i, int))
    return torch.tensor(sorted(found), device=device)


def stop_ids(generation_config, processor):
    """Token ids that end a response; the first is what the chat template writes after an assistant turn."""
    tokenizer = processor.tokenizer
    turns = [{"role": "user", "content": [{"type": "text", "text": "-"}]},
             {"role": "assistant", "content": [{"type": "text", "text": "@@"}]}]
    after_turn = processor.apply_chat_template(turns, tokenize=False).rpartition("@@")[2]
    written = tokenizer(after_turn, add_special_tokens=False)["input_ids"][:1]
    # Some templates write a space or nothing there.
    written = [token for token in written if token in tokenizer.all_special_ids]
    known = generation_config.eos_token_id
    if known is None:
        known = []
    elif isinstance(known, int):
        known = [known]
    return list(dict.fromkeys([*written, *known, tokenizer.eos_token_id]))


# ----- LoRA: adapters beside frozen weights ----------------------------------------------------------------


class LoRALinear(torch.nn.Linear):
    """y = W x + b + scale B A x, with W (out, in) and b frozen (Hu et al., arXiv 2106.09685).

    An adapter is lora_A (rank, in) and lora_B (out, rank). B begins as 0, and so as the layer was.
    """
    off = False  # see adapters_off

    def forward(self, x):
        y = super().forward(x)
        if self.off:
            return y
        low = self.scale * torch.nn.functional.linear(x, self.lora_A)  # (.., rank)
        return y + torch.nn.functional.linear(low, self.lora_B)


def add_adapters(policy, cfg):
    """Freeze a model and turn the linear layers that --lora_targets names into LoRALinear.

    Ranks draw alike: each keeps its shard of what all have. Raises ValueError.
    """
    if cfg.lora_rank < 0:
        raise ValueError(f"--lora_rank {cfg.lora_rank}: must not be negative")
    policy.requires_grad_(False)
    scale = lora_alpha(cfg) / cfg.lora_rank
    stream = torch.Generator().manual_seed(cfg.seed)
    for layer in adapted_layers(policy, cfg.lora_targets):
        layer.__class__, layer.scale = LoRALinear, scale
        a = layer.weight.new_empty(cfg.lora_rank, layer.in_features, dtype=torch.float32)
        b = layer.weight.new_zeros(layer.out_features, cfg.lora_rank, dtype=torch.float32)
        torch.nn.init.kaiming_uniform_(a, math.sqrt(5), generator=stream)
        layer.lora_A, layer.lora_B = torch.nn.Parameter(a), torch.nn.Parameter(b)


def lora_alpha(cfg):
    """--lora_alpha, or what is usual."""
    return cfg.lora_alpha or 2 * cfg.lora_rank


def adapted_layers(policy, targets):
    """The linear layers whose names end as one of `targets` does, by default all of the language model.

    A target is looked for in the language model; if it is not there, in the rest, as the vision tower.
    Raises ValueError, for the output head too: head_logprobs computes with its weight alone.
    """
    head = policy.get_output_embeddings()
    of_text = {id(module) for module in policy.get_decoder().modules()}
    text, rest = {}, {}
    for name, module in policy.named_modules():
        if type(module) is torch.nn.Linear and module is not head:
            (text if id(module) in of_text else rest)[name] = module
    found = {}
    for target in targets or [".*"]:
        try:
            ends = re.compile(rf"(.*\.)?({target})").fullmatch
        except re.error as error:
            raise ValueError(f"--lora_targets {target}: no regular expression: {error}") from error
        named = list(filter(ends, text)) or list(filter(ends, rest if targets else []))
        if not named:
            some = dict.fromkeys(name.rpartition(".")[2] for name in text)
            raise ValueError(f"--lora_targets {target}: no linear layer's name ends so; the language model "
                             f"has {', '.join(some) or 'none'}, and its output head takes no adapter")
        found |= {name: (text | rest)[name] for name in named}
    return found.values()


@contextlib.contextmanager
def adapters_off(policy):
    """For a moment the policy is the model that it started from. Without LoRA nothing changes."""
    layers = [module for module in policy.modules() if isinstance(module, LoRALinear)]
    for layer in layers:
        layer.off = True
    try:
        yield
    finally:
        for layer in layers:
            layer.off = False


def is_adapter(name):
    """Whether a parameter is of an adapter, by its name."""
    return name.endswith((".lora_A", ".lora_B"))


def merged(layer, device):
    """W + scale B A of a LoRALinear as one tensor, in fp32. Collective."""
    a, b = whole(layer.lora_A, device), whole(layer.lora_B, device)
    return whole(layer.weight, device).float() + layer.scale * (b @ a)


def write_adapter(tmp, policy, cfg):
    """Gather the adapters and have WRITER write them, as peft's PeftModel.from_pretrained loads them.

    Returns its jobs. They have a folder of their own: where peft is installed, transformers loads a folder
    with an adapter in it without a look at the weights beside it. Collective.
    """
    tensors, layers = {}, []
    for name, layer in policy.named_modules():
        if isinstance(layer, LoRALinear):
            layers.append(name)
            for part in ("lora_A", "lora_B"):
                tensor = whole(getattr(layer, part), policy.banned.device)
                if dist.get_rank() == 0:
                    tensors[f"base_model.model.{name}.{part}.weight"] = tensor.to("cpu", copy=True)
    if dist.get_rank() > 0:
        return []
    folder = tmp / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": policy.config._name_or_path,
              "r": cfg.lora_rank, "lora_alpha": lora_alpha(cfg), "target_modules": layers}
    write_json(folder / "adapter_config.json", config)
    return [WRITER.submit(save_file, tensors, folder / "adapter_model.safetensors", {"format": "pt"})]


# ----- memory, by arithmetic -------------------------------------------------------------------------------


def describe(policy, rows, cfg, engine, reference):
    """Parameters, and memory_needed (which has the arguments) for a micro-batch of `rows`, as text."""
    shards = cfg.shard_ranks or dist.get_world_size()
    parts, unknown = memory_needed(policy, rows, cfg, shards, engine, reference)
    trained = trained_of(policy)
    vocabulary = policy.get_output_embeddings().weight.shape[0]
    name = type(policy).__name__.removeprefix("FSDP")
    gib = {what: f"{size / 2**30:.2f} GiB {what}" for what, size in parts.items()}
    missing = [f"; what the {part} keeps is not known and left out" for part in unknown]
    return (f"{name}: {numbers_of(policy) / 1e6:.1f}M parameters, {trained / 1e6:.1f}M trained, "
            f"vocabulary {vocabulary}\n"
            f"memory per rank: about {sum(parts.values()) / 2**30:.2f} GiB, of it {', '.join(gib.values())}"
            + "".join(missing))


def memory_needed(policy, rows, cfg, shards, engine=False, reference=False):
    """({what: bytes} on the GPU of a rank when an update needs most, parts of the model that are unknown).

    rows: of a micro-batch (see collate). shards: ranks that share the weights. engine, reference: whether a
    whole copy to sample with and a sharded frozen one are held, too. With c bytes a number in compute dtype:

    states: c bytes a frozen weight; a trained one in fp32, its gradient and two moments; over the shards
    activations: see activations
    buffers: the root's weights, in which are embedding and head unless they are groups of their own, and the
        most that is needed beside them and the activations at one of three moments:
        at the head its gradient and three chunks of fp32 logits (ResponseLogprob); alone, its weights, too
        in a block's backward pass the weights of two blocks, the gradients of one; in fp32 those of the group
            before it, which are reduced; what the block needs to go backward; the head's gradient, if it
            waits for the root's
        at the end the root's gradients, and these in fp32, when nothing is left of the activations

    Frozen weights have no gradients.

    What CUDA and NCCL take for themselves and what the allocator cannot use come on top.
    """
    each = policy.compute_dtype.itemsize
    total, trained = numbers_of(policy), trained_of(policy)
    inner = [m for m in policy.modules() if isinstance(m, FSDPModule) and m is not policy]
    root, root_trained = total - sum(map(numbers_of, inner)), trained - sum(map(trained_of, inner))
    layers = [m for m in inner if isinstance(m, GradientCheckpointingLayer)]
    block, block_trained = max(map(numbers_of, layers), default=0), max(map(trained_of, layers), default=0)
    matrix = policy.get_output_embeddings()
    alone = isinstance(matrix, FSDPModule)
    head, head_trained = numbers_of(matrix), trained_of(matrix)
    written = sum(int(group.written().sum()) for row in rows for group in as_groups(row))
    logits = min(CHUNK, written * matrix.weight.shape[0])
    stored, in_block, unknown = activations(policy, rows, cfg)

    states, copies = (each * (total - trained) + 16 * trained) / shards, each * total * engine
    frozen = each * total * reference / shards
    if cfg.cpu_offload:  # on the GPU is the shard that is gathered next, cast from fp32 where it is trained
        states, frozen = (each * block + 4 * block_trained) / shards, 0
    # The head's group, and the embedding's.
    ends, ends_trained = (head, head_trained) if alone else (0, 0)
    at_head = stored + each * (ends + head_trained) + 3 * 4 * logits + 4 * ends_trained
    at_block = (stored + in_block + each * (2 * block + block_trained) + 4 * max(block_trained, ends_trained)
                + each * (head_trained - ends_trained))
    at_end = (each + 4) * max(root_trained, ends_trained)
    buffers = each * root + max(at_head, at_block, at_end) - stored
    parts = {"weights, gradients and moments": states, "model copies": copies + frozen,
             "activations": stored, "buffers": buffers}
    return parts, unknown


def activations(policy, rows, cfg):
    """(bytes that all blocks keep until backward, bytes that one needs then, parts that are unknown).

    A block's mask, of T tokens for T tokens in each of B rows, is kept in compute dtype by sdpa. With
    checkpointing blocks keep their input, and one at a time makes the rest anew. A quarter is added for the
    gradients of what it keeps. Blocks without a trained weight keep nothing.
    """
    each = policy.compute_dtype.itemsize
    prompts = [group.prompt for row in rows for group in as_groups(row)]
    patches = [patches_of(prompt, policy.config) for prompt in prompts]
    length = max(sum(map(len, as_groups(row))) for row in rows)
    sdpa = policy.config.get_text_config()._attn_implementation == "sdpa"
    mask = each * len(rows) * length ** 2 if sdpa else 0
    inputs, kept = [], [0]
    missing = {bool(VISION.search(name)) for name, p in policy.named_parameters() if p.requires_grad}
    unknown = set()
    for name, block in policy.named_modules():
        if isinstance(block, GradientCheckpointingLayer) and any(p.requires_grad for p in block.parameters()):
            tower = bool(VISION.search(name + "."))
            of_input, of_all, known = kept_by(block, each)
            missing.discard(tower)
            if known < 0.9 or tower and None in patches:
                unknown.add(tower)
                continue
            count = sum(patches) if tower else len(rows) * length
            inputs.append(count * of_input)
            kept.append(count * of_all + mask * (not tower))
    again, stored = (1, sum(inputs)) if cfg.gradient_checkpointing else (0, sum(kept))
    parts = ["vision tower" if tower else "language model" for tower in sorted(missing | unknown)]
    return stored, (again + 0.25) * max(kept), parts


def kept_by(block, each):
    """Bytes of a block's input and of all that it keeps for backward, of one token or patch at `each` bytes a
    number; and which share of its weights is of a known kind.

    What autograd saves, read off the shapes of the weights, as Korthikanti et al. (arXiv 2205.05198) do for
    GPT. A norm keeps what it gets, in fp32 where it casts itself, and what it gives, scaled or not. A module
    whose last matrix takes I numbers keeps

        2 I  with one matrix before it: what the activation function gets and gives
        4 I  gate, gate activated, up, their product; or q, k, v, each repeated for every head, and the output
        7 I  q, k and v of one matrix; q and k turned, the output in pieces and joined

    and no attention matrix, which sdpa and flash attention do not make; eager does. What an adapter's A gives
    is kept, too.
    """
    hidden, kept, known = 0, 0, 0
    for module in block.modules():
        matrices = [child for child in module.children() if isinstance(child, torch.nn.Linear)]
        inner = 0
        if len(matrices) > 1:
            hidden = hidden or matrices[0].in_features
            inner = matrices[-1].in_features
            before = matrices[0].out_features // inner if len(matrices) == 2 else None
            kept += {1: 2, 3: 7}.get(before, 4) * inner * each
            known += sum(map(numbers_of, matrices))
        for child in module.children():
            if isinstance(child, LoRALinear):
                kept += child.lora_A.shape[0] * each
            if "Norm" in type(child).__name__:
                scales = getattr(child, "weight", None)  # not all norms have any
                width = max(inner, 0 if scales is None else scales.numel())  # beside matrices: of every head
                own = each if isinstance(child, torch.nn.LayerNorm) else 4 + each
                kept += width * (own + each)
                known += numbers_of(child)
    return hidden * each, kept, known / numbers_of(block)


def numbers_of(module):
    """How many numbers its parameters have, over all ranks."""
    return sum(p.numel() for p in module.parameters())


def trained_of(module):
    """How many of them are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def patches_of(prompt, config):
    """How many patches of a prompt's images the vision tower sees, None if that cannot be told."""
    pixels = prompt.get("pixel_values")
    if pixels is None:
        return 0
    if pixels.ndim <= 3:  # (patches, numbers), maybe with a batch in front
        return pixels.numel() // pixels.shape[-1]
    side = getattr(getattr(config, "vision_config", None), "patch_size", None)
    return pixels.numel() // (3 * side ** 2) if isinstance(side, int) else None


# ----- rows: from a record to tensors ----------------------------------------------------------------------


def encode_prompt(record, processor, max_pixels, max_tokens=0, dtype=torch.float32):
    """Render a record's prompt and images into the processor's CPU tensors, batch size 1.

    dtype: of pixels, which the model would cast to its compute dtype anyway: they travel and wait as that.
    `request` is the same prompt for engines that process images themselves: one placeholder per image.
    Raises BadImage, and ValueError beyond max_tokens (0 = any length): no prompt is ever cut.
    """
    messages = build_messages(record)
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    images = [load_image(image, max_pixels) for image in record["images"]]
    # The template already wrote every special token, a second BOS would shift the prompt.
    inputs = processor(text=[text], images=[images] if images else None, add_special_tokens=False,
                       return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    if max_tokens and length > max_tokens:
        raise ValueError(f"its prompt has {length} tokens, --max_prompt_tokens is {max_tokens}")
    for name in pixel_names(inputs):
        inputs[name] = inputs[name].to(dtype)
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return {**inputs, "request": {"ids": ids, "images": images, "messages": messages}}


def blackened(image, share, chance):
    """An RGB image in which each patch of 14 x 14 pixels is black with probability `share`; others stay."""
    side = 14
    columns, rows = math.ceil(image.width / side), math.ceil(image.height / side)
    shown = Image.new("1", (columns, rows))
    shown.putdata([chance.random() >= share for _ in range(columns * rows)])
    shown = shown.resize((columns * side, rows * side), Image.Resampling.NEAREST)
    black = Image.new("RGB", image.size)
    return Image.composite(image, black, shown.crop((0, 0, *image.size)))


def diffused(image, step, chance):
    """An RGB image as a diffusion model's forward process leaves it at step 0 .. 999 (arXiv 2504.13055).

    x_t = sqrt(a) x + sqrt(1 - a) noise with x from 0 to 1, a = the product of 1 - beta up to t; clipped.
    """
    betas = torch.linspace(-6, 6, 1000).sigmoid() * (0.005 - 1e-5) + 1e-5
    kept = (1 - betas).cumprod(0)[step]
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) / 255
    stream = torch.Generator().manual_seed(chance.getrandbits(62))
    noise = torch.randn(len(pixels), generator=stream)
    mixed = kept.sqrt() * pixels + (1 - kept).sqrt() * noise
    levels = (255 * mixed.clamp(0, 1)).round().to(torch.uint8)
    return Image.frombytes("RGB", image.size, levels.numpy().tobytes())


# Share of an image's patches that are blackened, as in the papers.
MASKED = {"papo": 0.6, "vppo": 0.5}


def encode_view(asked, step, records, encode, cfg):
    """What the workers are asked for: a question as sampler and trainer see it, or (question, view).

    views: `masked`, and `noised`, which fades in the course of the run. `step` is for what changes over a
    run; where a replayed question is encoded again, it is the current one.
    """
    if isinstance(asked, int):
        return encode(records[asked])
    q, view = asked
    chance = random.Random(f"{cfg.seed}/{view}/{step}/{q}")
    if view == "masked":
        change = functools.partial(blackened, share=MASKED[cfg.perception], chance=chance)
    else:
        strength = 1 / (1 + math.exp(30 * (step - 40) / cfg.steps))
        change = functools.partial(diffused, step=int(500 * strength), chance=chance)
    images = [change(load_image(image, cfg.max_pixels)) for image in records[q]["images"]]
    return encode(dict(records[q], images=images))


def pixel_names(inputs):
    """Names of the inputs that are floating point: pixels. Token ids, masks and grids are not."""
    return [name for name, value in inputs.items() if name != "request" and value.is_floating_point()]


def continued(prompt, ids):
    """encode_prompt's result for a prompt whose response has begun with `ids`; pixels are shared."""
    begun = torch.tensor([ids])  # (1, n)
    fill = {"input_ids": begun, "attention_mask": torch.ones_like(begun)}
    longer = {}
    for name, value in prompt.items():
        if name == "request":
            longer[name] = dict(value, ids=value["ids"] + ids)
        elif is_over_tokens(prompt, name):
            more = fill.get(name, torch.zeros_like(begun))
            longer[name] = torch.cat([value, more], 1)
        else:
            longer[name] = value
    return longer


def blank_prompt(processor, max_pixels, dtype=torch.float32):
    """The prompt of a small grey image, which stands in where a micro-batch has no image (see collate)."""
    record = {"question": "", "images": [Image.new("RGB", (56, 56))], "answer_type": "text"}
    return encode_prompt(record, processor, max_pixels, dtype=dtype)


def encode_row(record, processor, stop, banned, dtype, cfg):
    """(prompt tensors, response ids with the stop token); None if over cfg.max_tokens. Raises BadImage."""
    prompt = encode_prompt(record, processor, cfg.max_pixels, dtype=dtype)
    del prompt["request"]  # its images would travel from the worker unused
    response = processor.tokenizer(record["response"], add_special_tokens=False)["input_ids"]
    response.append(stop)
    if banned & set(response):
        raise ValueError(f"row {record['id']}: the response holds a vision placeholder token")
    if prompt["input_ids"].shape[1] + len(response) > cfg.max_tokens:
        return None
    return prompt, response


def data_order(total, per_step, done, steps, seed):
    """Record indices of steps done+1..steps: slices of endless seeded permutations, no index twice in a step.

    A function of the seed alone, so a resumed run needs no saved cursor.
    """
    def endless():
        for epoch in itertools.count():
            yield from random.Random(f"{seed}/{epoch}").sample(range(total), total)

    stream = itertools.islice(endless(), done * per_step, None)
    order = []
    for _ in range(done, steps):
        drawn = itertools.islice(stream, per_step)
        order.append(list(dict.fromkeys(drawn)))
    return order


class Workers:
    """Processes that encode records while the trainer computes. They are forked once, as early as can be.

    Processes, not threads: a processor call is mostly Python, and would hold the trainer's GIL. To fork
    later, or anew for every evaluation, can deadlock: a lock that another thread holds at that moment is
    never freed. A row travels as one pickle through a pipe. Sent as tensors, each of its inputs would take
    shared memory, of which a container may have 64 MiB, and a file descriptor, of which a login shell has
    1,024. It stays with its worker until the trainer wants it: what is there ahead of time is bounded by
    AHEAD, whatever the order in which those who share the workers ask.

    encode(index, step) gives a row. count 0 encodes in the trainer itself, when a row is wanted; -1 is by the
    cores, see worker_count.
    """
    AHEAD = 2**31  # bytes of rows that nobody wants yet, over all workers of a rank

    def __init__(self, encode, count):
        self.encode = encode
        self.crew = []  # of each worker: process, the pipe of its tasks, the pipe of its rows
        self.asked = 0
        context = multiprocessing.get_context("fork")
        count = worker_count(count)
        with stops_blocked():  # a worker that ended first would be missed before the trainer could save
            for _ in range(count):
                tasks, to_worker = context.Pipe(duplex=False)
                from_worker, rows = context.Pipe(duplex=False)
                work = functools.partial(Desk, encode, tasks, rows, os.getpid(), self.AHEAD / count)
                process = context.Process(target=work, daemon=True)
                process.start()
                tasks.close()
                rows.close()  # held by the worker alone: when it dies the trainer reads the end of the pipe
                self.crew.append((process, to_worker, from_worker))
        self.close = weakref.finalize(self, end_crew, self.crew)  # at the latest when Python exits

    def prepared(self, batches, first_step=0):
        """Iterate over each step's record indices, as lists of (index, row), prepared about a batch ahead.

        A record that cannot be encoded (an unreadable image, a placeholder token) comes as a ValueError.
        """
        places = iter([(i, step) for step, batch in enumerate(batches, first_step) for i in batch])
        ahead = max([2 * len(self.crew), *map(len, batches)])
        tickets = collections.deque()
        for batch in batches:
            missing = len(batch) + ahead - len(tickets)
            tickets += self.ask(itertools.islice(places, missing))
            own = [tickets.popleft() for _ in batch]
            yield list(zip(batch, self.take(own)))

    def ask(self, places):
        """Have each (index, step) encoded, by the workers in turn. Returns tickets to take the rows with."""
        tickets = list(enumerate(places, self.asked))
        self.asked += len(tickets)
        self.tell(tickets, dict)
        return tickets

    def take(self, tickets):
        """The rows of tickets, a ValueError in place of some; any other exception is raised here."""
        if not self.crew:
            return [encoded_or_error(self.encode, place) for _, place in tickets]
        self.tell(tickets, lambda own: [number for number, _ in own])
        rows = []
        for number, _ in tickets:  # all of them, before one is raised: the next to take finds empty pipes
            _, _, from_worker = self.crew[number % len(self.crew)]
            try:
                rows.append(from_worker.recv())  # of a pipe that our own worker alone writes into
            except (EOFError, OSError) as error:
                self.lost(error)
        for row in rows:
            if isinstance(row, BaseException) and not isinstance(row, ValueError):
                raise row
        return rows

    def tell(self, tickets, made):
        """Send each worker what is made of its own tickets."""
        for which, (_, to_worker, _) in enumerate(self.crew):
            own = [ticket for ticket in tickets if ticket[0] % len(self.crew) == which]
            try:
                if own:
                    to_worker.send(made(own))
            except OSError as error:
                self.lost(error)

    def lost(self, error):
        why = str(error) or "its pipe has ended"
        fail("a process that prepares images died, perhaps for want of memory: "
             f"lower --workers or --max_pixels ({why})")


def worker_count(asked):
    """--workers, or for -1 what this rank's cores allow: all but the trainer's own, and at most 8.

    One where models compute on the CPU: its cores are the trainer's threads.
    """
    if asked >= 0:
        return asked
    return min(8, max(1, own_cores() - 1)) if torch.cuda.is_available() else 1


def end_crew(crew):
    """End workers at once: whatever they are at, nobody waits for it any more."""
    for process, to_worker, from_worker in crew:
        process.kill()
        process.join()
        to_worker.close()
        from_worker.close()


class Desk:
    """A worker's life. It encodes what is wanted first, then ahead of time while what waits is in the budget.

    Beside the thread that encodes one listens and one sends, so that no row that is there waits for another.
    """

    def __init__(self, encode, tasks, rows, trainer, budget):
        signal_with_parent(signal.SIGKILL)  # a trainer that dies, even by kill -9, takes its workers with it
        if os.getppid() != trainer:  # it died before the line above
            os._exit(1)
        torch.set_num_threads(1)  # OpenMP's threads did not survive the fork
        self.tasks, self.rows, self.budget = tasks, rows, budget
        self.changed = threading.Condition()
        self.todo, self.urgent = {}, {}  # number: place, asked for ahead of time, and wanted now
        self.wanted = collections.deque()  # numbers, in the order in which the trainer reads their rows
        self.ready, self.waiting, self.largest = {}, 0, 0  # number: pickled row; bytes of all, and of one
        for work in (self.listen, self.send):
            threading.Thread(target=work, daemon=True).start()
        while True:
            number, place = self.next_task()
            row = encoded_message(encode, place)
            with self.changed:
                self.ready[number] = row
                self.waiting += len(row)
                self.largest = max(self.largest, len(row))
                self.changed.notify_all()

    def listen(self):
        """Hear {number: place} of rows to encode in that order, or [number] of rows that are wanted now."""
        while True:
            try:
                said = self.tasks.recv()
            except EOFError:
                os._exit(0)
            with self.changed:
                if isinstance(said, dict):
                    self.todo |= said
                else:
                    self.wanted.extend(said)
                    for number in said:
                        if number in self.todo:
                            self.urgent[number] = self.todo.pop(number)
                self.changed.notify_all()

    def send(self):
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.wanted and self.wanted[0] in self.ready)
                row = self.ready.pop(self.wanted.popleft())
                self.waiting -= len(row)
                self.changed.notify_all()
            self.rows.send_bytes(row)

    def next_task(self):
        """Wait for the next (number, place) to encode."""
        with self.changed:
            self.changed.wait_for(self.may_encode)
            tasks = self.urgent or self.todo
            number = next(iter(tasks))
            return number, tasks.pop(number)

    def may_encode(self):
        """Whether there is room for a row, or the trainer waits for the next one at this moment."""
        room = not self.ready or self.waiting + self.largest <= self.budget
        starving = self.wanted and self.wanted[0] in self.urgent
        return starving or room and (self.urgent or self.todo)


def encoded_message(encode, place):
    """The pickle of a row, or of the exception in its place."""
    try:
        return pickle.dumps(encoded_or_error(encode, place))
    except Exception as error:
        error.add_note(traceback.format_exc())  # where in the worker it was
        return pickle.dumps(error)


def encoded_or_error(encode, place):
    try:
        return encode(*place)
    except ValueError as error:
        return ValueError(str(error))  # one of a library's own kind may not survive the pipe


def readable(drawn, records, strict, log):
    """{index: row} of what Workers.prepared gives. What could not be encoded is named, or ends the run."""
    rows = {}
    for i, row in drawn:
        if not isinstance(row, ValueError):
            rows[i] = row
        elif strict:
            log.fail(row)
        else:
            log.note(f"record {records[i]['id']} skipped: {row}")
    return rows


def encode_share(run, workers):
    """This rank's share of held-out records: {index: prompt} of what can be read, and how many it is.

    They are numbered on from the records of training.
    """
    total = len(run.records) + len(run.held_out)
    share = range(len(run.records) + dist.get_rank(), total, dist.get_world_size())
    [drawn] = workers.prepared([share])
    prompts = {i: prompt for i, prompt in drawn if not isinstance(prompt, ValueError)}
    return prompts, len(share)


# ----- micro-batches ---------------------------------------------------------------------------------------


@dataclass
class Group:
    """A prompt (of encode_prompt) and its responses' token ids. What they share is computed once.

    The responses stand behind the prompt one after the other, each as if it were the only one. The prompt's
    last token, which predicts a response's first, is repeated before each but the first.
    """
    prompt: dict
    responses: list

    def __len__(self):
        """Tokens, repeated ones included."""
        repeated = max(0, len(self.responses) - 1)
        return self.prompt["input_ids"].shape[1] + sum(map(len, self.responses)) + repeated

    def layout(self):
        """(places, owners), each (len,): where a token would be in a row of its own, prompt and one response;
        and the number of the response it belongs to, 0 for what all see."""
        last = self.prompt["input_ids"].shape[1] - 1
        places, owners = [torch.arange(last)], [torch.zeros(last, dtype=torch.long)]
        for number, response in enumerate(self.responses or [[]], 1):
            count = 1 + len(response)  # the prompt's last token sees no repetition of itself
            places.append(last + torch.arange(count))
            owners.append(torch.full((count,), number))
        return torch.cat(places), torch.cat(owners)

    def written(self):
        """(len,): whether a token is of a response."""
        return self.layout()[0] >= self.prompt["input_ids"].shape[1]

    def over_tokens(self, name):
        """The values of an input over tokens, (len,); 0 at each if the prompt has none."""
        own = self.prompt.get(name, torch.zeros_like(self.prompt["input_ids"]))[0]
        parts = [own]
        for number, response in enumerate(self.responses):
            if number:
                parts.append(own[-1:])
            if name == "input_ids":
                parts.append(torch.tensor(response, dtype=torch.long))
            # PaliGemma's types: 0 is what each token sees, 1 what is written one by one.
            elif name == "attention_mask" or name == "token_type_ids" and "labels" in self.prompt:
                parts.append(torch.ones(len(response), dtype=torch.long))
            else:
                parts.append(torch.zeros(len(response), dtype=torch.long))
        return torch.cat(parts)


def computed(length, scale):
    """What a row of that length costs, in tokens of a short row: each token also looks at the others."""
    return length * (1 + length / scale)


def attention_scale(config):
    """How many tokens cost as much to look at as a token's own weights do.

    In a block of hidden size H a token is multiplied with about 12 H^2 weights, and twice with H numbers of
    each token that it looks at.
    """
    return 6 * config.get_text_config().hidden_size


def micro_batches(lengths, budget, packs=False, scale=math.inf):
    """Lists of rows, long with long; a row is a list of group indices. Equally many for each rank.

    The rows of a micro-batch cost the budget at most, each as much as its longest; with `packs` short groups
    stand side by side in a row as far as that adds no width. FSDP's collectives run per forward pass, so a
    rank with fewer batches gets empty ones (collate fills in the dummy).
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches, rooms = [], []  # rooms: (tokens that are free, row)
    for i in longest_first:
        for place, (room, row) in enumerate(rooms):
            if packs and lengths[i] <= room:
                row.append(i)
                rooms[place] = room - lengths[i], row
                break
        else:
            row = [i]
            longest = lengths[batches[-1][0][0]] if batches else math.inf
            if batches and (len(batches[-1]) + 1) * computed(longest, scale) <= budget:
                batches[-1].append(row)
            else:
                batches.append([row])
                longest = lengths[i]
            rooms.append((longest - lengths[i], row))
    missing = int(global_max(len(batches))) - len(batches)
    return batches + [[]] * missing


def assigned(costs, world):
    """Which rank trains what: {item: rank} for {item: cost}. An item is (update, rank that has it, question).

    Of each update the costliest item comes first. It stays where it is, unless that rank would have more than
    the mean and another one has less so far: then it goes to the one that has least.
    """
    total = collections.Counter()
    for (update_number, _, _), cost in costs.items():
        total[update_number] += cost
    loads = {number: [0.0] * world for number in total}
    ranks = {}
    for item, cost in sorted(costs.items(), key=lambda pair: (-pair[1], pair[0])):
        number, own, _ = item
        load = loads[number]
        stays = load[own] + cost <= total[number] / world or load[own] == min(load)
        ranks[item] = own if stays else load.index(min(load))
        load[ranks[item]] += cost
    return ranks


def evenness(costs, ranks, world):
    """Mean load of a rank over the largest, 1 if all are alike: what is left of so many GPUs."""
    loads = collections.Counter()
    for item, cost in costs.items():
        loads[item[0], ranks[item]] += cost
    largest = collections.Counter()
    for (number, _), load in loads.items():
        largest[number] = max(largest[number], load)
    return sum(loads.values()) / world / sum(largest.values()) if costs else 1.0


def collate(rows, dummy, pad_id, device):
    """Right-pad rows into forward kwargs and the mask (B, T-1) of response tokens.

    A row is (prompt, response ids), a Group or a list of them. Where one has several responses, the inputs
    also say what a token sees and where it is: "seen", "places", "starts" (placed_inputs).

    A batch without images gets `dummy`, an image prompt, with an empty response: all ranks must run the
    vision tower, or FSDP waits for ever for those that do not.
    """
    rows = [as_groups(row) for row in rows]
    prompts = [group.prompt for group in itertools.chain.from_iterable(rows)]
    if dummy and not any("pixel_values" in prompt for prompt in prompts):
        rows.append([Group(dummy, [])])
        prompts.append(dummy)
    inputs = {}
    for name in input_names(prompts):
        having = [prompt for prompt in prompts if name in prompt]
        if is_over_tokens(having[0], name):
            filler = pad_id if name == "input_ids" else 0
            inputs[name] = padded(rows, lambda group: group.over_tokens(name), filler).to(device)  # (B, T)
        else:
            # MiniCPM-V lays all patches side by side in a batch of one; target_sizes has where images end.
            axis = -1 if name == "pixel_values" and "target_sizes" in having[0] else 0
            inputs[name] = joined_images([prompt[name] for prompt in having], axis).to(device)
    written = padded(rows, Group.written, False).to(device)
    mask = written[:, 1:]  # (B, T-1); column t belongs to token t+1
    if any(len(row) > 1 or len(row[0].responses) > 1 for row in rows):
        inputs["places"] = padded(rows, lambda group: group.layout()[0], 0).to(device)
        inputs |= sight(rows, device)
    return inputs, mask


def sight(rows, device):
    """What a token of rows of several responses sees: its group's prompt and its own response, so far.

    seen: (B, 1, T, T), query and key. starts: (B, T), the index in its row of the group's first token.
    """
    owners = padded(rows, lambda group: group.layout()[1], 0).to(device)  # (B, T)
    starts = torch.full_like(owners, -1)  # padding sees padding: a token that sees nothing would be nan
    for b, row in enumerate(rows):
        start = 0
        for group in row:
            end = start + len(group)
            starts[b, start:end] = start
            start = end
    same_group = starts[:, :, None] == starts[:, None, :]  # (B, T, T)
    same_owner = owners[:, :, None] == owners[:, None, :]
    seen = same_group & (same_owner | (owners == 0)[:, None, :])
    return {"seen": seen.tril()[:, None], "starts": starts.clamp(min=0)}


def question_groups(rollouts, prompts, policy, budget):
    """Groups of one question each, and the indices of their rollouts.

    prompts: {question: encode_prompt's result}; a rollout (grpo.py's) has a `question` and the ids of a
    `response`. Rollouts of a question share a group, so that its image and prompt are computed once, as long
    as that is less to compute than a row for each: a long group's tokens have many to look at, if only to be
    masked.
    """
    scale = attention_scale(policy.config)
    groups, members = [], []
    of_question = {}  # its last group, by index
    for i, r in enumerate(rollouts):
        alone = Group(prompts[r.question], [r.response])
        place = of_question.get(r.question)
        if place is not None and policy.packs:
            before = groups[place]
            joined = Group(before.prompt, [*before.responses, r.response])
            apart = computed(len(before), scale) + computed(len(alone), scale)
            together = computed(len(joined), scale)
            if together <= min(apart, budget):
                groups[place] = joined
                members[place].append(i)
                continue
        of_question[r.question] = len(groups)
        groups.append(alone)
        members.append([i])
    return groups, members


def group_batches(groups, policy, dummy, budget):
    """Yield micro-batches of Groups: (their indices, row by row, forward kwargs, mask (B, T-1))."""
    lengths = [len(group) for group in groups]
    for rows in micro_batches(lengths, budget, policy.packs, attention_scale(policy.config)):
        indices = list(itertools.chain.from_iterable(rows))
        batch = []
        for row in rows:
            batch.append([groups[i] for i in row])
        yield indices, *collate(batch, dummy, 0, policy.banned.device)


def as_groups(row):
    """The Groups of a row that may be one group, or a prompt with the ids of one response."""
    if isinstance(row, Group):
        return [row]
    if isinstance(row, tuple):
        prompt, response = row
        return [Group(prompt, [response])]
    return row


def padded(rows, of_group, filler):
    """A number for each token: of_group(group), (len,), side by side in each row, right-padded. (B, T)"""
    joined = [torch.cat(list(map(of_group, row))) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(joined, batch_first=True, padding_value=filler)


def input_names(prompts):
    """Names of the model inputs that any of the prompts has, in order."""
    names = {}
    for prompt in prompts:
        names |= dict.fromkeys(prompt)
    names.pop("request", None)  # for engines that process images themselves
    names.pop("labels", None)  # PaliGemma's; losses are computed here
    return list(names)


def is_over_tokens(prompt, name):
    """Whether an input has a value for each token, as masks and token types have, unlike pixels and grids."""
    return prompt[name].shape == prompt["input_ids"].shape


def joined_images(tensors, axis=0):
    """Concatenate image inputs. Patches (Qwen) fit as they are; frames (Idefics3) are padded with zeros."""
    if axis:
        return torch.cat(tensors, axis)
    shapes = [x.shape[1:] for x in tensors]
    largest = [max(sizes) for sizes in zip(*shapes)]
    padded = []
    for x in tensors:
        pad = []
        # F.pad takes the last dimension first.
        for want, have in zip(reversed(largest), reversed(x.shape[1:])):
            pad += [0, want - have]
        padded.append(torch.nn.functional.pad(x, pad))
    return torch.cat(padded)


CHUNK = 2**25  # logits that are held at a time: 128 MiB in fp32


class ResponseLogprob(torch.autograd.Function):
    """log softmax(head(h W') / temperature)[target] at N positions, and the entropy there (without gradient).

    Both passes hold logits a chunk at a time.
    """

    @staticmethod
    def chunks(hidden, weight, head, temperature, banned):
        size = max(1, CHUNK // weight.shape[0])
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            logits = head((hidden[rows] @ weight.T).float()).div_(temperature)  # (n, V)
            logits[:, banned] = -torch.inf
            yield rows, logits

    @staticmethod
    def forward(ctx, hidden, weight, targets, head, temperature, banned):
        logps = torch.empty(len(hidden), device=hidden.device)  # (N,)
        totals, entropy = torch.empty_like(logps), torch.empty_like(logps)
        for rows, logits in ResponseLogprob.chunks(hidden, weight, head, temperature, banned):
            chosen = logits.gather(1, targets[rows, None])[:, 0]
            total = logits.logsumexp(1)
            logps[rows], totals[rows] = chosen - total, total
            # H = log Z - sum_v p_v logit_v; a banned token has p = 0 and must not make 0 * inf.
            probs = (logits - total[:, None]).exp_()
            logits[:, banned] = 0
            entropy[rows] = total - (probs * logits).sum(1)
        ctx.save_for_backward(hidden, weight, targets, banned, totals)
        ctx.head, ctx.temperature = head, temperature
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    def backward(ctx, grad, _):
        """d logp / d logits = (onehot(target) - softmax) / temperature, written over the logits."""
        hidden, weight, targets, banned, totals = ctx.saved_tensors
        head, temperature = ctx.head, ctx.temperature
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for rows, logits in ResponseLogprob.chunks(hidden, weight, head, temperature, banned):
            g = grad[rows, None] / temperature  # (n, 1)
            slope = 1.0
            if head != Head():  # what is banned has no gradient, and must not make 0 * inf
                slope = head.slope(logits.masked_fill(logits.isneginf(), 0) * temperature)
            softmax = logits.sub_(totals[rows, None]).exp_()
            d_logits = softmax.mul_(-g).scatter_add_(1, targets[rows, None], g).mul_(slope).to(weight.dtype)
            d_hidden[rows] = d_logits @ weight
            if d_weight is not None:
                d_weight.addmm_(d_logits.T, hidden[rows])
        return d_hidden, d_weight, None, None, None, None


def placed_inputs(model, seen, places, starts, **inputs):
    """Forward kwargs of rows with several responses: mask and positions, which a model else makes itself.

    seen: (B, 1, T, T), whether a token (first T) sees another. places: (B, T), a token's index if prompt and
    response were a row of their own. starts: (B, T), the index of its group's first token in this row.
    Models with image positions (Qwen's, GLM's) number the row; behind a prompt they count on one by one, so a
    token's position is the number at its place, counted from its group's start.
    """
    position_ids = places
    if "image_grid_thw" in inputs and hasattr(model, "get_rope_index"):
        takes = inspect.signature(model.get_rope_index).parameters
        known = {name: value for name, value in inputs.items() if name in takes}
        numbers, _ = model.get_rope_index(**known)  # (3, B, T)
        first = numbers.gather(2, starts.expand_as(numbers))
        position_ids = numbers.gather(2, (starts + places).expand_as(numbers)) - first
    return inputs | {"attention_mask": seen, "position_ids": position_ids}


def head_logprobs(matrix, hidden, targets, head, temperature, banned):
    """ResponseLogprob with the weight of an output layer, (V, H). A method of the layer, which FSDP takes for
    its forward: the weight is whole in here, and once more when the backward pass computes with it."""
    return ResponseLogprob.apply(hidden, matrix.weight, targets, head, temperature, banned)


def token_logprobs(policy, inputs, mask, temperature=1.0, with_entropy=False):
    """Log-probability of each response token under the policy, (B, T-1), 0 outside `mask`; also the entropy.

    The output head runs at response positions only and in chunks, so a (B, T, V) tensor never exists.
    """
    if "seen" in inputs:
        inputs = placed_inputs(policy.model, **inputs)
    hidden = policy.model(**inputs, use_cache=False).last_hidden_state[:, :-1]  # (B, T-1, H)
    targets = inputs["input_ids"][:, 1:][mask]  # (N,)
    matrix = policy.get_output_embeddings()
    logps, entropy = matrix.logprobs(hidden[mask], targets, policy.head, temperature, policy.banned)
    zeros = torch.zeros(mask.shape, device=logps.device)
    logps = zeros.masked_scatter(mask, logps)
    return (logps, zeros.masked_scatter(mask, entropy)) if with_entropy else logps


def padded_batches(rollouts, prompts, dummy, policy, cfg):
    """Yield micro-batches: (indices of their rollouts, forward kwargs, mask (B, T-1)).

    The mask is of response tokens, rollout after rollout. A batch may hold no rollout but the dummy, so that
    all ranks run as many.
    """
    groups, members = question_groups(rollouts, prompts, policy, cfg.token_budget)
    for places, inputs, mask in group_batches(groups, policy, dummy, cfg.token_budget):
        indices = [i for place in places for i in members[place]]
        yield indices, inputs, mask


def by_rollout(values, mask, rollouts):
    """(B, T-1) -> a CPU tensor (len(response),) for each rollout."""
    return values[mask].cpu().split([len(r.response) for r in rollouts])


def over_tokens(values, mask):
    """A tensor (len(response),) for each rollout -> (B, T-1), 0 outside the mask: by_rollout's inverse."""
    nothing = torch.zeros(0)  # a batch may hold the dummy alone
    flat = torch.cat([*values, nothing]).to(mask.device)
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, flat)


@torch.no_grad()
def all_logprobs(policy, rollouts, prompts, dummy, cfg):
    """Trainer-side log-probabilities of each rollout, without gradient: CPU tensors (len(response),)."""
    out = [None] * len(rollouts)
    for indices, inputs, mask in padded_batches(rollouts, prompts, dummy, policy, cfg):
        logps = policy.token_logprobs(inputs, mask, cfg.temperature)
        rows = [rollouts[i] for i in indices]
        for i, own in zip(indices, by_rollout(logps, mask, rows)):
            out[i] = own
    policy.reshard()  # without a backward pass the root's parameters would stay gathered
    return out


# ----- self-check: no run trains on wrong numbers in silence -----------------------------------------------

# Mean difference in nats a token that another batch, kernel or engine may make.
# In bf16 a logit of 25 is known to 0.06 only.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def check_rows(records, encode, log, count=3):
    """Up to `count` encoded records to check with: other numbers of images first, then the next ones.

    All ranks choose alike. Ends the run with the last error if none of the first 64 can be encoded.
    """
    seen, unlike, alike = set(), [], []
    for record in records[:10000]:
        images = len(record["images"])
        (alike if images in seen else unlike).append(record)
        seen.add(images)
    rows, last = [], "too long"
    for record in (unlike + alike)[:64]:
        try:
            row = encode(record)
        except ValueError as error:
            last = f"record {record['id']}: {error}"
            continue
        if row:
            rows.append(row)
        if len(rows) == count:
            break
    if not rows:
        log.fail(f"none of the first rows can be used: {last}")
    return rows


def mean_gap(a, b):
    """Mean absolute difference of two lists of tensors over all their numbers."""
    return (torch.cat(a) - torch.cat(b)).abs().mean().item()


@torch.no_grad()
def row_logprobs(policy, rows, dummy):
    """Log-probabilities of the responses of (prompt, response ids) rows in one batch: a tensor for each."""
    inputs, mask = collate(rows, dummy, 0, policy.banned.device)
    logps = policy.token_logprobs(inputs, mask)
    return logps[mask].split([len(response) for _, response in rows])


@torch.no_grad()
def own_logprobs(policy, row, dummy):
    """Log-probabilities of a row's response from the logits that the model itself returns."""
    inputs, mask = collate([row], dummy, 0, policy.banned.device)
    logits = policy(**inputs).logits[0, :-1][mask[0]].float()  # (N, V)
    logits[:, policy.banned] = -torch.inf
    targets = inputs["input_ids"][0, 1:][mask[0]]
    return logits.log_softmax(1).gather(1, targets[:, None])[:, 0]


@contextlib.contextmanager
def refusing(family, log):
    """A model that crashes on the first rows is refused in one line: it is not known here."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
        lines = str(error).strip().splitlines() or [""]
        log.fail(f"self-check: {family} cannot be trained on these rows: {type(error).__name__}: {lines[0]}; "
                 "what trains is listed in docs/reference.md, Families")


def self_check(policy, rows, dummy, log):
    """End the run before step 1 if `rows`, (prompt, response ids) of this run, show that it would go wrong.

    Four comparisons, each of log-probabilities that must be equal: train mode with eval mode (dropout, batch
    norm), with the model's own logits (soft-capping, scaling), rows in one batch with each row alone
    (positions, image features), and with another token behind (a mask that leaks).
    """
    family = policy.config.model_type
    allowed = TOLERANCE[policy.compute_dtype]

    def compare(what, a, b, hint):
        gap = mean_gap(a, b)
        if not gap <= allowed:
            log.fail(f"self-check: {what} by {gap:.2g} nats a token (allowed {allowed:g}), so {family} would "
                     f"train on wrong numbers; {hint}")

    alone = [row_logprobs(policy, [row], dummy)[0] for row in rows]

    modes = {module: module.training for module in policy.modules()}
    policy.eval()
    evaluated = [row_logprobs(policy, [row], dummy)[0] for row in rows]
    for module, training in modes.items():
        module.training = training
    compare("train mode differs from eval mode", alone, evaluated,
            "a module in train mode drops units or normalises by the batch")

    # What the configuration says of the head need not be what the model does with it.
    own = own_logprobs(policy, rows[0], dummy)
    if mean_gap([alone[0]], [own]) > allowed:
        policy.head = Head()
        alone = [row_logprobs(policy, [row], dummy)[0] for row in rows]
    compare("token_logprobs differs from the model's own logits", [alone[0]], [own],
            "its head does more than scale or cap the logits (Head in sft.py)")

    together = row_logprobs(policy, rows, dummy)
    compare("rows in one batch differ from each row alone", alone, together,
            "its inputs cannot be put together (collate in sft.py)")

    # One token behind each response, then another one; any that stand in the prompt will do.
    banned = set(policy.banned.tolist())
    known = dict.fromkeys(rows[0][0]["input_ids"][0].tolist())
    ends = []
    for last in [token for token in known if token not in banned][:2]:
        longer = row_logprobs(policy, [(prompt, [*response, last]) for prompt, response in rows], dummy)
        ends.append([logps[:-1] for logps in longer])
    compare("a later token changes the log-probability of an earlier one", *ends,
            "its mask is not causal over the response; try another --attn")

    against = why_not_packed(policy, rows, dummy, alone, allowed)
    policy.packs = not against
    log.note("a row holds " + (f"one response: {against}" if against else "a prompt with all its responses"))


def why_not_packed(policy, rows, dummy, alone, allowed):
    """Why each response needs a row of its own, "" if log-probabilities stay as they are in a common one."""
    text = policy.config.get_text_config()
    if "flash" in (getattr(text, "_attn_implementation", None) or ""):
        return "flash attention takes no mask of its own, --attn sdpa does"
    kinds = getattr(text, "layer_types", None) or []
    if set(kinds) - {"full_attention"} or not kinds and getattr(text, "sliding_window", None):
        return "not all layers look at all tokens"
    groups = [Group(prompt, [response * 2, response]) for prompt, response in rows]
    try:
        inputs, mask = collate([groups], dummy, 0, policy.banned.device)
        with torch.no_grad():
            logps = policy.token_logprobs(inputs, mask)[mask]
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
        if hasattr(policy, "reset_iter_state"):  # from torch 2.14 on
            policy.reset_iter_state()
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    sizes = [size for _, response in rows for size in (2 * len(response), len(response))]
    gap = mean_gap(alone, logps.split(sizes)[1::2])
    return "" if gap <= allowed else f"in a common one log-probabilities change by {gap:.2g} nats a token"


@contextlib.contextmanager
def shaken(policy):
    """The policy with every trained weight moved by some percent, for a moment."""
    policy.reshard()
    stream = torch.Generator().manual_seed(0)
    saved = []
    for name, p in policy.named_parameters():
        if p.requires_grad:
            shard = p.detach().to_local() if isinstance(p, DTensor) else p.detach()
            saved.append((shard, shard.cpu().clone()))
            size = shard.square().mean().sqrt().nan_to_num()  # of a small tensor a rank may hold nothing
            if name.endswith("lora_B"):  # it begins as 0; so its layer's weight moves by some percent
                size = p.shape[1] ** -0.5
            noise = torch.randn(shard.shape, generator=stream).to(shard)
            shard.add_(0.05 * (size + 1e-3) * noise)
    yield
    for shard, before in saved:
        shard.copy_(before)


# ----- optimizer -------------------------------------------------------------------------------------------


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
    matrices = {"params": [p for p in trained if p.ndim > 1], "weight_decay": cfg.weight_decay}
    vectors = {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}
    # One kernel for all tensors: one after the other they take 5 times as long here.
    optimizer = torch.optim.AdamW([matrices, vectors], lr=cfg.lr, betas=(0.9, 0.95), fused=True)
    optimizer.skipped = 0  # updates in a row, see optimizer_step
    return optimizer


def optimizer_step(policy, optimizer, lr, max_norm, log):
    """Clip the gradient, step and forget it; returns its norm before clipping, alike on all ranks.

    A gradient that is not finite is skipped; the third in a row ends the run.
    """
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    if math.isfinite(norm):
        optimizer.skipped = 0
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    else:
        optimizer.skipped += 1
    optimizer.zero_grad()
    if optimizer.skipped == 3:
        log.fail("gradient norm not finite 3 times in a row; "
                 f"the last checkpoint in {log.out} is sound, lower --lr")
    return norm


def rehearse(policy, optimizer, row, dummy, cfg, log, engine=False, reference=False):
    """Run a micro-batch as large as --token_budget allows forward and backward: out of memory shows now.

    row: the longest (for `collate`) that this run can tell before it starts. All ranks alike. The estimate
    stands before it (describe), for those whom it ends.
    """
    length = sum(map(len, as_groups(row)))
    cost = computed(length, attention_scale(policy.config))
    rows = [row] * max(1, int(cfg.token_budget / cost))  # a row beyond the budget runs alone
    size = f"{len(rows)} row(s) of {length} tokens"
    log.note(describe(policy, rows, cfg, engine, reference))
    try:
        inputs, mask = collate(rows, dummy, 0, policy.banned.device)
        policy.token_logprobs(inputs, mask).mean().backward()
    except torch.OutOfMemoryError as error:
        log.fail(f"the largest micro-batch, {size}, does not fit: lower --token_budget, or add "
                 f"--gradient_checkpointing or ranks ({str(error).splitlines()[0]})")
    optimizer.zero_grad()
    log.note(f"largest micro-batch, {size}: peak {peak_memory(policy.banned.device):.2f} GiB so far, AdamW's "
             "moments come with the first update")


class Watchdog:
    """Dumps the stacks of all threads and ends the process when a step takes `factor` times the median.

    A collective that waits for a rank that died, or a server that never answers, would otherwise cost days.
    """
    LEAST = 600  # seconds that any step may take
    FIRST = 3600  # the first one also warms up

    def __init__(self, factor):
        self.factor = factor
        self.steps = []
        self.last = time.time()
        self.wait(self.FIRST)

    def wait(self, seconds):
        if self.factor:
            faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)

    def step(self):
        """Call once a step."""
        now = time.time()
        self.steps.append(now - self.last)
        self.last = now
        self.wait(max(self.LEAST, self.factor * statistics.median(self.steps[-100:])))

    def done(self):
        faulthandler.cancel_dump_traceback_later()


class Stopwatch:
    """Wall seconds by name: lap("time/gen") adds those since the lap before it."""

    def __init__(self):
        self.began = self.last = time.time()
        self.laps = {}

    def lap(self, name):
        now = time.time()
        self.laps[name] = self.laps.get(name, 0.0) + now - self.last
        self.last = now

    def total(self):
        return self.last - self.began


def host_memory():
    """GiB of host memory that this process holds now; a number that grows is a leak."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # no Linux: the largest so far
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return pages * resource.getpagesize() / 2**30


def peak_memory(device):
    """GiB at most so far: of the GPU, or of this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# ----- the run directory -----------------------------------------------------------------------------------


# What a resumed run may change: how long, how fast and where it runs. Other flags make it another run.
MAY_CHANGE = {
    "out", "resume", "strict", "steps", "epochs", "lr", "warmup", "schedule", "lr_floor",
    "engine", "tp", "gpu_memory_utilization", "servers", "judge_url", "workers",
    "token_budget", "rollout_tokens",
    "gradient_checkpointing", "cpu_offload", "shard_ranks", "attn",
    "eval_data", "eval_every", "eval_n", "save_every", "samples_every", "keep",
    "stall", "dist_timeout", "timeout", "reward_timeout", "max_mismatch",  # when to give up
    "log",
    "tau",  # filters what has been sampled
}


def check_same_run(cfg):
    """Refuse to resume a run with flags that would make it another one. Raises ValueError or OSError."""
    path = Path(cfg.out) / "config.json"
    saved = read_json(path).get("config")
    if not isinstance(saved, dict):
        raise ValueError(f"{path}: no flags under \"config\"")
    changed = []
    for field in dataclasses.fields(cfg):
        new = getattr(cfg, field.name)
        if isinstance(new, tuple):
            new = list(new)  # as JSON has it
        # A flag that is newer than the run had no effect on it, as its default has none.
        old = saved.get(field.name, field.default)
        if old != new and field.name not in MAY_CHANGE:
            changed.append(f"--{field.name} was {old!r}, is {new!r}")
    if changed:
        raise ValueError(f"{cfg.out} cannot be resumed with other flags: " + "; ".join(changed))


LOCKS = []  # open files: a lock is held until this process ends, however it ends


def claim(path):
    """Be the only process that writes into a folder or a file. Raises ValueError if another does, OSError.

    POSIX locks stay with the process: forked workers do not inherit them, unlike those of flock.
    """
    path = Path(path)
    lock = open(path / "lock" if path.is_dir() else f"{path}.lock", "a+")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        raise ValueError(f"{path}: another run writes into it ({lock.read().strip()})")
    except OSError as error:
        print(f"{path} cannot be locked ({error.strerror}): no other run may write into it")
    LOCKS.append(lock)
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()


def open_run(cfg, device, need):
    """What every trainer opens with: data, policy and optimizer, new or from the newest step of --out.

    need: the fields that training data must have. Returns a namespace: origin (the start model, also when
    resuming), records, held_out, policy, processor, optimizer, done (steps), extras (of load_checkpoint).
    Raises ValueError or OSError.
    """
    world = dist.get_world_size()
    if cfg.shard_ranks < 0 or cfg.shard_ranks and world % cfg.shard_ranks:
        raise ValueError(f"--shard_ranks {cfg.shard_ranks} does not divide the {world} rank(s) of this run")
    writers()
    if cfg.log != "off" and not importlib.util.find_spec(cfg.log):
        raise ValueError(f"--log {cfg.log}: pip install {cfg.log}")
    start = newest_step(cfg.out) if cfg.resume else None
    if start:
        check_same_run(cfg)
    if (cfg.lora_alpha or cfg.lora_targets) and not cfg.lora_rank:
        raise ValueError("--lora_alpha and --lora_targets are for LoRA: add --lora_rank 16, say")
    adapts = start and cfg.lora_rank  # an adapter goes on beside the weights that it began with
    origin = begun_with(start) if adapts else resolve_model(cfg.model)
    folder = Path(origin).resolve()
    if not cfg.resume and Path(cfg.out).resolve() in [folder, *folder.parents]:
        raise ValueError(f"--out {cfg.out} holds the model to start from: name another --out, or --resume")
    if dist.get_rank() == 0 and Path(cfg.out).is_dir():
        claim(cfg.out)
    records = read_records(cfg.data, need=need)
    # The default held-out file belongs to the default data.
    usual = type(cfg)
    foreign = cfg.data != usual.data and cfg.eval_data == usual.eval_data
    held_out = []
    if foreign and dist.get_rank() == 0:
        print(f"no evaluation: {usual.eval_data} belongs to the default --data; name another --eval_data")
    elif cfg.eval_data and not foreign:
        held_out = read_records(cfg.eval_data, need=need, limit=cfg.eval_n)
    path = origin if adapts else start or origin
    try:
        policy, processor = load_policy(path, cfg, device)
        optimizer = make_optimizer(policy, cfg)
        path = start or origin
        done, extras = load_checkpoint(start, policy, optimizer) if start else (0, [])
    except (ValueError, OSError) as error:
        reason = first_reason(error)
        if not reason.startswith("--"):  # a wrong flag is no fault of the checkpoint's
            reason += instead_of(Path(path))
        raise ValueError(reason) from error
    return SimpleNamespace(origin=origin, records=records, held_out=held_out, policy=policy,
                           processor=processor, optimizer=optimizer, done=done, extras=extras)


def begun_with(step):
    """The start model of a checkpoint's adapter; --model may be a run that has a newer step by now."""
    path = step / "adapter/adapter_config.json"
    origin = read_json(path).get("base_model_name_or_path")
    if not isinstance(origin, str):
        raise ValueError(f"{path} names no base_model_name_or_path" + instead_of(step))
    return resolve_model(origin)


def whole(p, device, dtype=None):
    """A parameter as one tensor on `device`, cast to `dtype` before it travels. Collective."""
    # A shard in host memory (--cpu_offload) would travel over gloo, at 0.2 GB/s.
    weight = p.detach().to(device).to(dtype or p.dtype)
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def full_weights(policy, dtype=None, frozen=True):
    """Iterate over (name, whole tensor) of the policy's weights. Collective: all ranks gather each.

    They are cast to `dtype` before they travel; with frozen=False only those that training changes are given.
    An adapter is merged into its layer's weight.
    """
    policy.reshard()  # a forward without backward leaves the root's parameters gathered, in compute dtype
    device, adapted = policy.banned.device, {}
    for name, module in policy.named_modules():
        if isinstance(module, LoRALinear):
            adapted[f"{name}.weight"] = module
    for name, p in policy.named_parameters():
        if name in adapted:
            yield name, merged(adapted[name], device).to(dtype or p.dtype)
        elif (p.requires_grad or frozen) and not is_adapter(name):
            yield name, whole(p, device, dtype)


def checkpoint_names(policy, weights):
    """Iterate over (name, tensor) as a checkpoint of the family holds them: renamed, split or merged.

    Some families' checkpoints hold queries, keys and values as one: then a layer is converted at once.
    """
    conversions = getattr(policy, "_weight_conversions", None) or []
    merges = any(len(conversion.target_patterns) > 1 for conversion in conversions)
    part = re.compile(r".*?\.\d+\.|.+" if merges else ".+")
    for _, together in itertools.groupby(weights, lambda named: part.match(named[0])[0]):
        yield from revert_weight_conversion(policy, dict(together)).items()


WEIGHTS = re.compile(r"model[\w.-]*\.safetensors")  # files of HF weights, and their index
SHARD_BYTES = 5 * 10**9  # of a safetensors file, at most, and of what is collected before it is written


def own_gpu():
    """A new thread starts with GPU 0, where libraries would set up house for each rank of a node."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))


WRITER = concurrent.futures.ThreadPoolExecutor(1, initializer=own_gpu)  # writes while the run goes on
WRITING = []  # the job of the checkpoint that is being written


@functools.cache
def writers():
    """The ranks as another process group: there, and only there, the slowest disk is waited for, for a day.

    Made at start: ranks meet at torchrun to make one, and those that lose torchrun still save.
    """
    return dist.new_group(timeout=timedelta(days=1), backend="gloo")


def save_checkpoint(cfg, step, policy, processor, optimizer, extra=None, wait=True):
    """Write out/step_000200, complete or not at all: HF weights and processor, trainer/, meta.json.

    HF weights are in compute dtype, as users load them. With LoRA they are merged and the newest step's
    alone, while each has its adapters (write_adapter). trainer/ has the optimizer's moments and, if those
    weights lack digits, the masters: sharded, for any number of ranks to go on from. `extra` is what else
    this rank needs for that, of plain containers and tensors.

    Everything goes to step_000200.tmp, is fsynced and renamed; only then are checkpoints beyond cfg.keep
    removed. With wait=False that is done from a copy, while the run goes on (not with --cpu_offload: host
    memory has no room for a second set). With several nodes --out must be on a file system they share.
    What cannot be written raises OSError on all ranks, here or in finish_checkpoint, and fills STOPPING, so
    that the loop gets there; earlier checkpoints stay as they are.
    """
    finish_checkpoint()
    wait = wait or cfg.cpu_offload
    tmp = Path(cfg.out) / f"step_{step:06d}.tmp"
    with written_by_all(tmp):
        if dist.get_rank() == 0:
            shutil.rmtree(tmp, ignore_errors=True)
            tmp.mkdir()
            policy.config.dtype = policy.compute_dtype
            policy.config.architectures = [type(policy).__name__.removeprefix("FSDP")]
            policy.config.save_pretrained(tmp)
            policy.generation_config.save_pretrained(tmp)
            processor.save_pretrained(tmp)
    files = write_weights(tmp, policy)
    if cfg.lora_rank:
        files += write_adapter(tmp, policy, cfg)
    state = trainer_state(policy, optimizer)
    state = {name: value.to("cpu", copy=not wait) for name, value in state.items()}
    held = io.BytesIO()  # the run will change what `extra` is made of
    if extra is not None:
        torch.save(extra, held)
    job = WRITER.submit(complete_checkpoint, tmp, step, cfg.keep, files, state, held.getvalue())
    job.add_done_callback(lambda job: job.exception() and STOPPING.append(time.monotonic()))
    WRITING.append(job)
    if wait:
        finish_checkpoint()


def finish_checkpoint():
    """Wait for the checkpoint that is being written, if one is. Raises what it failed of, OSError."""
    while WRITING:
        WRITING.pop().result()


def write_weights(tmp, policy):
    """Gather the weights, one tensor at a time, and have WRITER write them as save_pretrained would.

    Ranks take turns, a file each; one with three in memory waits for its disk. Returns its jobs. Collective.
    """
    kept = policy.state_dict()  # lacks those buffers that the configuration gives
    buffers = {name: buffer for name, buffer in policy.named_buffers() if name in kept}

    # Which name goes into which file, from shapes alone.
    shapes = {name: buffer.to("meta") for name, buffer in buffers.items()}
    for name, p in policy.named_parameters():
        if not is_adapter(name):  # it is merged
            shapes[name] = torch.empty(p.shape, dtype=policy.compute_dtype, device="meta")
    shapes = revert_weight_conversion(policy, shapes)
    plan = split_torch_state_dict_into_shards(shapes, max_shard_size=SHARD_BYTES)
    rank, world = dist.get_rank(), dist.get_world_size()
    jobs = []
    if plan.is_sharded and rank == 0:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        jobs.append(WRITER.submit(write_json, tmp / "model.safetensors.index.json", index))
    own = list(plan.filename_to_tensors)[rank::world]
    files = {file: {} for file in own}
    weights = itertools.chain(full_weights(policy, policy.compute_dtype), buffers.items())
    for name, weight in checkpoint_names(policy, weights):
        file = plan.tensor_to_filename[name]
        if file not in files:
            continue
        files[file][name] = torch.empty(weight.shape, dtype=weight.dtype).copy_(weight)
        if len(files[file]) == len(plan.filename_to_tensors[file]):
            concurrent.futures.wait(jobs[:-1])
            jobs.append(WRITER.submit(save_file, files.pop(file), tmp / file, {"format": "pt"}))
    return jobs


def trainer_state(policy, optimizer):
    """{parameter/key: tensor}, this rank's shards: AdamW's moments, and masters that HF weights lack."""
    state = {}
    for name, p in policy.named_parameters():
        kept = dict(optimizer.state.get(p, {}))
        if p.requires_grad and (p.dtype != policy.compute_dtype or is_adapter(name)):
            kept["master"] = p.detach()
        for key, value in kept.items():
            state[f"{name}/{key}"] = value
    return state


def complete_checkpoint(tmp, step, keep, files, state, extra):
    """What WRITER does when `files`, its jobs, are written: the rest, and the rename. Collective."""
    rank, final = dist.get_rank(), tmp.with_suffix("")
    with written_by_all(tmp):
        for job in files:
            job.result()
    with written_by_all(tmp):
        dcp.save(state, checkpoint_id=tmp / "trainer", process_group=writers())
        if extra:
            (tmp / f"trainer/extra_rank{rank}.pt").write_bytes(extra)
    with written_by_all(tmp):
        if rank == 0:
            for path in tmp.rglob("*"):
                fsync(path)
            meta = {"step": step, "world_size": dist.get_world_size(), "files": file_sizes(tmp)}
            write_json(tmp / "meta.json", meta)
            fsync(tmp / "meta.json")
            fsync(tmp)
            tmp.rename(final)
            fsync(final.parent)
            complete = sorted(final.parent.glob("step_??????"))
            for old in complete[:-keep]:
                shutil.rmtree(old.rename(old.with_suffix(".tmp")))  # half removed, it is not complete
            for old in complete[-keep:-1]:
                if (old / "adapter").is_dir():
                    drop_weights(old)


def drop_weights(step):
    """Take the merged weights off a checkpoint of LoRA; first off meta.json: it is complete at any moment."""
    meta = read_json(step / "meta.json")
    meta["files"] = {name: size for name, size in meta["files"].items() if not WEIGHTS.match(name)}
    meta["adapter_only"] = True
    write_json(step / "meta.json", meta)
    for path in step.iterdir():
        if WEIGHTS.match(path.name):
            path.unlink()


@contextlib.contextmanager
def written_by_all(tmp):
    """What one rank fails to write all give up, and rank 0 removes it, or a full disk stays full. Collective.

    Raises OSError on all ranks, with the path and the reason.
    """
    fault = None
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
        fault = first_reason(error)
    met = [fault for fault in gather(fault, writers()) if fault]
    if met:
        free = shutil.disk_usage(tmp.parent).free
        dist.barrier(writers())
        if dist.get_rank() == 0:
            shutil.rmtree(tmp, ignore_errors=True)
        raise OSError(f"{tmp} cannot be written, {free / 2**20:.0f} MiB free: {met[0]}; "
                      "earlier checkpoints are intact")


def first_reason(error):
    """The first line of an error, which may be long; of several ranks' errors, that of the first."""
    if isinstance(error, CheckpointException) and error.failures:
        error, _ = next(iter(error.failures.values()))
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def file_sizes(folder):
    """{name: bytes} of all files below a folder: newest_step knows a damaged checkpoint by it."""
    sizes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            sizes[str(path.relative_to(folder))] = path.stat().st_size
    return sizes


def fsync(path):
    """Have a file, or the names in a folder, on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_checkpoint(path, policy, optimizer):
    """Restore what save_checkpoint's trainer/ has (HF weights came with load_policy), by any number of ranks.

    Returns (step, extras), the `extra` of those ranks at saving that this rank stands for now: its own, with
    as many ranks; else each goes to one rank, and some may get none. There is no random state: what a step
    draws is a function of the seed. Raises ValueError naming what cannot be read.
    """
    with readable_file(path / "meta.json"):
        meta = read_json(path / "meta.json")
        step, saved_ranks = meta["step"], meta["world_size"]
    folder = path / "trainer"
    if not folder.is_dir():
        raise ValueError(f"{path} is of an earlier release: it may be a --model, but not be resumed")
    params = dict(policy.named_parameters())
    with readable_file(folder / ".metadata"):
        saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {}
    files = sorted(folder.glob("*.distcp"))
    with readable_file(files[0] if len(files) == 1 else folder):
        for entry in saved:
            name, _, key = entry.rpartition("/")
            like = params[name].detach()
            if key == "step":
                state[entry] = torch.zeros((), device=like.device)
            else:
                state[entry] = like if key == "master" else torch.zeros_like(like)
        dcp.load(state, checkpoint_id=folder)
    for entry, value in state.items():
        name, _, key = entry.rpartition("/")
        if key != "master":  # those were loaded into the policy itself
            optimizer.state[params[name]][key] = value

    extras = []
    for rank in range(dist.get_rank(), saved_ranks, dist.get_world_size()):
        file = folder / f"extra_rank{rank}.pt"
        if file.exists():
            with readable_file(file):
                extras.append(torch.load(file, map_location="cpu", weights_only=True))
    return step, extras


@contextlib.contextmanager
def readable_file(path):
    """Whatever a damaged file raises becomes a ValueError that names it."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        raise ValueError(f"{path} cannot be read: {first_reason(error)[:100]}") from error


class RunLog:
    """Writes config.json, the JSON lines of a run and the progress bar, on rank 0.

    A new run moves an existing directory aside; a resumed one drops the lines written after its checkpoint,
    and ends here if it has no step left. Raises ValueError or OSError.
    """

    def __init__(self, cfg, done=0):
        self.out, self.rank = Path(cfg.out), dist.get_rank()
        if done >= cfg.steps:
            if self.rank == 0:
                print(f"{self.out} is at step {done} of {cfg.steps}: nothing is left to do")
            sys.exit(0)
        if self.rank == 0:
            if self.out.exists() and not cfg.resume:
                claim(self.out)
                self.move_aside()
            self.out.mkdir(parents=True, exist_ok=True)
            claim(self.out)
            for unfinished in self.out.glob("step_??????.tmp"):
                shutil.rmtree(unfinished)
            for name in ("metrics.jsonl", "samples.jsonl", "rationales.jsonl"):
                if (self.out / name).exists():
                    self.drop_lines_after(done, self.out / name)
            self.write_config(cfg)
            self.track = tracker(cfg, done)
        # Piped into a file, a line every ten seconds is enough.
        self.bar = tqdm(total=cfg.steps, initial=done, disable=self.rank > 0, dynamic_ncols=True,
                        mininterval=0.2 if sys.stderr.isatty() else 10)
        dist.barrier()

    def move_aside(self):
        for i in itertools.count(1):
            aside = self.out.with_name(f"{self.out.name}.old{i}")
            if not aside.exists():
                break
        self.out.rename(aside)
        print(f"{self.out} existed: moved to {aside}")

    def drop_lines_after(self, done, path):
        kept = []
        for number, row in enumerate(complete_rows(path) if done else [], 1):
            if "step" not in row:
                raise ValueError(f"{path} line {number}: no 'step'")
            if row["step"] <= done:
                kept.append(row)
        write_text(path, [json.dumps(row) + "\n" for row in kept])

    def write_config(self, cfg):
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent,
                             capture_output=True, text=True)
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        config = {"config": dataclasses.asdict(cfg), "argv": sys.argv, "git": git.stdout.strip(),
                  "world_size": dist.get_world_size(), "versions": versions}
        write_json(self.out / "config.json", config)

    def note(self, text):
        """Print a line above the progress bar."""
        if self.rank == 0:
            self.bar.write(text)

    def fail(self, text):
        """End this process with one line."""
        self.bar.close()
        fail(text)

    def write(self, name, rows):
        """Append rows to a file of JSON lines; what cannot be written ends the run."""
        if self.rank > 0:
            return
        path = self.out / name
        lines = [json.dumps(row) + "\n" for row in rows]
        try:
            with open(path, "a") as f:
                f.writelines(lines)
        except OSError as error:
            self.fail(f"{path} cannot be written: {error.strerror}")
        if self.track:
            self.track(name, rows)

    def step(self, step, metrics, shown):
        """Write a step's metrics; those in `shown` stand beside the progress bar."""
        self.write("metrics.jsonl", [{"step": step, **metrics}])
        beside = {name: f"{metrics[name]:.3g}" for name in shown if name in metrics}
        self.bar.set_postfix(beside, refresh=False)
        self.bar.update()


def tracker(cfg, done):
    """What rows of a run's files are told to as well, by --log; None = nothing. The files stay the record.

    A resumed run goes on with its curve.
    """
    if cfg.log == "wandb":
        return wandb_tracker(cfg)
    return tensorboard_tracker(cfg, done) if cfg.log == "tensorboard" else None


def wandb_tracker(cfg):
    import wandb
    name = Path(cfg.out) / "wandb_id.txt"  # a new run has a new folder
    known = name.read_text() if name.exists() else None
    run = wandb.init(project="nanovlr", name=cfg.out, id=known, resume="allow",
                     config=dataclasses.asdict(cfg))
    name.write_text(run.id)

    def track(name, rows):
        for row in rows if name == "metrics.jsonl" else []:
            run.log(row, step=row["step"])
        if name == "samples.jsonl" and rows:
            table = wandb.Table(columns=list(rows[0]), data=[list(map(str, row.values())) for row in rows])
            run.log({"samples": table}, step=rows[0]["step"])

    return track


def tensorboard_tracker(cfg, done):
    from torch.utils.tensorboard import SummaryWriter
    # What an interrupted run logged after its checkpoint is not shown.
    writer = SummaryWriter(Path(cfg.out) / "tensorboard", purge_step=done + 1 if done else None)
    writer.add_text("config", f"```\n{json.dumps(dataclasses.asdict(cfg), indent=1)}\n```")

    def track(name, rows):
        for row in rows:
            if name == "metrics.jsonl":
                for key, value in row.items():
                    writer.add_scalar(key, value, row["step"])
            elif name == "samples.jsonl":
                writer.add_text(name, f"```\n{json.dumps(row, indent=1)}\n```", row["step"])

    return track


class Means:
    """Means by name over all ranks. The names are fixed, since a rank may have nothing to add."""

    def __init__(self, *names):
        self.sums = dict.fromkeys(names, 0.0)
        self.counts = dict.fromkeys(names, 0)

    def add(self, name, value, count=1):
        self.sums[name] += float(value)
        self.counts[name] += count

    def over_ranks(self):
        sums = global_sum(list(self.sums.values()))
        counts = global_sum(list(self.counts.values()))
        means = {}
        for name, total, count in zip(self.sums, sums, counts):
            means[name] = total / max(1.0, count)
        return means


# ----- this stage ------------------------------------------------------------------------------------------


def losses(policy, rows, dummy, cfg):
    """Yield of each micro-batch of `rows` the summed negative log-likelihood and which tokens are real."""
    groups = [Group(prompt, [response]) for prompt, response in rows]
    for _, inputs, mask in group_batches(groups, policy, dummy, cfg.token_budget):
        yield -policy.token_logprobs(inputs, mask).sum(), inputs["attention_mask"]


@torch.no_grad()
def evaluate(policy, rows, dummy, cfg):
    """Mean negative log-likelihood per response token of held-out rows; each rank holds its share."""
    total = sum(loss.item() for loss, _ in losses(policy, rows, dummy, cfg))
    tokens = sum(len(response) for _, response in rows)
    total, tokens = global_sum([total, tokens])
    return {"eval/loss": total / max(1, tokens)}


def main(cfg):
    """Train: draw rows, update, log, evaluate and save."""
    rank, world, device = init_distributed(cfg.dist_timeout)
    end_on_signals()
    with one_line_errors():
        check_at_least(1, cfg, "steps", "batch_size", "token_budget", "max_tokens", "eval_every", "eval_n",
                       "save_every", "keep")
        check_at_least(-1, cfg, "workers")
        run = open_run(cfg, device, need=("response",))
        if cfg.epochs:
            steps = round(cfg.epochs * len(run.records) / cfg.batch_size)
            cfg = dataclasses.replace(cfg, steps=max(1, steps))
        dtype = run.policy.compute_dtype
        dummy = blank_prompt(run.processor, cfg.max_pixels, dtype)
        log = RunLog(cfg, run.done)
    policy, processor, optimizer, records = run.policy, run.processor, run.optimizer, run.records
    everything = records + run.held_out
    stop = stop_ids(policy.generation_config, processor)[0]
    encode = functools.partial(encode_row, processor=processor, stop=stop, banned=set(policy.banned.tolist()),
                               dtype=dtype, cfg=cfg)
    workers = Workers(lambda i, _: encode(everything[i]), cfg.workers)
    epochs = cfg.steps * cfg.batch_size / len(records)
    log.note(f"{len(records)} rows; {cfg.steps} steps of {cfg.batch_size} on {world} rank(s) "
             f"= {epochs:.2f} epochs; images are prepared by {len(workers.crew)} process(es) a rank")
    rows = check_rows(records, encode, log)
    with refusing(policy.config.model_type, log):
        self_check(policy, rows, dummy, log)
        longest = max(rows, key=lambda row: row[0]["input_ids"].shape[1] + len(row[1]))
        rehearse(policy, optimizer, longest, dummy, cfg, log)
    log.note("self-check passed")

    # Held-out rows stay encoded in memory; each rank has every world-th.
    held_out = []
    share = range(len(records), len(everything))[rank::world]
    for drawn in workers.prepared([share]):
        rows = readable(drawn, everything, cfg.strict, log)
        held_out += [row for row in rows.values() if row]

    order = data_order(len(records), cfg.batch_size, run.done, cfg.steps, cfg.seed)
    shares = [drawn[rank::world] for drawn in order]
    drawn_ahead = workers.prepared(shares)
    stopping = catch_signals()
    watchdog, watch = Watchdog(cfg.stall), Stopwatch()
    for step, drawn in enumerate(drawn_ahead, run.done + 1):
        watch.lap("time/data")

        # 1. draw this rank's rows; their images were prepared in the background
        rows = [row for row in readable(drawn, records, cfg.strict, log).values() if row]
        if step == run.done + 1 and rows:
            prompt, response = rows[0]
            shown = processor.tokenizer.decode(prompt["input_ids"][0])
            learnt = processor.tokenizer.decode(response)
            log.note(f"first row, what is learnt in [[ ]]: {shown}[[{learnt}]]")

        # 2. update, with the denominator counted over all ranks before the first backward
        tokens = sum(len(response) for _, response in rows)
        tokens, left_out, stop_now = global_sum([tokens, len(drawn) - len(rows), len(stopping)])
        if not tokens:
            log.fail(f"step {step}: none of its rows can be used (--max_tokens {cfg.max_tokens}, images, "
                     f"placeholders); see the lines above, or python data_prep.py --source records")
        total, real, padded_to = 0.0, 0, 0
        for loss, attention in losses(policy, rows, dummy, cfg):
            # FSDP averages gradients over ranks; here their sum is divided by the common token count instead.
            (loss * world / max(1, tokens)).backward()
            total += loss.detach()
            real += attention.sum()
            padded_to += attention.numel()
        norm = optimizer_step(policy, optimizer, lr_at(step, cfg), cfg.max_grad_norm, log)
        watch.lap("time/train")

        # 3. log
        total, real, padded_to = global_sum([float(total), int(real), padded_to])
        nll = total / max(1, tokens)
        metrics = {"loss/nll": nll, "optim/lr": lr_at(step, cfg), "optim/grad_norm": norm,
                   "tokens/train": tokens, "mem/padding": 1 - real / padded_to, "data/left_out": left_out,
                   **watch.laps, "time/step": watch.total(),
                   "mem/peak_gb": peak_memory(device), "mem/host_gb": host_memory()}

        # 4. evaluate and save
        if run.held_out and (step % cfg.eval_every == 0 or step == cfg.steps):
            metrics |= evaluate(policy, held_out, dummy, cfg)
            log.note(f"step {step}: loss {nll:.4f}, held-out loss {metrics['eval/loss']:.4f}")
        log.step(step, metrics, shown=("loss/nll", "eval/loss"))
        if step % cfg.save_every == 0 or step == cfg.steps or stop_now:
            with one_line_errors():
                save_checkpoint(cfg, step, policy, processor, optimizer,
                                wait=stop_now or step == cfg.steps)
        if stop_now:
            log.note(f"interrupted: saved step {step}; go on with --resume")
            break
        watchdog.step()
        watch = Stopwatch()
    watchdog.done()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(parse_config(Config))
