"""GRPO: records with an answer -> a policy that reasons about images.

For each question q draw G rollouts y_1..y_G from the policy, score them and make the better ones more likely:

    A_i  = (r_i - mean(r)) / (std(r) + 1e-4)       group advantage, exactly 0 when all rewards are equal
    rho  = pi(y_t) / pi_old(y_t)                   per token; pi_old is the policy before this batch's updates
    loss = - sum_t w_t c_t min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)
           + kl_beta sum_t w_t k3(pi_ref, pi)

The weights w_t sum to 1 over all response tokens of the global batch: each token alike (`--loss_mean token`),
or each rollout alike (`sequence`). c_t = min(pi_old / mu, is_cap) corrects for a sampler mu that is not quite
the trainer (other kernels, top-p).

What differs from the papers, and why:
  1. GRPO (DeepSeekMath, arXiv 2402.03300) averages per sequence; the default here is the token mean of DAPO
     (arXiv 2503.14476), in which a token of a long answer counts as much as one of a short. The asymmetric
     clip is DAPO's too.
  2. The denominator is counted over all ranks and micro-batches before the first backward, so 1 GPU and
     64 GPUs, small and large micro-batches give the same update.
  3. Groups whose rewards are all equal have no gradient (when kl_beta = 0), so they cost no forward pass;
     they still count in the denominator.
  4. No KL term and no reference model unless --kl_beta > 0.
  5. Each rollout has its own random stream, a function of (seed, step, question, sample): batches, ranks and
     restarts do not change what is sampled.
  6. Three methods are off by default and cost nothing then: selective sample replay (`select`,
     `ReplayBuffer`) and forced rethinking (`force_rethink`) of VL-Rethinker, arXiv 2504.08837, whose code
     replays nothing and masks no trigger; staged lengths (`staged`) of Vision-R1, arXiv 2503.06749.

    python grpo.py                                               # mini suite, laptop: out/sft -> out/grpo
    torchrun --nproc_per_node 8 grpo.py --model Qwen/Qwen2.5-VL-7B-Instruct --data hiyouga/geometry3k
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 grpo.py ...
    python grpo.py --resume                                      # from the newest complete step of --out

Shapes: B rows in a micro-batch, T padded length, H hidden size, V vocabulary, N response tokens, Q questions,
G rollouts per question.
Tensors over tokens are (B, T-1), aligned to the predicted token: column t belongs to token t+1.
"""
import bisect
import dataclasses
import functools
import importlib.util
import itertools
import math
import random
import re
import resource
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import revert_weight_conversion

from rewards import REWARDS, accuracy, length_bonus, parse_reward_spec, reflections
from data_prep import newest_step, parse_config, read_records, resolve_model
from sft import (RunLog, collate, describe, encode_prompt, global_max, global_sum, init_distributed,
                 load_checkpoint, load_policy, lr_at, make_optimizer, micro_batches, prepared,
                 save_checkpoint, schedule)
from eval import Server, VLLM, build_engine, generate


