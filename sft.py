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
import dataclasses
import functools
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
from dataclasses import dataclass
from pathlib import Path
from types import MethodType

import torch
import torch.distributed as dist
import transformers
from PIL import Image
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.modeling_layers import GradientCheckpointingLayer

from data_prep import build_messages, load_image, newest_step, parse_config, read_records, resolve_model


@dataclass(frozen=True)
class Config:
    # i/o
    model: str = "out/tiny"  # Hub id, model folder or run directory to start from
    data: str = "data/mini/counting_train.jsonl"  # records with a response: file or Hub id in a known format
    out: str = "out/sft"  # run directory
    resume: bool = False  # go on from the newest complete step of --out
    strict: bool = False  # stop at an unreadable image instead of skipping its row
    seed: int = 0  # data order
    # optimisation
    steps: int = 400  # optimizer steps
    epochs: float = 0.0  # passes over the data instead of --steps, 0 = use --steps
    batch_size: int = 32  # rows per step, over all ranks
    lr: float = 2e-3  # peak learning rate (1e-5 is usual for a 7B model)
    warmup: int = 30  # steps of linear warm-up
    schedule: str = "cosine"  # cosine | linear | constant
    lr_floor: float = 0.02  # final learning rate as a share of the peak (cosine, linear)
    weight_decay: float = 0.0  # AdamW
    max_grad_norm: float = 1.0  # gradient clipping
    token_budget: int = 16384  # padded tokens in a micro-batch
    max_tokens: int = 8192  # rows with more tokens, prompt and response, are left out
    # memory and model
    workers: int = 1  # processes that prepare images, per rank
    max_pixels: int = 1003520  # larger images are scaled down to this many pixels
    freeze_vision: bool = False  # train the language model only
    param_dtype: str = "fp32"  # weights and AdamW moments: fp32 | bf16
    gradient_checkpointing: bool = False  # redo activations in backward: less memory, a third more compute
    cpu_offload: bool = False  # keep weights and moments in host memory
    attn: str = "sdpa"  # attention: sdpa | flash_attention_2 | flash_attention_3 | flex_attention | eager
    # cadence
    eval_data: str = "data/mini/counting_id.jsonl"  # held-out records with a response, "" = no evaluation
    eval_every: int = 100  # steps between evaluations
    eval_n: int = 200  # held-out rows used
    save_every: int = 100  # steps between checkpoints (one is always written at the end)
    keep: int = 1  # checkpoints kept


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


def encode_row(record, processor, stop, banned, cfg):
    """(prompt tensors, response ids with the stop token); None if over cfg.max_tokens. Raises BadImage."""
    prompt = encode_prompt(record, processor, cfg.max_pixels)
    del prompt["request"]  # its images would travel from the worker unused
    response = processor.tokenizer(record["response"], add_special_tokens=False)["input_ids"] + stop[:1]
    if banned & set(response):
        raise ValueError(f"row {record['id']}: the response holds a vision placeholder token")
    return (prompt, response) if prompt["input_ids"].shape[1] + len(response) <= cfg.max_tokens else None


def usable(drawn, records, log, cfg):
    """Rows without those that cannot be encoded (an unreadable image) or have too many tokens."""
    for i, row in drawn:
        if isinstance(row, ValueError):
            if cfg.strict:
                log.fail(row)
            log.note(f"row {records[i]['id']} skipped: {row}")
        elif row:
            yield row


def losses(policy, rows, dummy, cfg):
    """Yield the summed negative log-likelihood of each micro-batch of `rows`."""
    for group in micro_batches([p["input_ids"].shape[1] + len(r) for p, r in rows], cfg.token_budget):
        inputs, mask = collate([rows[i] for i in group], dummy, 0, policy.banned.device)
        yield -policy.token_logprobs(inputs, mask).sum()


@torch.no_grad()
def evaluate(policy, rows, dummy, cfg):
    """Mean negative log-likelihood per response token of held-out rows; each rank holds its share."""
    policy.eval()
    total = sum(loss.item() for loss in losses(policy, rows, dummy, cfg))
    total, tokens = global_sum([total, sum(len(r) for _, r in rows)])
    policy.train()
    return {"eval/loss": total / max(1, tokens)}


def check(cfg):
    """Refuse what cannot train. Raises ValueError naming the flag."""
    for flag in ("steps", "batch_size", "token_budget", "max_tokens", "eval_every", "eval_n", "save_every",
                 "keep"):
        if getattr(cfg, flag) < 1:
            raise ValueError(f"--{flag} must be at least 1")