@dataclass(frozen=True)
class Config:
    # i/o
    model: str = "out/sft"  # Hub id, model folder or run directory to start from
    data: str = "data/mini/counting_train.jsonl"  # records with an answer: file or Hub id in a known format
    out: str = "out/grpo"  # run directory
    resume: bool = False  # go on from the newest complete step of --out
    strict: bool = False  # stop at an unreadable image instead of skipping its question
    seed: int = 0  # data order and sampling
    # rollouts
    engine: str = "hf"  # hf (transformers) | vllm (in this process, on this GPU) | server (--servers)
    tp: int = 1  # ranks that share one vLLM engine (tensor parallel)
    gpu_memory_utilization: float = 0.5  # share of the GPU that vLLM may use while the trainer waits
    servers: tuple[str, ...] = ()  # base URLs of `vllm serve` processes, for --engine server
    reward: str = "accuracy=1"  # weighted sum of rewards, name=weight,...
    prompts_per_step: int = 64  # questions per step, over all ranks
    group_size: int = 8  # rollouts per question (G)
    max_new_tokens: int = 72  # response tokens at most
    temperature: float = 1.0  # for sampling and for scoring alike
    top_p: float = 1.0  # nucleus sampling
    top_k: int = 0  # 0 = off
    rollout_tokens: int = 65536  # prompt and response tokens generated at once on a rank
    # objective
    adv_std: bool = True  # divide advantages by the group's standard deviation
    clip_low: float = 0.2  # ratio clipped below 1 - clip_low
    clip_high: float = 0.28  # ratio clipped above 1 + clip_high
    kl_beta: float = 0.0  # weight of the k3 KL to the frozen start model, 0 = no reference model
    loss_mean: str = "token"  # token | sequence
    is_cap: float = 2.0  # cap of the importance weight trainer / sampler
    length_bonus: float = 0.0  # weight of a bonus for the shorter responses of a group, 0.05 in Reason-RFT
    length_after: int = 800  # steps before that bonus counts
    truncated: str = "keep"  # responses cut at max_new_tokens: keep | zero (reward 0) | mask (no gradient)
    updates: int = 1  # optimizer updates per batch of rollouts
    # methods (README, "Recipes"): selective sample replay, forced rethinking, staged lengths
    ssr: str = "off"  # rollouts without advantage: off (kept) | filter (left out) | replay (replaced)
    ssr_alpha: float = 1.0  # replayed with probability ~ |advantage| ^ ssr_alpha
    ssr_episode: int = 16  # steps after which the replay buffer is emptied, 0 = never
    ssr_cap: int = 65536  # rollouts in the replay buffer, over all ranks; the oldest leave
    rethink_frac: float = 0.0  # share of finished responses that are forced to rethink
    rethink_kinds: str = "bare=0.2,question=0.3,outcome=0.5"  # triggers; outcome = verify or correct
    rethink_rewind: float = 0.5  # share cut before its answer first; the rest goes on after the answer
    rethink_min: int = 31  # new tokens at least, for a rethought response to be accepted
    rethink_max: int = 1023  # and at most; a response that leaves no room for them is not forced
    rethink_mask: str = "trigger"  # tokens without policy loss: trigger | none | prefix (and trigger)
    rethink_nll: float = 0.05  # weight of the NLL on forced responses with positive advantage
    ptst: str = ""  # stages of max_new_tokens x group_size : steps, as 4096x16:100,8192x8:100
    # optimisation
    steps: int = 40  # rollout batches
    lr: float = 1e-4  # peak learning rate (1e-6 is usual for a 7B model)
    warmup: int = 5  # steps of linear warm-up
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
    attn: str = "sdpa"  # attention: sdpa | flash_attention_2 | flash_attention_3 | flex_attention | eager
    # cadence
    eval_data: str = "data/mini/counting_id.jsonl"  # held-out records, "" = no evaluation
    eval_every: int = 4  # steps between evaluations
    eval_n: int = 200  # held-out questions used
    save_every: int = 20  # steps between checkpoints (one is always written at the end)
    keep: int = 2  # checkpoints kept
    samples_every: int = 5  # steps between entries of samples.jsonl


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


# ----- this stage ------------------------------------------------------------------------------------------


def parse_ptst(text):
    """"4096x16:100,8192x8:100" -> [(max_new_tokens, group_size, steps)]. Raises ValueError."""
    if not re.fullmatch(r"\d+x\d+:\d+(,\d+x\d+:\d+)*", text):
        raise ValueError(f"--ptst {text}: stages are LENGTHxGROUP:STEPS, separated by commas")
    return [tuple(map(int, re.split("[x:]", stage))) for stage in text.split(",")]


def staged(cfg, step):
    """(stage, the configuration of a step): progressive thinking suppression, Vision-R1, arXiv 2503.06749.

    Short responses in large groups first, then longer ones in smaller groups: a model that was taught long
    chains of thought first learns which are right before it may think longer.
    """
    ends = itertools.accumulate(steps for _, _, steps in parse_ptst(cfg.ptst)) if cfg.ptst else ()
    for stage, end in enumerate(ends):
        if step <= end:
            length, size, _ = parse_ptst(cfg.ptst)[stage]
            return stage + 1, dataclasses.replace(cfg, max_new_tokens=length, group_size=size)
    return 0, cfg


# Each opens a paragraph with the hesitation that rewards.reflections counts.
TRIGGERS = {
    "bare": "\n\nWait,",
    "question": "\n\nWait, does this result really fit the question?",
    "verify": "\n\nWait, let me go over this once more.",
    "correct": "\n\nWait, there must be a mistake somewhere.",
}
RETHINK = ("frac", "fixed", "broke", "accepted")  # counts of force_rethink


def before_answer(ids, tokenizer):
    """How many leading tokens come before the answer; all, if there is none.

    Thoughts that are tagged end before their closing tag, others before the paragraph of the last answer cue.
    """
    text = tokenizer.decode(ids)
    end = text.rfind("</think>")
    if end < 0:
        cues = [m.start() for m in re.finditer(r"<answer>|\\boxed|\banswer\b", text, re.IGNORECASE)]
        end = max(text.rfind("\n\n", 0, cues[-1]), 0) or cues[-1] if cues else len(text)
    return bisect.bisect_right(range(len(ids) + 1), end, key=lambda n: len(tokenizer.decode(ids[:n]))) - 1


def continued(prompt, ids):
    """encode_prompt's result for a prompt whose response has begun with `ids`; pixels are shared."""
    fill = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    other, shape = torch.zeros(1, len(ids), dtype=torch.long), prompt["input_ids"].shape
    request = prompt["request"] | {"ids": prompt["request"]["ids"] + ids}
    return {key: torch.cat([value, fill.get(key, other)], 1) if value.shape == shape else value
            for key, value in prompt.items() if key != "request"} | {"request": request}


def force_rethink(engine, rollouts, prompts, records, tokenizer, step, cfg):
    """Forced rethinking, VL-Rethinker (arXiv 2504.08837); replaces rollouts in place.

    A share of the finished responses loses its stop token, half of them their answer too, gets a trigger and
    is continued: prefix + trigger + continuation, spliced as token ids. Where more than 70 % of a group is
    right, its wrong ones are left alone. At most two right results a question replace their originals;
    everything else stays as it was, so G does too. Returns sums for the log.
    """
    kinds = dict(kind.split("=") for kind in cfg.rethink_kinds.split(","))
    tries, right = [], [accuracy(r.text, records[r.question]) == 1 for r in rollouts]
    for place, r in enumerate(rollouts):
        first = place - place % cfg.group_size
        chance = random.Random(f"{cfg.seed}/rethink/{step}/{r.question}/{place - first}")
        easy = sum(right[first:first + cfg.group_size]) > 0.7 * cfg.group_size
        if (chance.random() >= cfg.rethink_frac or r.truncated or easy and not right[place]
                or len(r.response) > cfg.max_new_tokens - cfg.rethink_max - 1):
            continue
        kind, = chance.choices([*kinds], map(float, kinds.values()))
        kind = kind if kind != "outcome" else "verify" if right[place] else "correct"
        prefix = r.response[:-1]
        if chance.random() < cfg.rethink_rewind:
            prefix = prefix[:before_answer(prefix, tokenizer)]
        trigger = tokenizer(TRIGGERS[kind], add_special_tokens=False)["input_ids"]
        tries.append((place, prefix, trigger, chance.getrandbits(62)))
    begun = [continued(prompts[rollouts[place].question], prefix + trigger)
             for place, prefix, trigger, _ in tries]
    samples = generate(engine, begun, [seed for *_, seed in tries],
                       dataclasses.replace(cfg, max_new_tokens=cfg.rethink_max))
    accepted, sums = Counter(), Counter({"frac": len(tries)})
    for (place, prefix, trigger, _), (ids, logps, truncated) in zip(tries, samples):
        r, cut = rollouts[place], len(prefix)
        text = tokenizer.decode(prefix + trigger + ids, skip_special_tokens=True)
        good = not truncated and accuracy(text, records[r.question]) == 1
        sums["fixed"] += good and not right[place]
        sums["broke"] += right[place] and not good
        hesitations = 1 + reflections(tokenizer.decode(ids))
        if good and len(ids) >= cfg.rethink_min and accepted[r.question] < 2 and hesitations <= 4:
            accepted[r.question] += 1
            forced = torch.full((len(trigger),), math.nan)  # nobody sampled these
            rollouts[place] = Rollout(
                r.question, prefix + trigger + ids, torch.cat([r.sampler_logps[:cut], forced, logps]), False,
                text, trigger=(cut, cut + len(trigger)), rewound=len(r.response) - 1 - cut)
    sums["accepted"] = sum(accepted.values())
    return sums