def main(cfg):
    """Train: draw rows, update, log, evaluate and save."""
    rank, world, device = init_distributed()
    try:
        check(cfg)
        start = newest_step(cfg.out) if cfg.resume else None
        first = start or resolve_model(cfg.model)
        origin = Path(first).resolve()
        if not cfg.resume and Path(cfg.out).resolve() in [origin, *origin.parents]:
            raise ValueError(f"--out {cfg.out} holds the model to start from: "
                             "name another --out, or --resume")
        records = read_records(cfg.data, need=("response",))
        if cfg.epochs:
            cfg = dataclasses.replace(cfg, steps=max(1, round(cfg.epochs * len(records) / cfg.batch_size)))
        # The default held-out file belongs to the default data.
        eval_data = cfg.eval_data if cfg.data == Config.data or cfg.eval_data != Config.eval_data else ""
        held_out = read_records(eval_data, need=("response",), limit=cfg.eval_n) if eval_data else []
        policy, processor = load_policy(first, cfg, device)
        optimizer = make_optimizer(policy, cfg)
        done = load_checkpoint(start, policy, optimizer)[0] if start else 0
        log = RunLog(cfg, done)
    except (ValueError, OSError) as e:
        sys.exit(f"{Path(sys.argv[0]).name}: {str(e).strip().splitlines()[0]}")
    encode = functools.partial(encode_row, processor=processor,
                               stop=stop_ids(policy.generation_config, processor),
                               banned=set(policy.banned.tolist()), cfg=cfg)
    blank = {"question": "", "images": [Image.new("RGB", (56, 56))], "answer_type": "text"}
    dummy = encode_prompt(blank, processor, cfg.max_pixels)
    log.note(describe(policy, cfg, 0))
    epochs = cfg.steps * cfg.batch_size / len(records)
    log.note(f"{len(records)} rows; {cfg.steps} steps of {cfg.batch_size} on {world} rank(s) "
             f"= {epochs:.2f} epochs")
    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    share = [list(range(rank, len(held_out), world))]
    held_out = [row for drawn in prepared(share, lambda i: encode(held_out[i]), cfg.workers)
                for row in usable(drawn, held_out, log, cfg)]
    plan = schedule(len(records), cfg.batch_size, done, cfg.steps, cfg.seed)
    mine = prepared([drawn[rank::world] for drawn in plan], lambda i: encode(records[i]), cfg.workers)
    failures = 0
    for step, drawn in enumerate(mine, done + 1):
        began = time.time()

        # 1. draw this rank's rows; their images were prepared in the background
        rows = list(usable(drawn, records, log, cfg))
        if step == done + 1 and rows:
            shown = [processor.tokenizer.decode(ids) for ids in (rows[0][0]["input_ids"][0], rows[0][1])]
            log.note("first row, what is learnt in [[ ]]: {}[[{}]]".format(*shown))

        # 2. update, with the denominator counted over all ranks before the first backward
        counts = [sum(len(r) for _, r in rows), len(drawn) - len(rows), len(stopping)]
        tokens, left_out, stop_now = global_sum(counts)
        total = 0.0
        for loss in losses(policy, rows, dummy, cfg):
            # FSDP averages gradients over ranks; here their sum is divided by the common token count instead.
            (loss * world / max(1, tokens)).backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, cfg)
        if math.isfinite(norm) and tokens:
            optimizer.step()
        optimizer.zero_grad()
        failures = 0 if math.isfinite(norm) else failures + 1
        if failures >= 3:
            log.fail(f"step {step}: gradient norm not finite {failures} times in a row; "
                     f"the last checkpoint in {cfg.out} is sound, lower --lr")

        # 3. log
        metrics = {"loss/nll": global_sum([total])[0] / max(1, tokens),
                   "optim/lr": lr_at(step, cfg), "optim/grad_norm": norm,
                   "tokens/train": tokens, "data/left_out": left_out, "time/step": time.time() - began,
                   "mem/peak_gb": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda"
                   else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}

        # 4. evaluate and save
        if eval_data and (step % cfg.eval_every == 0 or step == cfg.steps):
            metrics |= evaluate(policy, held_out, dummy, cfg)
            log.note(f"step {step}: loss {metrics['loss/nll']:.4f}, held-out loss {metrics['eval/loss']:.4f}")
        log.step(step, metrics, ("loss/nll", "eval/loss"))
        if step % cfg.save_every == 0 or step == cfg.steps or stop_now:
            save_checkpoint(cfg, step, policy, processor, optimizer)
        if stop_now:
            log.note(f"SIGTERM: saved step {step}; go on with --resume")
            break
    dist.destroy_process_group()


if __name__ == "__main__":
    main(parse_config(Config))