def policy_mask(r, cfg):
    """(len(response),): 1 where the policy loss counts a token; a trigger was not the policy's choice."""
    mask = torch.ones(len(r.response))
    if r.trigger and cfg.rethink_mask != "none":
        mask[0 if cfg.rethink_mask == "prefix" else r.trigger[0]:r.trigger[1]] = 0
    return mask


class ReplayBuffer:
    """Rollouts with an advantage, to fill a batch that lacks them: VL-Rethinker's selective sample replay.

    All ranks know all entries, (step, place, sample) and |advantage|, and so draw the same; a rollout itself
    (ids and logprobs, no image) stays with the rank that sampled it, which also trains on it again.
    """

    def __init__(self, state=None):
        self.entries, held = state or ([], {})
        self.held = {key: Rollout(**fields) for key, fields in held.items()}

    def state(self):
        return self.entries, {key: vars(r) for key, r in self.held.items()}

    def add(self, fresh, cap):
        """Enter this rank's {key: rollout}; beyond `cap` entries the oldest leave. Collective."""
        shares = [None] * dist.get_world_size()
        dist.all_gather_object(shares, [(key, abs(r.advantage)) for key, r in fresh.items()])
        self.entries = (self.entries + sorted(itertools.chain(*shares)))[-cap:]
        self.held |= fresh
        self.held = {key: self.held[key] for key, _ in self.entries if key in self.held}

    def draw(self, count, alpha, chance):
        """`count` keys with replacement, P(j) = |A_j|^alpha / sum_k |A_k|^alpha (Eq. 1); none if empty."""
        weights = [size ** alpha for _, size in self.entries]
        return [key for key, _ in chance.choices(self.entries, weights, k=count)] if weights else []


def select(rollouts, questions, buffer, step, cfg):
    """This rank's rollouts that count in the loss, as [(update, rollout)], and how many were replayed.

    off: all. filter: those with an advantage. replay: those, and as many drawn from the buffer (which holds
    them, too) as the whole batch lacks (VL-Rethinker, Algorithm 1).
    """
    place = {q: j for j, q in enumerate(questions)}
    keys = [(step, place[r.question], i % cfg.group_size) for i, r in enumerate(rollouts)]
    batch = {key: r for key, r in zip(keys, rollouts) if not (r.truncated and cfg.truncated == "mask")}
    effective = {key: r for key, r in batch.items() if r.advantage or cfg.ssr == "off"}
    chosen = [(j * cfg.updates // len(questions), r) for (_, j, _), r in effective.items()]
    if cfg.ssr != "replay":
        return chosen, 0
    if cfg.ssr_episode and (step - 1) % cfg.ssr_episode == 0:
        buffer.entries, buffer.held = [], {}
    buffer.add(effective, cfg.ssr_cap)
    deficit, = global_sum([len(batch) - len(effective)])
    drawn = buffer.draw(int(deficit), cfg.ssr_alpha, random.Random(f"{cfg.seed}/ssr/{step}"))
    again = [(j * cfg.updates // len(drawn), buffer.held[key]) for j, key in enumerate(drawn)
             if key in buffer.held]
    return chosen + again, len(again)


def imitated(r):
    """Whether the NLL of forced rethinking counts a rollout."""
    return r.trigger is not None and r.advantage > 0


def update(policy, optimizer, rollouts, denominator, forced_tokens, prompts, dummy, cfg):
    """One optimizer step on this rank's rollouts.

    denominator: the global count of tokens (or rollouts) in the policy loss; forced_tokens: that of tokens in
    the NLL on forced responses. Fills in missing old_logps: this very policy sampled those rollouts.
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
        sampler = spread([torch.where(r.sampler_logps.isnan(), r.old_logps, r.sampler_logps) for r in rows])
        reference = spread([r.ref_logps for r in rows]) if cfg.kl_beta else None
        advantages = spread([torch.full((len(r.response),), r.advantage) for r in rows])
        masks = [policy_mask(r, cfg) for r in rows]
        weights = spread([one / (denominator if cfg.loss_mean == "token" else denominator * one.sum())
                          for one in masks])
        loss, extra = grpo_loss(logps, old, sampler, reference, advantages, weights, cfg)
        if forced_tokens:  # what a right rethought response wrote, trigger included, is also imitated
            chosen = spread([torch.full((len(r.response),), float(imitated(r))) for r in rows])
            extra["loss/nll"] = -(chosen * logps).sum() / forced_tokens
            loss = loss + cfg.rethink_nll * extra["loss/nll"]
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


def step_metrics(rollouts, batch, rewards, parts, totals, cfg):
    """The step's numbers over all ranks; `batch` is what counts in the loss. The README explains each key."""
    solved = [part["solved"] for part in parts]
    level = [bisect.bisect_right([1/8, 3/8, 6/8, 1], sum(solved[i:i + cfg.group_size]) / cfg.group_size)
             for i in range(0, len(solved), cfg.group_size)]
    sums = {"reward/mean": (rewards.sum(), rewards.numel()),
            "reward/std": (rewards.std(1).sum(), len(rewards)),
            "groups/effective_frac": ((rewards != rewards[:, :1]).any(1).sum(), len(rewards)),
            "groups/trained_frac": (sum(bool(r.advantage) for r in batch), len(batch)),
            "len/mean": (sum(len(r.response) for r in rollouts), len(rollouts)),
            "len/truncated": (sum(r.truncated for r in rollouts), len(rollouts)),
            "len/reflect": (sum(bool(reflections(r.text)) for r in rollouts), len(rollouts)),
            **{f"groups/{name}": (level.count(k), len(level))
               for k, name in enumerate(("all_wrong", "hard", "medium", "easy", "all_right"))},
            "mismatch/mean": (sum(t["gap"] for t in totals), sum(t["tokens"] for t in totals))}
    for name in parse_reward_spec(cfg.reward):  # not parts[0]: a rank may have no rollout at all
        sums[f"reward/{name}"] = (sum(part[name] for part in parts), len(parts))
    flat = global_sum([float(x) for pair in sums.values() for x in pair])
    metrics = {name: flat[2 * i] / max(1.0, flat[2 * i + 1]) for i, name in enumerate(sums)}
    metrics["groups/zero_adv_frac"] = 1 - metrics["groups/effective_frac"]
    keys = ["loss/policy", "loss/clip_low", "loss/clip_high", "loss/kl", "loss/nll"]
    metrics |= dict(zip(keys, global_sum([sum(t.get(k, 0.0) for t in totals) / cfg.updates for k in keys])))
    metrics["tokens/gen"], metrics["tokens/train"] = global_sum(
        [sum(len(r.response) for r in rollouts),
         sum(len(r.response) for r in batch if r.advantage or cfg.kl_beta)])
    metrics["mismatch/max"] = global_max(max((t["gap_max"] for t in totals), default=0.0))
    metrics["optim/grad_norm"] = totals[-1]["norm"] if totals else 0.0
    return metrics


def shown_groups(rollouts, records, tokenizer, step, group_size):
    """All rollouts of the first three groups that differ inside, as rows: the ones worth reading."""
    groups = [rollouts[i:i + group_size] for i in range(0, len(rollouts), group_size)]
    for r in itertools.chain(*[g for g in groups if any(r.advantage for r in g)][:3]):
        record, trigger = records[r.question], None
        if r.trigger:  # where its characters are
            trigger = [len(tokenizer.decode(r.response[:n], skip_special_tokens=True)) for n in r.trigger]
        yield {"step": step, "id": record["id"], "question": record["question"], "answer": record["answer"],
               "response": r.text, "trigger": trigger, "rewound": r.rewound, "reward": r.reward,
               "advantage": r.advantage, "tokens": len(r.response), "truncated": r.truncated}


def evaluate(engine, records, processor, cfg):
    """Greedy accuracy and mean response length on held-out records, sharded over ranks."""
    share = [list(range(dist.get_rank(), len(records), dist.get_world_size()))]
    encode = functools.partial(encode_prompt, processor=processor, max_pixels=cfg.max_pixels)
    drawn = [pair for batch in prepared(share, lambda i: encode(records[i]), cfg.workers) for pair in batch]
    good = [(i, prompt) for i, prompt in drawn if not isinstance(prompt, ValueError)]  # the rest is wrong
    greedy = dataclasses.replace(cfg, temperature=0.0)
    answers = [ids for ids, _, _ in generate(engine, [prompt for _, prompt in good], [0] * len(good), greedy)]
    texts = processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
    right, length, n = global_sum([sum(accuracy(text, records[i]) for text, (i, _) in zip(texts, good)),
                                   sum(map(len, answers)), len(drawn)])
    return {"eval/accuracy": right / n, "eval/len": length / n}


def check(cfg):
    """Refuse what cannot train. Raises ValueError naming the flag."""
    for flag in ("steps", "prompts_per_step", "max_new_tokens", "rollout_tokens", "updates", "tp",
                 "token_budget", "eval_every", "eval_n", "save_every", "samples_every", "keep"):
        if getattr(cfg, flag) < 1:
            raise ValueError(f"--{flag} must be at least 1")
    if cfg.group_size < 2:
        raise ValueError("--group_size must be at least 2: the advantage compares the rollouts of a group")
    if cfg.engine == "vllm" and not importlib.util.find_spec("vllm"):
        raise ValueError("--engine vllm: vLLM is not installed, see requirements-gpu.txt")
    if (cfg.engine == "server") != bool(cfg.servers):
        raise ValueError("--engine server and --servers URL... go together")
    if cfg.tp > 1 and (cfg.engine != "vllm" or dist.get_world_size() % cfg.tp):
        raise ValueError(f"--tp {cfg.tp} needs --engine vllm and a multiple of {cfg.tp} ranks")
    if not 0 <= cfg.rethink_frac < 1:
        raise ValueError("--rethink_frac is a share, at least 0 and below 1")
    lengths = [length for length, _, _ in parse_ptst(cfg.ptst)] if cfg.ptst else [cfg.max_new_tokens]
    if cfg.rethink_frac and min(lengths) <= cfg.rethink_max + 1:
        raise ValueError(f"--rethink_max {cfg.rethink_max}: a response of at most {min(lengths)} tokens "
                         "leaves no room for rethinking")
    if cfg.rethink_frac and cfg.engine == "server":
        raise ValueError("--rethink_frac: a server takes text, and a forced response goes on from token ids; "
                         "use --engine vllm or hf")
    if not re.fullmatch(r"((bare|question|verify|correct|outcome)=[\d.]+(,|$))+", cfg.rethink_kinds):
        raise ValueError(f"--rethink_kinds {cfg.rethink_kinds}: use bare, question, verify, correct, "
                         "outcome, each with =WEIGHT, separated by commas")
    if cfg.ptst and any(size < 2 for _, size, _ in parse_ptst(cfg.ptst)):
        raise ValueError(f"--ptst {cfg.ptst}: a group has at least 2 rollouts")
    if not 0 < cfg.gpu_memory_utilization <= 1:
        raise ValueError("--gpu_memory_utilization is a share, above 0 and at most 1")
    if cfg.temperature <= 0:
        raise ValueError("--temperature must be above 0: greedy rollouts of a group are all the same")


def main(cfg):
    """Train. A step has ten beats, numbered below."""
    rank, world, device = init_distributed()
    try:
        check(cfg)
        if cfg.ptst:
            cfg = dataclasses.replace(cfg, steps=sum(steps for _, _, steps in parse_ptst(cfg.ptst)))
        spec = parse_reward_spec(cfg.reward)
        # The default held-out file belongs to the default data.
        eval_data = cfg.eval_data if cfg.data == Config.data or cfg.eval_data != Config.eval_data else ""
        start = newest_step(cfg.out) if cfg.resume else None
        first = resolve_model(cfg.model)
        origin = Path(first).resolve()
        if not cfg.resume and Path(cfg.out).resolve() in [origin, *origin.parents]:
            raise ValueError(f"--out {cfg.out} holds the model to start from: "
                             "name another --out, or --resume")
        records = read_records(cfg.data, need=("answer",))
        held_out = read_records(eval_data, limit=cfg.eval_n) if eval_data else []
        policy, processor = load_policy(start or first, cfg, device)
        optimizer = make_optimizer(policy, cfg)
        done, replayable = load_checkpoint(start, policy, optimizer) if start else (0, None)
        engine = (Server(first, processor, cfg) if cfg.engine == "server"
                  else build_engine(first, processor, cfg, device))
        log = RunLog(cfg, done)
    except (ValueError, OSError) as e:
        sys.exit(f"{Path(sys.argv[0]).name}: {str(e).strip().splitlines()[0]}")
    reference = load_policy(first, cfg, device, trainable=False)[0] if cfg.kl_beta else None
    sync_weights(policy, engine)
    encode = functools.partial(encode_prompt, processor=processor, max_pixels=cfg.max_pixels)
    dummy = encode({"question": "", "images": [Image.new("RGB", (56, 56))], "answer_type": "text"})
    log.note(describe(policy, cfg, (cfg.engine == "hf") + bool(cfg.kl_beta)))
    log.note(f"{len(records)} questions; a step: {cfg.prompts_per_step} x {cfg.group_size} rollouts "
             f"on {world} rank(s)")
    buffer = ReplayBuffer(replayable)
    if cfg.ssr == "replay":
        size = cfg.ssr_cap * staged(cfg, cfg.steps)[1].max_new_tokens * 44  # an id is a Python int
        log.note(f"replay buffer: at most {cfg.ssr_cap} rollouts, {size / 2**30:.2f} GiB over all ranks")
    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    if held_out and not done:
        before = evaluate(engine, held_out, processor, staged(cfg, 1)[1])
        log.write("metrics.jsonl", [{"step": 0, **before}])
        log.note(f"before training: {before['eval/accuracy']:.3f} "
                 f"of {len(held_out)} held-out questions right")

    plan = schedule(len(records), cfg.prompts_per_step, done, cfg.steps, cfg.seed)
    share = prepared([drawn[rank::world] for drawn in plan], lambda i: encode(records[i]), cfg.workers)
    failures, whole = 0, cfg
    for step, questions, drawn in zip(itertools.count(done + 1), plan, share):
        clock, (stage, cfg) = [time.time()], staged(whole, step)

        def tick():
            clock.append(time.time())
            return clock[-1] - clock[-2]

        # 1. draw this rank's questions; their images were prepared in the background
        prompts = {q: prompt for q, prompt in drawn if not isinstance(prompt, ValueError)}
        for q, error in drawn:
            if q not in prompts:
                if cfg.strict:
                    log.fail(error)
                log.note(f"question {records[q]['id']} skipped: {error}")
        unreadable = len(drawn) - len(prompts)
        if step == done + 1 and prompts:
            ids = next(iter(prompts.values()))["input_ids"][0]
            log.note("first prompt: " + processor.tokenizer.decode(ids))

        # 2. generate G rollouts of each
        asked = [(q, g) for q in prompts for g in range(cfg.group_size)]
        seeds = [rollout_seed(cfg, step, q, g) for q, g in asked]
        samples = generate(engine, [prompts[q] for q, _ in asked], seeds, cfg)
        texts = processor.tokenizer.batch_decode([ids for ids, _, _ in samples], skip_special_tokens=True)
        rollouts = [Rollout(q, *sample, text) for (q, _), sample, text in zip(asked, samples, texts)]
        forced = (force_rethink(engine, rollouts, prompts, records, processor.tokenizer, step, cfg)
                  if cfg.rethink_frac else {})
        sleep_engine(engine)
        seconds = {"time/gen": tick()}

        # 3. score
        parts = []
        for r in rollouts:
            record = records[r.question] | {"truncated": r.truncated, "forced": bool(r.trigger)}
            part = {name: REWARDS[name](r.text, record) for name in spec}
            r.reward = 0.0 if r.truncated and cfg.truncated == "zero" else sum(
                weight * part[name] for name, weight in spec.items())
            solved = part["accuracy"] if "accuracy" in part else accuracy(r.text, record)
            parts.append({**part, "solved": solved == 1})
        if cfg.length_bonus and step >= cfg.length_after:
            for i in range(0, len(rollouts), cfg.group_size):
                group, own = rollouts[i:i + cfg.group_size], parts[i:i + cfg.group_size]
                bonuses = length_bonus([len(r.text) for r in group], [part["solved"] for part in own])
                for r, bonus in zip(group, bonuses):
                    r.reward += cfg.length_bonus * bonus
        seconds["time/score"] = tick()

        # 4. advantages within each group
        rewards = torch.tensor([r.reward for r in rollouts]).view(len(prompts), cfg.group_size)  # (Q, G)
        advantages = group_advantages(rewards, cfg.adv_std)
        for r, a in zip(rollouts, advantages.flatten().tolist()):
            r.advantage = a

        # 5. select what counts; a rollout without advantage has no gradient, unless there is a KL term
        batch, replayed = select(rollouts, questions, buffer, step, cfg)
        trained = [r for _, r in batch if r.advantage or cfg.kl_beta]
        older = list(dict.fromkeys(r.question for r in trained if r.question not in prompts))
        for q, prompt in itertools.chain(*prepared([older] if older else [], lambda i: encode(records[i]),
                                                   cfg.workers)):
            if isinstance(prompt, ValueError):
                log.fail(f"question {records[q]['id']} was readable when it was first sampled: {prompt}")
            prompts[q] = prompt

        # 6. logprobs before the updates; with one update they are those of the update itself
        if cfg.updates > 1:
            fresh = [r for r in trained if r.old_logps is None]
            for r, logps in zip(fresh, all_logprobs(policy, fresh, prompts, dummy, cfg)):
                r.old_logps = logps
        if reference:
            fresh = [r for r in trained if r.ref_logps is None]
            for r, logps in zip(fresh, all_logprobs(reference, fresh, prompts, dummy, cfg)):
                r.ref_logps = logps

        # 7. update: slices of questions, cut alike for every number of ranks
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, cfg)
        totals = []
        for u in range(cfg.updates):
            part = [r for update, r in batch if update == u]
            mine = [r for r in part if r.advantage or cfg.kl_beta]
            size = sum(policy_mask(r, cfg).sum() for r in part) if cfg.loss_mean == "token" else len(part)
            denominator, forced_tokens, active = global_sum(
                [float(size), sum(len(r.response) for r in mine if imitated(r)), len(mine)])
            if active:
                totals.append(update(policy, optimizer, mine, denominator, forced_tokens, prompts, dummy,
                                     cfg))
                failures = 0 if math.isfinite(totals[-1]["norm"]) else failures + 1
        if failures >= 3:
            log.fail(f"step {step}: gradient norm not finite {failures} times in a row; "
                     f"the last checkpoint in {cfg.out} is sound, lower --lr")
        seconds["time/train"] = tick()

        # 8. sync
        sync_weights(policy, engine)
        seconds["time/sync"] = tick()

        # 9. log
        metrics = step_metrics(rollouts, [r for _, r in batch], rewards, parts, totals, cfg)
        metrics["data/unreadable"], stop_now, again, *counts = global_sum(
            [unreadable, len(stopping), replayed, *(forced.get(k, 0) for k in RETHINK)])
        size = len(questions) * cfg.group_size
        metrics |= {f"rethink/{name}": count / size for name, count in zip(RETHINK, counts)}
        metrics |= {"replay/frac": again / size, "ptst/stage": stage}
        metrics |= {"optim/lr": lr_at(step, cfg), **seconds, "time/step": clock[-1] - clock[0],
                    "mem/peak_gb": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda"
                    else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
        if step % cfg.samples_every == 0:
            rows = shown_groups(rollouts, records, processor.tokenizer, step, cfg.group_size)
            log.write("samples.jsonl", rows)

        # 10. evaluate and save
        if held_out and (step % cfg.eval_every == 0 or step == cfg.steps):
            metrics |= evaluate(engine, held_out, processor, cfg)
            log.note(f"step {step}: {metrics['eval/accuracy']:.3f} of {len(held_out)} held-out questions "
                     f"right, {metrics['eval/len']:.1f} tokens long")
        log.step(step, metrics, ("reward/mean", "len/mean", "groups/effective_frac", "eval/accuracy"))
        if step % cfg.save_every == 0 or step == cfg.steps or stop_now:
            save_checkpoint(cfg, step, policy, processor, optimizer, buffer.state())
        if stop_now:
            log.note(f"SIGTERM: saved step {step}; go on with --resume")
            break
    if cfg.engine != "vllm":  # vLLM takes the process group down itself when Python exits
        dist.destroy_process_group()


if __name__ == "__main__":
    main(parse_config(Config))
