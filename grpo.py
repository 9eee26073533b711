"""GRPO: records with an answer -> a policy that reasons about images.

For each question q draw G rollouts y_1..y_G from the policy, score them and make the better ones more likely:

    A_i  = (r_i - mean(r)) / (std(r) + 1e-4)       group advantage, exactly 0 when all rewards are equal
    rho  = pi(y_t) / pi_old(y_t)                   per token; pi_old is the policy that sampled the rollout
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
     they still count in the denominator. Of the others, a question's prompt and image are computed once for
     all its rollouts (Group in sft.py).
  4. No KL term and no reference model unless --kl_beta > 0.
  5. Each rollout has its own random stream, a function of (seed, step, question, sample): batches, ranks and
     restarts do not change what is sampled.
  6. Methods are off by default and cost nothing then: selective sample replay (`select`, `ReplayBuffer`) and
     forced rethinking (`force_rethink`) of VL-Rethinker, arXiv 2504.08837 (its released code replays nothing
     and masks no trigger); staged lengths (`staged`) of Vision-R1, arXiv 2503.06749; a second look at masked
     images (`look_again`: PAPO, VPPO) and rollouts from noised ones (`sample_noised`: NoisyRollout).

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
import itertools
import math
import random
import re
import signal
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

if __name__ == "__main__":  # Ctrl-C while the libraries below are loaded: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.distributed as dist

from rewards import REWARDS, accuracy, length_bonus, parse_reward_spec, reflections
from data_prep import check_at_least, parse_config
from sft import (Means, RunLog, Stopwatch, Watchdog, Workers, adapters_off, all_logprobs, assigned,
                 blank_prompt, by_rollout, catch_signals, check_rows, continued, data_order, encode_prompt,
                 encode_share, encode_view, end_on_signals, evenness, gather, global_max, global_sum,
                 host_memory, init_distributed, load_policy, lr_at, one_line_errors, open_run, optimizer_step,
                 over_tokens, padded_batches, peak_memory, readable, refusing, save_checkpoint)
from eval import (SLOW, add_rewards, build_engine, check_engine, check_run, end_if_mismatched, generate,
                  sleep_engine, slow_scores, sync_weights)


@dataclass(frozen=True)
class Config:  # a field's comment is its --help text; `a | b` in it are the values allowed
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
    timeout: float = 2700.0  # server: seconds to wait for one whole answer
    reward: str = "accuracy=1"  # weighted sum, name=weight,..; a name may be FILE.py:FUNCTION, or judge
    reward_timeout: float = 60.0  # seconds for a call of a function of your own, or of the judge
    judge_url: str = ""  # reward judge: its OpenAI-compatible server, with /v1
    judge_model: str = ""  # reward judge: its name there, "" = the first that it lists
    prompts_per_step: int = 64  # questions per step, over all ranks
    group_size: int = 8  # rollouts per question (G)
    max_prompt_tokens: int = 8192  # questions with a longer prompt are skipped: no prompt is ever cut
    max_new_tokens: int = 72  # response tokens at most
    temperature: float = 1.0  # for sampling and for scoring alike
    top_p: float = 1.0  # nucleus sampling
    top_k: int = 0  # 0 = off
    rollout_tokens: int = 65536  # prompt and response tokens generated at once on a rank
    # objective
    objective: str = "clip"  # clip | gspo (usual: --clip_low 3e-4 --clip_high 4e-4) | cispo | sapo
    adv_std: bool = True  # divide advantages by the group's standard deviation
    clip_low: float = 0.2  # ratio clipped below 1 - clip_low
    clip_high: float = 0.28  # ratio clipped above 1 + clip_high
    kl_beta: float = 0.0  # weight of the k3 KL to the frozen start model, 0 = no reference model
    loss_mean: str = "token"  # token | sequence (each rollout's mean) | constant (over max_new_tokens)
    is_mode: str = "truncate"  # truncate (each token's weight) | sequence (drop a rollout beyond is_cap)
    is_cap: float = 2.0  # cap of the importance weight trainer / sampler
    max_mismatch: float = 0.0  # nats a token, sampler to trainer, that end the run; 0 = by the dtype
    length_bonus: float = 0.0  # weight of a bonus for the shorter responses of a group, 0.05 in Reason-RFT
    length_after: int = 800  # steps before that bonus counts
    length_unit: str = "tokens"  # what it counts: tokens | characters (as its released code)
    truncated: str = "keep"  # responses cut at max_new_tokens: keep | zero (reward 0) | mask (no gradient)
    updates: int = 1  # optimizer updates per batch of rollouts
    # methods (docs/recipes.md): sample replay, forced rethinking, staged lengths, perception
    ssr: str = "off"  # rollouts without advantage: off (kept) | filter | replay | refill (draw more)
    ssr_alpha: float = 1.0  # replayed with probability ~ |advantage| ^ ssr_alpha
    ssr_episode: int = 16  # steps after which the replay buffer is emptied, 0 = never
    ssr_cap: int = 65536  # rollouts in the replay buffer, over all ranks; the oldest leave
    refill_max: int = 3  # refill: draws of prompts_per_step questions at most, in a step
    rethink_frac: float = 0.0  # share of finished responses that are forced to rethink
    rethink_kinds: str = "bare=0.2,question=0.3,outcome=0.5"  # triggers; outcome = verify or correct
    rethink_rewind: float = 0.5  # share of these whose answer is taken off first; the rest goes on after it
    rethink_min: int = 31  # new tokens at least, for a rethought response to be accepted
    rethink_max: int = 1023  # and at most; a response that leaves no room for them is not forced
    rethink_mask: str = "trigger"  # tokens without policy loss: trigger | none | prefix (and trigger)
    rethink_nll: float = 0.05  # weight of the NLL on forced responses with positive advantage
    ptst: str = ""  # stages of max_new_tokens x group_size : steps (4096x16:100,8192x8:100), for --steps
    perception: str = "off"  # compare with responses to masked images: off | papo | vppo
    perception_kl: float = 0.02  # papo: weight of the KL to the policy that sees little (0.01 for a 3B model)
    perception_entropy: float = 0.03  # weight of -log pi, which keeps that KL honest (vppo: 0.06)
    noisy_frac: float = 0.0  # share of a group sampled from noised images, 0.5 in NoisyRollout
    # optimisation
    steps: int = 32  # rollout batches
    lr: float = 1e-4  # peak learning rate (1e-6 is usual for a 7B model)
    warmup: int = 5  # steps of linear warm-up
    schedule: str = "constant"  # cosine | linear | constant
    lr_floor: float = 0.1  # final learning rate as a share of the peak (cosine, linear)
    weight_decay: float = 0.0  # AdamW
    max_grad_norm: float = 1.0  # gradient clipping
    token_budget: int = 16384  # padded tokens in a micro-batch; those of long rows count more
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
    eval_data: str = "data/mini/counting_id.jsonl"  # held-out records, "" = no evaluation
    eval_every: int = 4  # steps between evaluations
    eval_n: int = 200  # held-out questions used
    save_every: int = 20  # steps between checkpoints (one is always written at the end)
    keep: int = 2  # checkpoints kept
    log: str = "off"  # where metrics, samples and flags go as well: off | wandb | tensorboard
    stall: float = 20.0  # end the run when a step takes this many medians (10 minutes at least), 0 = never
    dist_timeout: float = 60.0  # minutes that a rank waits for the others
    samples_every: int = 5  # steps between entries of samples.jsonl


@dataclass
class Rollout:
    """One response from sampling to loss. Images stay with the dataset: `question` is an index."""
    question: int
    response: list[int]  # token ids, with the stop token unless truncated
    sampler_logps: torch.Tensor  # (len(response),) under the engine as it sampled, nan: nothing to correct
    truncated: bool
    text: str
    reward: float = 0.0
    advantage: float = 0.0
    old_logps: torch.Tensor | None = None  # (len(response),) under the policy that sampled it
    ref_logps: torch.Tensor | None = None
    masked_logps: torch.Tensor | None = None  # (len(response),) of this step's policy, image masked
    credit: torch.Tensor | None = None  # (len(response),) factors on the advantage; None = 1
    trigger: tuple[int, int] | None = None  # the forced tokens response[start:stop], if any
    rewound: int = 0  # tokens of its first ending that were dropped before the trigger

    def __len__(self):
        return len(self.response)

    def at_every_token(self, value):
        """(len(response),) of one value."""
        return torch.full((len(self.response),), float(value))

    def token_advantages(self):
        advantages = self.at_every_token(self.advantage)
        return advantages if self.credit is None else advantages * self.credit


# ----- sampling --------------------------------------------------------------------------------------------


def rollout_seed(cfg, step, question, sample):
    """The random stream of one rollout, independent of rank and batch."""
    return random.Random(f"{cfg.seed}/{step}/{question}/{sample}").getrandbits(62)


def sample_rollouts(engine, questions, prompts, seeds, tokenizer, cfg):
    """One rollout for each of `questions`, keys of `prompts`; one that comes G times makes a group."""
    asked = [prompts[q] for q in questions]
    samples = generate(engine, asked, seeds, cfg)
    texts = tokenizer.batch_decode([ids for ids, _, _ in samples], skip_special_tokens=True)
    rollouts = []
    for q, sample, text in zip(questions, samples, texts):
        ids, logps, truncated = sample
        rollouts.append(Rollout(q, ids, logps, truncated, text))
    return rollouts


# ----- rewards and advantages ------------------------------------------------------------------------------


def score_rollouts(rollouts, records, spec, step, cfg):
    """Set every rollout's reward; returns what each is made of, {reward name: value, "solved": bool}."""
    pairs = []
    for r in rollouts:
        record = dict(records[r.question], truncated=r.truncated, forced=bool(r.trigger))
        pairs.append((r.text, record))
    slow = {name: slow_scores(name, pairs, cfg.reward_timeout) for name in spec if name in SLOW}
    parts = []
    for i, (r, (text, record)) in enumerate(zip(rollouts, pairs)):
        part = {}
        r.reward = 0.0
        for name, weight in spec.items():
            part[name] = slow[name][i] if name in slow else REWARDS[name](text, record)
            r.reward += weight * part[name]
        if r.truncated and cfg.truncated == "zero":
            r.reward = 0.0
        right = part["accuracy"] if "accuracy" in part else accuracy(r.text, record)
        part["solved"] = right == 1
        parts.append(part)
    if cfg.length_bonus and step >= cfg.length_after:
        add_length_bonus(rollouts, parts, cfg)
    return parts


def add_length_bonus(rollouts, parts, cfg):
    """Reason-RFT's reward for the shorter responses of a group (rewards.length_bonus)."""
    for start in range(0, len(rollouts), cfg.group_size):
        stop = start + cfg.group_size
        group = rollouts[start:stop]
        lengths = [len(r) if cfg.length_unit == "tokens" else len(r.text) for r in group]
        solved = [part["solved"] for part in parts[start:stop]]
        for r, bonus in zip(group, length_bonus(lengths, solved)):
            r.reward += cfg.length_bonus * bonus


def group_advantages(rewards, std=True, eps=1e-4):
    """(Q, G) rewards -> advantages r - mean, over the sample std + eps if `std`; equal rewards give 0.

    A reward that is nan, since its judge was silent, gets 0 and does not count for the others.
    """
    if rewards.isnan().any():
        advantages = torch.zeros_like(rewards)
        for row, of_row in zip(rewards, advantages):
            known = ~row.isnan()
            if known.sum() > 1:
                of_row[known] = group_advantages(row[known][None], std, eps)[0]
        return advantages
    centred = rewards - rewards.mean(1, keepdim=True)
    same = (rewards == rewards[:, :1]).all(1, keepdim=True)
    if std:
        centred = centred / (rewards.std(1, keepdim=True) + eps)
    return torch.where(same, 0.0, centred)


# ----- the objective ---------------------------------------------------------------------------------------


def clamped(log_ratio):
    """What exp may be taken of: beyond, a single token would turn the whole batch to infinity."""
    return log_ratio.clamp(-20, 20)


def k3(gap):
    """Schulman's estimator of a KL divergence, exp(d) - d - 1; d = other policy - the one that sampled."""
    gap = clamped(gap)
    return gap.exp() - gap - 1


def clip(logps, old_logps, advantages, mean, cfg):
    """A token that has moved far in the direction of its advantage has no gradient (PPO, DAPO)."""
    ratio = clamped(logps - old_logps).exp()
    return clipped(ratio, advantages, cfg), ratio


def gspo(logps, old_logps, advantages, mean, cfg):
    """clip with one ratio for a whole rollout, the geometric mean of its tokens' (arXiv 2507.18071)."""
    ratio = clamped(mean(logps - old_logps)).exp()
    return clipped(ratio, advantages, cfg), ratio


def clipped(ratio, advantages, cfg):
    bounded = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    return torch.minimum(ratio * advantages, bounded * advantages)


def cispo(logps, old_logps, advantages, mean, cfg):
    """The bounded ratio is only a weight: clipped tokens keep a gradient (MiniMax-M1, arXiv 2506.13585)."""
    ratio = clamped(logps - old_logps).exp()
    weight = ratio.detach().clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    return weight * advantages * logps, ratio


def sapo(logps, old_logps, advantages, mean, cfg):
    """A sigmoid instead of an edge, steeper for bad rollouts (arXiv 2511.20347)."""
    ratio = clamped(logps - old_logps).exp()
    steepness = torch.where(advantages < 0, 1.05, 1.0)
    gate = 4 / steepness * torch.sigmoid(steepness * (ratio - 1))
    return gate * advantages, ratio


# What is made large, a number for each token, and the ratio that it clips.
OBJECTIVES = {"clip": clip, "gspo": gspo, "cispo": cispo, "sapo": sapo}


def rollout_sum(values, rollout):
    """The sum over each rollout's tokens, at each of them; `rollout` numbers what a token belongs to."""
    totals = torch.zeros_like(values).flatten()  # more than there are rollouts
    return totals.index_add(0, rollout.flatten(), values.flatten())[rollout]


def sampler_correction(gap, chosen, rollout, cfg):
    """The weight pi_old / mu of each token, bounded; gap = log pi_old - log mu, 0 where nobody sampled.

    truncate: by token, at most is_cap. sequence: the product of a rollout's, which drops it beyond is_cap.
    """
    if cfg.is_mode == "truncate":
        return clamped(gap).exp().clamp(max=cfg.is_cap)
    weight = clamped(rollout_sum(gap * chosen, rollout)).exp()
    return torch.where(weight <= cfg.is_cap, weight, 0.0)


def grpo_loss(logps, old_logps, sampler_logps, ref_logps, advantages, weights, cfg, rollout=None):
    """The objective of the module docstring, or another one of OBJECTIVES. Tensors (B, T-1).

    weights carry the global denominator, so the loss is a sum; they are 0 outside the response and at forced
    tokens, so `weights > 0` is the mask of what the policy chose. All tensors are 0 outside the response.
    ref_logps may be None when cfg.kl_beta = 0. rollout: which one a token belongs to; None = a row is one.
    Returns the loss and weighted sums for the log.
    """
    if rollout is None:
        rollout = torch.arange(len(logps), device=logps.device)[:, None].expand_as(logps)

    chosen = (weights > 0).float()
    lengths = rollout_sum(chosen, rollout).clamp(min=1)

    def mean(values):
        return rollout_sum(values * chosen, rollout) / lengths

    correction = sampler_correction(old_logps - sampler_logps, chosen, rollout, cfg)
    gain, ratio = OBJECTIVES[cfg.objective](logps, old_logps, advantages, mean, cfg)
    loss = -(weights * correction * gain).sum()
    clipped_low = (ratio < 1 - cfg.clip_low) & (advantages < 0)
    clipped_high = (ratio > 1 + cfg.clip_high) & (advantages > 0)
    sums = {"loss/policy": loss.detach(),
            "loss/clip_low": (weights * clipped_low).sum(),
            "loss/clip_high": (weights * clipped_high).sum(),
            "policy/kl_old": (weights * k3(logps - old_logps)).sum().detach(),
            "mismatch/dropped": (weights * (correction == 0)).sum()}
    if cfg.kl_beta:
        kl = (weights * k3(ref_logps - logps)).sum()
        loss = loss + cfg.kl_beta * kl
        sums["loss/kl"] = kl.detach()
    return loss, sums


def train_on(per_update, policy, reference, optimizer, prompts, dummy, step, log, cfg):
    """Make the step's updates, each on its list of this rank's rollouts. Returns sums for the log.

    prompts: {question: encode_prompt's result}. reference: the frozen start model, None without a KL term.
    """
    # The same rollout may be in several lists: replay draws with replacement, also from this step.
    trained = {}
    for r in itertools.chain.from_iterable(per_update):
        if has_gradient(r, cfg):
            trained[id(r)] = r

    # Log-probabilities under the policy that sampled: before the first of several updates they are asked for,
    # a single update computes them itself, and a replayed rollout has had them since it was new.
    if cfg.updates > 1:
        keep_old_logprobs(trained.values(), policy, prompts, dummy, cfg)
    if reference:
        fresh = [r for r in trained.values() if r.ref_logps is None]
        with adapters_off(reference):
            logprobs = all_logprobs(reference, fresh, prompts, dummy, cfg)
        for r, logps in zip(fresh, logprobs):
            r.ref_logps = logps

    totals = Counter()
    for rollouts in per_update:
        # Rollouts without an advantage have no gradient, but they count in the denominator.
        active, denominator, imitated_tokens = [], 0.0, 0
        for r in rollouts:
            denominator += policy_mask(r, cfg).sum().item() if cfg.loss_mean == "token" else 1
            if has_gradient(r, cfg):
                active.append(r)
                imitated_tokens += len(r) if is_imitated(r) else 0
        denominator, imitated_tokens, anywhere = global_sum([denominator, imitated_tokens, len(active)])
        if anywhere:
            sums = update(policy, optimizer, active, denominator, imitated_tokens, prompts, dummy, step, log,
                          cfg)
            totals["largest gap"] = max(totals["largest gap"], sums.pop("largest gap"))
            totals["norm"] = sums.pop("norm")  # of the last update
            totals.update(sums)
    return totals


def has_gradient(r, cfg):
    """Whether a rollout takes part in the update: without an advantage only other terms move anything."""
    return bool(r.advantage or cfg.kl_beta or cfg.perception != "off")


def left_out(r, cfg):
    """Whether a rollout does not even count in the denominator: cut, with --truncated mask, or not judged."""
    return r.truncated and cfg.truncated == "mask" or math.isnan(r.reward)


def which_update(place, total, updates):
    """Which of the step's updates the place-th of `total` trains: cut alike for every number of ranks."""
    return place * updates // total


def keep_old_logprobs(rollouts, policy, prompts, dummy, cfg):
    """Set those of rollouts that have none yet: `policy` is still the one that sampled them. Collective."""
    fresh = [r for r in rollouts if r.old_logps is None]
    for r, logps in zip(fresh, all_logprobs(policy, fresh, prompts, dummy, cfg)):
        r.old_logps = logps


def policy_mask(r, cfg):
    """(len(response),): 1 where the policy loss counts a token; a trigger was not the policy's choice."""
    mask = r.at_every_token(1)
    if r.trigger and cfg.rethink_mask != "none":
        start, stop = r.trigger
        if cfg.rethink_mask == "prefix":
            start = 0
        mask[start:stop] = 0
    return mask


def token_weights(r, denominator, cfg):
    """(len(response),): what a token counts in the policy loss; all weights of all ranks add up to 1.

    denominator: of the global batch, in tokens (--loss_mean token) or rollouts (sequence, constant: the
    latter is Dr. GRPO's, arXiv 2503.20783, in which a long answer's tokens count no less than a short one's).
    """
    mask = policy_mask(r, cfg)
    if cfg.loss_mean == "token":
        return mask / denominator
    length = mask.sum() if cfg.loss_mean == "sequence" else cfg.max_new_tokens
    return mask / (denominator * length)


def is_imitated(r):
    """Whether the NLL of forced rethinking counts a rollout."""
    return r.trigger is not None and r.advantage > 0


def update(policy, optimizer, rollouts, denominator, imitated_tokens, prompts, dummy, step, log, cfg):
    """One optimizer step on this rank's rollouts; returns sums for the log.

    denominator: the global count of tokens (or rollouts) in the policy loss; imitated_tokens: that of
    tokens in the NLL on forced responses. Nothing is read back before the last micro-batch is on its way: a
    GPU would wait for the host each time.
    """
    totals, gaps, scored = Counter(), [], []
    for indices, inputs, mask in padded_batches(rollouts, prompts, dummy, policy, cfg):
        rows = [rollouts[i] for i in indices]
        logps, entropy = policy.token_logprobs(inputs, mask, cfg.temperature, with_entropy=True)  # (B, T-1)

        # Rollouts that have no old log-probabilities yet were sampled by this very policy.
        old = over_tokens([r.at_every_token(math.nan) if r.old_logps is None else r.old_logps for r in rows],
                          mask)
        old = torch.where(old.isnan(), logps.detach(), old)
        sampler = over_tokens([r.sampler_logps for r in rows], mask)
        sampled = mask & ~sampler.isnan()
        sampler = torch.where(sampled, sampler, old)  # nobody sampled a trigger: there is nothing to correct
        ref = over_tokens([r.ref_logps for r in rows], mask) if cfg.kl_beta else None

        advantages = over_tokens([r.token_advantages() for r in rows], mask)
        weights = over_tokens([token_weights(r, denominator, cfg) for r in rows], mask)
        numbers = over_tokens([r.at_every_token(i) for i, r in enumerate(rows)], mask).long()
        loss, sums = grpo_loss(logps, old, sampler, ref, advantages, weights, cfg, numbers)
        if imitated_tokens:  # what a right rethought response wrote, trigger included, is also imitated
            imitated = over_tokens([r.at_every_token(is_imitated(r)) for r in rows], mask)
            nll = -(imitated * logps).sum() / imitated_tokens
            loss = loss + cfg.rethink_nll * nll
            sums["loss/nll"] = nll.detach()

        if cfg.perception != "off":
            masked = over_tokens([r.masked_logps for r in rows], mask)
            more, sums["perception/kl"] = perception_loss(logps, masked, weights, cfg)
            loss = loss + more

        # FSDP averages gradients over ranks; the weights already sum to 1 over all ranks together.
        (loss * dist.get_world_size()).backward()

        gap = torch.where(sampled, (old - sampler).abs(), 0.0)
        gaps.append(gap.max())
        sums |= {"gap": gap.sum(), "sampled": sampled.sum(), "entropy": entropy.sum(), "tokens": mask.sum()}
        totals.update(sums)
        scored.append((rows, old, mask))
    norm = optimizer_step(policy, optimizer, lr_at(step, cfg), cfg.max_grad_norm, log)

    # They keep their old ones: what is replayed later is compared with the policy that it came from.
    for rows, old, mask in scored:
        for r, own in zip(rows, by_rollout(old, mask, rows)):
            r.old_logps = own
    totals = {name: float(total) for name, total in totals.items()}
    return {**totals, "largest gap": float(max(gaps)), "norm": norm}


# ----- balance over ranks ----------------------------------------------------------------------------------


def balance(per_update, prompts, cfg):
    """Hand questions to other ranks, so that all have about as much to train on. Collective.

    Groups without an advantage cost nothing: a rank may be left with none, and waits for one that kept all.
    Rollouts travel (ids and log-probabilities); an image is encoded again where it is needed, as for replay.
    Returns this rank's lists, metrics, and (lent, borrowed) for `settle`: {item: rollouts}.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    own = {}
    for number, rollouts in enumerate(per_update):
        for r in rollouts:
            if has_gradient(r, cfg):
                own.setdefault((number, rank, r.question), []).append(r)
    costs = {}
    for item, rollouts in own.items():
        prompt = prompts.get(item[2])  # of a replayed one only its rank that sampled it knows the prompt
        before_them = prompt["input_ids"].shape[1] if prompt else 0
        costs[item] = before_them + sum(map(len, rollouts))
    everyone = {}
    for shares in gather(costs):
        everyone |= shares
    ranks = assigned(everyone, world)
    before = {item: item[1] for item in everyone}
    metrics = {"balance/before": evenness(everyone, before, world),
               "balance/after": evenness(everyone, ranks, world)}

    lent = {item: rollouts for item, rollouts in own.items() if ranks[item] != rank}
    lists = []
    for number, rollouts in enumerate(per_update):
        away = {id(r) for item in lent if item[0] == number for r in lent[item]}
        lists.append([r for r in rollouts if id(r) not in away])
    borrowed = {}
    for offered in gather(lent):
        for item, rollouts in offered.items():
            if ranks[item] == rank:
                borrowed[item] = rollouts
                lists[item[0]] += rollouts
    return lists, metrics, (lent, borrowed)


def encoded_here(rollouts, prompts, records, workers, step, log):
    """{question: prompt} of all rollouts: what is from another rank or an earlier step is encoded again."""
    missing = dict.fromkeys(r.question for r in rollouts if r.question not in prompts)
    [drawn] = workers.prepared([list(missing)], first_step=step)
    return prompts | readable(drawn, records, strict=True, log=log)


def settle(lent, borrowed):
    """Give back what training found out of borrowed rollouts: their owner may replay them. Collective."""
    found = {}
    for item, rollouts in borrowed.items():
        found[item] = [(r.old_logps, r.ref_logps) for r in rollouts]
    for shares in gather(found):
        for item in shares.keys() & lent.keys():
            for r, (old_logps, ref_logps) in zip(lent[item], shares[item]):
                r.old_logps, r.ref_logps = old_logps, ref_logps


# ----- selective sample replay (VL-Rethinker, arXiv 2504.08837) --------------------------------------------


class ReplayBuffer:
    """Rollouts with an advantage, to fill a batch that lacks them.

    All ranks know all entries, (key, |advantage|), and so draw the same; a key is (step, position of the
    question in it, sample). A rollout itself (ids and logprobs, no image) stays with the rank that sampled
    it, which also trains on it again.
    """

    def __init__(self):
        self.clear()

    def restore(self, states, cap):
        """Take what `state` gave on those ranks at saving that this one stands for now. Collective."""
        saved = {}
        for held in states:
            for key, fields in held.items():
                saved[key] = Rollout(**fields)
        self.add(saved, cap)

    def clear(self):
        self.entries = []  # of all ranks, the oldest first
        self.held = {}  # {key: rollout} of this rank

    def state(self):
        """What this rank holds; the entries follow from what all ranks hold."""
        return {key: vars(r) for key, r in self.held.items()}

    def add(self, fresh, cap):
        """Enter this rank's {key: rollout}; beyond `cap` entries the oldest leave. Collective."""
        entered = [(key, abs(r.advantage)) for key, r in fresh.items()]
        entered = sorted(itertools.chain.from_iterable(gather(entered)))
        self.entries = (self.entries + entered)[-cap:]
        kept = {key for key, _ in self.entries}
        held = self.held | fresh
        self.held = {key: r for key, r in held.items() if key in kept}

    def draw(self, count, alpha, chance):
        """`count` keys with replacement, P(j) = |A_j|^alpha / sum_k |A_k|^alpha (Eq. 1); none if empty."""
        if not self.entries:
            return []
        odds = [size ** alpha for _, size in self.entries]
        drawn = chance.choices(self.entries, odds, k=count)
        return [key for key, _ in drawn]


def select(rollouts, questions, buffer, step, cfg):
    """The rollouts that count in the loss, one list for each update, and how many of them are replayed.

    off: all. filter: those with an advantage. replay: those, and as many drawn from the buffer (which holds
    them, too) as the whole batch lacks (Algorithm 1). questions: of all ranks, in the order they were drawn.
    """
    position_of = {q: position for position, q in enumerate(questions)}
    per_update = [[] for _ in range(cfg.updates)]
    effective = {}
    lacking = 0
    for i, r in enumerate(rollouts):
        if left_out(r, cfg):
            continue
        if not r.advantage and cfg.ssr != "off":
            lacking += 1
            continue
        position = position_of[r.question]
        number = which_update(position, len(questions), cfg.updates)
        per_update[number].append(r)
        effective[step, position, i % cfg.group_size] = r
    if cfg.ssr != "replay":
        return per_update, 0

    if cfg.ssr_episode and (step - 1) % cfg.ssr_episode == 0:
        buffer.clear()
    buffer.add(effective, cfg.ssr_cap)
    lacking = int(global_sum([lacking])[0])
    drawn = buffer.draw(lacking, cfg.ssr_alpha, random.Random(f"{cfg.seed}/ssr/{step}"))
    replayed = 0
    for position, key in enumerate(drawn):
        if key in buffer.held:
            number = which_update(position, len(drawn), cfg.updates)
            per_update[number].append(buffer.held[key])
            replayed += 1
    return per_update, replayed


# ----- refill (dynamic sampling of DAPO, arXiv 2503.14476) -------------------------------------------------


def enough_groups(rollouts, waiting, cfg):
    """Whether there are prompts_per_step groups with an advantage. Collective."""
    differing = {r.question for r in rollouts if r.advantage}
    return global_sum([len(differing) + len(waiting)])[0] >= cfg.prompts_per_step


def refill(rollouts, questions, waiting, step, cfg):
    """The first prompts_per_step groups with an advantage, one list for each update. Collective.

    waiting: {(step, position of its question): group} of this rank, from earlier steps; it is left with those
    that are too many now. A group that waits is trained on like a replayed one.
    """
    position_of = {q: position for position, q in enumerate(questions)}
    groups = {}
    for r in rollouts:
        if not left_out(r, cfg):
            groups.setdefault((step, position_of[r.question]), []).append(r)
    for key, group in groups.items():
        if any(r.advantage for r in group):
            waiting[key] = group
    everyone = sorted(itertools.chain.from_iterable(gather(list(waiting))))
    taken = everyone[:cfg.prompts_per_step]
    per_update = [[] for _ in range(cfg.updates)]
    for place, key in enumerate(taken):
        if key in waiting:
            per_update[which_update(place, len(taken), cfg.updates)] += waiting.pop(key)
    return per_update


# ----- forced rethinking (VL-Rethinker, arXiv 2504.08837) --------------------------------------------------

# Each opens a paragraph with the hesitation that rewards.reflections counts.
TRIGGERS = {
    "bare": "\n\nWait,",
    "question": "\n\nWait, does this result really fit the question?",
    "verify": "\n\nWait, let me go over this once more.",
    "correct": "\n\nWait, there must be a mistake somewhere.",
}


@dataclass
class Retry:
    """A finished response that is made to go on: `prefix`, what is left of it, then a forced `trigger`."""
    index: int  # of its rollout in the batch
    prefix: list[int]
    trigger: list[int]
    seed: int


def force_rethink(engine, rollouts, prompts, records, tokenizer, step, cfg):
    """Continue a share of the finished responses behind a trigger; replaces rollouts in index.

    Spliced as token ids: prefix + trigger + continuation. A right result replaces its original; everything
    else stays as it was, so G does too. Returns counts for the log.
    """
    right = [accuracy(r.text, records[r.question]) == 1 for r in rollouts]
    retries = choose_retries(rollouts, right, tokenizer, step, cfg)
    begun, seeds = [], []
    for retry in retries:
        prompt = prompts[rollouts[retry.index].question]
        begun.append(continued(prompt, retry.prefix + retry.trigger))
        seeds.append(retry.seed)
    at_most = dataclasses.replace(cfg, max_new_tokens=cfg.rethink_max)
    samples = generate(engine, begun, seeds, at_most)

    counts = Counter(frac=len(retries))
    accepted = Counter()  # by question
    for retry, (ids, logps, truncated) in zip(retries, samples):
        r = rollouts[retry.index]
        was_right = right[retry.index]
        response = retry.prefix + retry.trigger + ids
        text = tokenizer.decode(response, skip_special_tokens=True)
        now_right = not truncated and accuracy(text, records[r.question]) == 1
        counts["fixed"] += now_right and not was_right
        counts["broke"] += was_right and not now_right

        # A result of a few words did not reconsider, one that hesitates again and again does not end. At most
        # two a question, so that G keeps its variety (numbers of the released code, as --rethink_min is).
        hesitations = 1 + reflections(tokenizer.decode(ids))
        fitting = len(ids) >= cfg.rethink_min and hesitations <= 4
        if now_right and fitting and accepted[r.question] < 2:
            accepted[r.question] += 1
            start = len(retry.prefix)
            stop = start + len(retry.trigger)
            unsampled = torch.full((stop - start,), math.nan)
            sampler_logps = torch.cat([r.sampler_logps[:start], unsampled, logps])
            rewound = len(r) - 1 - start  # its stop token does not count
            rollouts[retry.index] = Rollout(r.question, response, sampler_logps, truncated=False, text=text,
                                            trigger=(start, stop), rewound=rewound)
    counts["accepted"] = sum(accepted.values())
    return counts


def choose_retries(rollouts, right, tokenizer, step, cfg):
    """Which responses are forced to rethink, by which trigger and from where; drawn anew for each step.

    Where more than 70 % of a group is right, its wrong ones are left alone (a number of the released code).
    """
    kinds, odds = parse_kinds(cfg.rethink_kinds)
    retries = []
    for index, r in enumerate(rollouts):
        sample = index % cfg.group_size
        group = right[index - sample:index - sample + cfg.group_size]
        chance = random.Random(f"{cfg.seed}/rethink/{step}/{r.question}/{sample}")
        if chance.random() >= cfg.rethink_frac:
            continue
        no_room = len(r) > cfg.max_new_tokens - cfg.rethink_max - 1
        easy_but_wrong = sum(group) > 0.7 * cfg.group_size and not right[index]
        if r.truncated or no_room or easy_but_wrong:
            continue
        kind = chance.choices(kinds, odds)[0]
        if kind == "outcome":
            kind = "verify" if right[index] else "correct"
        prefix = r.response[:-1]  # without its stop token
        if chance.random() < cfg.rethink_rewind:
            prefix = prefix[:before_answer(prefix, tokenizer)]
        trigger = tokenizer(TRIGGERS[kind], add_special_tokens=False)["input_ids"]
        retries.append(Retry(index, prefix, trigger, seed=chance.getrandbits(62)))
    return retries


def parse_kinds(text):
    """"bare=0.2,outcome=0.8" -> (["bare", "outcome"], [0.2, 0.8]). Raises ValueError."""
    if not re.fullmatch(r"((bare|question|verify|correct|outcome)=[\d.]+(,|$))+", text):
        raise ValueError(f"--rethink_kinds {text}: use bare, question, verify, correct, outcome, "
                         "each with =WEIGHT, separated by commas")
    kinds, weights = [], []
    for pair in text.split(","):
        kind, weight = pair.split("=")
        kinds.append(kind)
        weights.append(float(weight))
    return kinds, weights


def before_answer(ids, tokenizer):
    """How many leading tokens come before the answer; all, if there is none.

    Thoughts that are tagged end before their closing tag, others before the paragraph of the last answer cue.
    """
    text = tokenizer.decode(ids)
    end = text.rfind("</think>")
    if end < 0:
        end = len(text)
        cues = list(re.finditer(r"<answer>|\\boxed|\banswer\b", text, re.IGNORECASE))
        if cues:
            cue = cues[-1].start()
            paragraph = text.rfind("\n\n", 0, cue)
            end = paragraph if paragraph > 0 else cue

    def characters(n):
        return len(tokenizer.decode(ids[:n]))

    # The most tokens whose text does not reach beyond `end`, by halving: each look decodes them all.
    return bisect.bisect_right(range(len(ids) + 1), end, key=characters) - 1


# ----- perception: does the answer come from the picture? --------------------------------------------------


def views(questions, view, workers, step, log):
    """{(question, view): prompt} of encode_view."""
    asked = [(q, view) for q in dict.fromkeys(questions)]
    [drawn] = workers.prepared([asked], step)
    return readable(drawn, None, strict=True, log=log)


def sample_noised(engine, questions, prompts, seeds, tokenizer, workers, step, log, cfg):
    """sample_rollouts, the last --noisy_frac of each group from noised images (arXiv 2504.13055).

    They are scored and trained on like the others. To correct for what sampled them, which saw another image,
    would undo the method.
    """
    clean = max(1, min(cfg.group_size - 1, round(cfg.group_size * (1 - cfg.noisy_frac))))
    asked = [q if i % cfg.group_size < clean else (q, "noised") for i, q in enumerate(questions)]
    shown = prompts | views(questions, "noised", workers, step, log)
    rollouts = sample_rollouts(engine, asked, shown, seeds, tokenizer, cfg)
    for q, r in zip(questions, rollouts):
        if r.question != q:
            r.question = q
            r.sampler_logps = r.at_every_token(math.nan)
    return rollouts


def look_again(rollouts, policy, prompts, workers, dummy, step, log, cfg):
    """Score responses once more, with masked images: sets masked_logps, and for vppo credit. Collective."""
    rollouts = list({id(r): r for r in rollouts}.values())
    masked = views([r.question for r in rollouts], "masked", workers, step, log)
    blind = [dataclasses.replace(r, question=(r.question, "masked")) for r in rollouts]
    for r, logps in zip(rollouts, all_logprobs(policy, blind, masked, dummy, cfg)):
        r.masked_logps = logps
    if cfg.perception == "vppo":
        seen = all_logprobs(policy, rollouts, prompts, dummy, cfg)
        reliance = []
        for r, logps in zip(rollouts, seen):
            r.old_logps = logps if r.old_logps is None else r.old_logps
            reliance.append(k3(r.masked_logps - logps).clamp(max=10) * policy_mask(r, cfg))
        for r, of_token, factor in zip(rollouts, reliance, vppo_factors(reliance)):
            r.credit = factor * most_reliant(of_token)


def most_reliant(reliance):
    """1 at the 40 % of a rollout's tokens that rely most on the image (VPPO, arXiv 2510.09285), else 0."""
    count = math.ceil(2 * len(reliance) / 5)
    return torch.zeros(len(reliance)).index_fill(0, reliance.topk(count).indices, 1.0)


def vppo_factors(reliance, least=0.9):
    """What each rollout's advantage is multiplied by: more if it relies on the image, 1 in the mean of the
    batch. Collective."""
    means = [of_token.mean().item() for of_token in reliance]
    low = -global_max(-min(means, default=math.inf))
    high = global_max(max(means, default=-math.inf))
    if not low < high:
        return [1.0] * len(means)
    scaled = [(mean - low) / (high - low) for mean in means]
    total, count = global_sum([sum(scaled), len(scaled)])
    most = least + (1 - least) * count / total
    return [least + (most - least) * share for share in scaled]


def perception_loss(logps, masked_logps, weights, cfg):
    """What --perception adds to the loss, and the KL to the policy that sees little. Tensors (B, T-1).

    PAPO (arXiv 2507.06448) enlarges that KL; -log pi keeps it from doing so by writing noise.
    """
    kl = (weights * k3(masked_logps - logps)).sum()
    more = -cfg.perception_entropy * (weights * logps).sum()
    return more - cfg.perception_kl * kl if cfg.perception == "papo" else more, kl.detach()


# ----- staged lengths (PTST of Vision-R1, arXiv 2503.06749) ------------------------------------------------


class Stage(NamedTuple):
    max_new_tokens: int
    group_size: int
    steps: int


def parse_ptst(text):
    """"4096x16:100,8192x8:100" -> [Stage]; [] without stages. Raises ValueError."""
    if not text:
        return []
    if not re.fullmatch(r"\d+x\d+:\d+(,\d+x\d+:\d+)*", text):
        raise ValueError(f"--ptst {text}: stages are LENGTHxGROUP:STEPS, separated by commas")
    stages = []
    for stage in text.split(","):
        length, size, steps = re.split("[x:]", stage)
        stages.append(Stage(int(length), int(size), int(steps)))
    return stages


def staged(cfg, stages, step):
    """(number of the stage, cfg with its length and group size); (0, cfg) without stages.

    Short responses in large groups first, then longer ones in smaller groups: a model that was taught long
    chains of thought first learns which are right before it may think longer.
    """
    end = 0
    for number, stage in enumerate(stages, 1):
        end += stage.steps
        if step <= end:
            return number, dataclasses.replace(cfg, max_new_tokens=stage.max_new_tokens,
                                               group_size=stage.group_size)
    return 0, cfg


# ----- the log ---------------------------------------------------------------------------------------------

MEASURED = ("loss/policy", "loss/clip_low", "loss/clip_high", "loss/kl", "policy/kl_old",
            "mismatch/dropped")
RETHINK = ("frac", "fixed", "broke", "accepted")  # counts of force_rethink
LEVELS = ("all_wrong", "hard", "medium", "easy", "all_right")  # of a group, by its share of right answers


def difficulty(share):
    """The level of a group with that share of right answers; all_wrong may have a few in a large group."""
    limits = (1/8, 3/8, 6/8, 1)
    return LEVELS[bisect.bisect_right(limits, share)]


def rollout_metrics(rollouts, batch, parts, spec, cfg):
    """Rewards, groups and lengths over all ranks; `batch` is what counts in the loss."""
    of_groups = ["reward/std", "groups/effective_frac", *(f"groups/{level}" for level in LEVELS)]
    of_rollouts = ["reward/mean", "reward/missing", "len/mean", "len/truncated", "len/reflect"]
    of_rewards = [f"reward/{name}" for name in spec]
    means = Means(*of_groups, *of_rollouts, *of_rewards, "groups/trained_frac")
    for r, part in zip(rollouts, parts):
        means.add("len/mean", len(r))
        means.add("len/truncated", r.truncated)
        means.add("len/reflect", reflections(r.text) > 0)
        means.add("reward/missing", math.isnan(r.reward))
        for name in spec:
            if not math.isnan(part[name]):
                means.add(f"reward/{name}", part[name])
    for r in batch:
        means.add("groups/trained_frac", r.advantage != 0)
    groups = len(rollouts) // cfg.group_size
    rewards = torch.tensor([r.reward for r in rollouts]).view(groups, cfg.group_size)  # (Q, G)
    least = rewards.nan_to_num(nan=math.inf).amin(1)
    differing = rewards.nan_to_num(nan=-math.inf).amax(1) > least
    deviations = rewards.std(1)
    means.add("reward/mean", rewards.nansum(), rewards.numel() - int(rewards.isnan().sum()))
    means.add("reward/std", deviations.nansum(), int(deviations.isfinite().sum()))
    means.add("groups/effective_frac", differing.sum(), groups)
    for start in range(0, len(parts), cfg.group_size):
        right = [part["solved"] for part in parts[start:start + cfg.group_size]]
        found = difficulty(sum(right) / cfg.group_size)
        for level in LEVELS:
            means.add(f"groups/{level}", level == found)
    metrics = means.over_ranks()
    metrics["groups/zero_adv_frac"] = 1 - metrics["groups/effective_frac"]
    return metrics


def update_metrics(totals, names, cfg):
    """What train_on's updates measured, over all ranks; `names` are means over the step's updates."""
    metrics = {}
    for name, total in zip(names, global_sum([totals[name] / cfg.updates for name in names])):
        metrics[name] = total
    gap, sampled = global_sum([totals["gap"], totals["sampled"]])
    entropy, tokens = global_sum([totals["entropy"], totals["tokens"]])
    metrics["mismatch/mean"] = gap / max(1.0, sampled)
    metrics["policy/entropy"] = entropy / max(1.0, tokens)
    metrics["mismatch/max"] = global_max(float(totals["largest gap"]))
    metrics["optim/grad_norm"] = totals["norm"]
    return metrics


def shown_groups(rollouts, records, tokenizer, step, group_size):
    """All rollouts of the first three groups that differ inside, as rows: the ones worth reading."""
    shown = []
    for start in range(0, len(rollouts), group_size):
        group = rollouts[start:start + group_size]
        differ = any(r.advantage for r in group)
        if differ and len(shown) < 3 * group_size:
            shown += group
    rows = []
    for r in shown:
        record = records[r.question]
        trigger = None
        if r.trigger:  # where its characters are
            start, stop = r.trigger
            before = tokenizer.decode(r.response[:start], skip_special_tokens=True)
            with_it = tokenizer.decode(r.response[:stop], skip_special_tokens=True)
            trigger = [len(before), len(with_it)]
        row = {"step": step, "id": record["id"], "question": record["question"], "answer": record["answer"]}
        row |= {"response": r.text, "trigger": trigger, "rewound": r.rewound}
        row |= {"reward": r.reward, "advantage": r.advantage, "tokens": len(r), "truncated": r.truncated}
        rows.append(row)
    return rows


def evaluate(engine, records, prompts, share, processor, cfg):
    """Greedy accuracy and mean response length on held-out records, sharded over ranks.

    records: all, as numbered by encode_share, which gives prompts and share. What cannot be read counts as
    wrong.
    """
    greedy = dataclasses.replace(cfg, temperature=0.0)
    seeds = [0] * len(prompts)  # greedy decoding draws nothing
    rollouts = sample_rollouts(engine, list(prompts), prompts, seeds, processor.tokenizer, greedy)
    right = sum(accuracy(r.text, records[r.question]) for r in rollouts)
    length = sum(map(len, rollouts))
    right, length, n = global_sum([right, length, share])
    return {"eval/accuracy": right / n, "eval/len": length / n}


# ----- the run ---------------------------------------------------------------------------------------------


def check(cfg):
    """Refuse what cannot train; returns the stages of --ptst. Raises ValueError naming the flag."""
    check_engine(cfg)
    stages = parse_ptst(cfg.ptst)
    check_at_least(-1, cfg, "workers")
    check_at_least(1, cfg, "steps", "prompts_per_step", "max_prompt_tokens", "max_new_tokens",
                   "rollout_tokens", "updates", "tp", "token_budget", "eval_every", "eval_n", "save_every",
                   "samples_every", "keep", "ssr_cap", "refill_max")
    if cfg.group_size < 2:
        raise ValueError("--group_size must be at least 2: the advantage compares the rollouts of a group")
    if any(stage.group_size < 2 for stage in stages):
        raise ValueError(f"--ptst {cfg.ptst}: a group has at least 2 rollouts")
    if not 0 <= cfg.rethink_frac < 1:
        raise ValueError("--rethink_frac is a share, at least 0 and below 1")
    shortest = min([stage.max_new_tokens for stage in stages], default=cfg.max_new_tokens)
    if cfg.rethink_frac and shortest <= cfg.rethink_max + 1:
        raise ValueError(f"--rethink_max {cfg.rethink_max}: a response of at most {shortest} tokens "
                         "leaves no room for rethinking")
    if cfg.rethink_frac and cfg.engine == "server":
        raise ValueError("--rethink_frac: a server takes text, and a forced response goes on from token ids; "
                         "use --engine vllm or hf")
    parse_kinds(cfg.rethink_kinds)
    if not 0 <= cfg.noisy_frac < 1:
        raise ValueError("--noisy_frac is a share, at least 0 and below 1")
    if cfg.perception == "vppo" and cfg.objective == "gspo":
        raise ValueError("--perception vppo chooses tokens, --objective gspo takes a response as a whole")
    return stages


def main(cfg):
    """Train. A step has nine beats, numbered below."""
    rank, world, device = init_distributed(cfg.dist_timeout)
    end_on_signals()
    with one_line_errors():
        stages = check(cfg)
        if stages:
            cfg = dataclasses.replace(cfg, steps=sum(stage.steps for stage in stages))
        add_rewards(cfg.reward, cfg)
        spec = parse_reward_spec(cfg.reward)
        run = open_run(cfg, device, need=("answer",))
        everything = run.records + run.held_out
        dtype = run.policy.compute_dtype
        encode_record = functools.partial(encode_prompt, processor=run.processor, max_pixels=cfg.max_pixels,
                                          max_tokens=cfg.max_prompt_tokens, dtype=dtype)
        encode = functools.partial(encode_view, records=everything, encode=encode_record, cfg=cfg)
        workers = Workers(encode, cfg.workers)
        engine = build_engine(run.origin, run.processor, cfg, device)
        dummy = blank_prompt(run.processor, cfg.max_pixels, dtype)  # where a rank has no image (collate)
        log = RunLog(cfg, run.done)
    policy, processor, optimizer, records = run.policy, run.processor, run.optimizer, run.records
    tokenizer = processor.tokenizer
    reference = None
    if cfg.kl_beta:  # with LoRA the policy is its own: train_on turns the adapters off
        reference = policy if cfg.lora_rank else load_policy(run.origin, cfg, device, trainable=False)[0]
    buffer = ReplayBuffer()
    buffer.restore([saved["replay"] for saved in run.extras], cfg.ssr_cap)
    waiting, draws = {}, run.done  # refill: groups that were too many; how often questions were drawn
    for saved in run.extras:
        draws = saved["draws"]
        for key, group in saved["waiting"].items():
            waiting[key] = [Rollout(**fields) for fields in group]
    draws = int(global_max(draws))  # a rank that is new has nothing to restore
    sync_weights(policy, engine)

    log.note(f"{len(records)} questions; a step: {cfg.prompts_per_step} x {cfg.group_size} rollouts "
             f"on {world} rank(s); images are prepared by {len(workers.crew)} process(es) a rank")
    longest = max([stage.max_new_tokens for stage in stages], default=cfg.max_new_tokens)
    if cfg.ssr == "replay":
        numbers = 2 if cfg.perception == "off" else 4  # log-probabilities, and what a masked image said
        of_token = 8 + 28 + 4 * numbers  # bytes of pointer, Python int and fp32 numbers
        size = cfg.ssr_cap * longest * of_token
        log.note(f"replay buffer: at most {cfg.ssr_cap} rollouts, {size / 2**30:.2f} GiB over all ranks")
    few = check_rows(records, encode_record, log)
    with refusing(policy.config.model_type, log):
        longest = dataclasses.replace(cfg, max_new_tokens=longest)
        worst_mismatch = check_run(policy, optimizer, engine, few, dummy, log, longest)
    if reference:
        reference.packs = policy.packs
    held_out, share = encode_share(run, workers)
    if run.held_out and not run.done:
        before = evaluate(engine, everything, held_out, share, processor, staged(cfg, stages, 1)[1])
        log.write("metrics.jsonl", [{"step": 0, **before}])
        log.note(f"before training: {before['eval/accuracy']:.3f} "
                 f"of {len(run.held_out)} held-out questions right")

    most = cfg.refill_max if cfg.ssr == "refill" else 1  # draws in a step
    last = draws + most * (cfg.steps - run.done)
    order = data_order(len(records), cfg.prompts_per_step, draws, last, cfg.seed)
    shares = [questions[rank::world] for questions in order]
    drawn_ahead = zip(order, workers.prepared(shares, first_step=draws + 1))
    stopping = catch_signals()
    watchdog, watch = Watchdog(cfg.stall), Stopwatch()
    for step in range(run.done + 1, cfg.steps + 1):
        stage, stage_cfg = staged(cfg, stages, step)  # length and group size are the stage's
        questions, prompts, rollouts, parts = [], {}, [], []
        unreadable, rethought = 0, Counter()
        for _ in range(most):  # once; with --ssr refill until enough groups have an advantage
            drawn_now, drawn = next(drawn_ahead)  # of all ranks; this one's, encoded
            draws += 1
            watch.lap("time/data")

            # 1. draw this rank's questions; their images were prepared in the background
            fresh = readable(drawn, records, cfg.strict, log)
            usable, skipped = global_sum([len(fresh), len(drawn) - len(fresh)])
            if not usable:
                log.fail(f"step {step}: none of its {len(drawn_now)} questions can be used; "
                         "see the lines above")
            if step == run.done + 1 and fresh and not prompts:
                first = next(iter(fresh.values()))
                log.note("first prompt: " + tokenizer.decode(first["input_ids"][0]))
            # A small dataset comes round again within a step, and a question would get the same rollouts.
            fresh = {q: prompt for q, prompt in fresh.items() if q not in questions}
            questions += [q for q in drawn_now if q not in questions]
            prompts |= fresh
            unreadable += skipped

            # 2. generate G rollouts of each, those of a question side by side
            asked, seeds = [], []
            for q in fresh:
                for sample in range(stage_cfg.group_size):
                    asked.append(q)
                    seeds.append(rollout_seed(cfg, step, q, sample))
            if cfg.noisy_frac:
                now = sample_noised(engine, asked, prompts, seeds, tokenizer, workers, step, log, stage_cfg)
            else:
                now = sample_rollouts(engine, asked, prompts, seeds, tokenizer, stage_cfg)
            if cfg.rethink_frac:
                rethought += force_rethink(engine, now, prompts, records, tokenizer, step, stage_cfg)
            watch.lap("time/gen")

            # 3. score
            parts += score_rollouts(now, records, spec, step, stage_cfg)
            watch.lap("time/score")

            # 4. advantages within each group
            rewards = torch.tensor([r.reward for r in now])
            rewards = rewards.view(len(fresh), stage_cfg.group_size)  # (Q, G)
            advantages = group_advantages(rewards, cfg.adv_std)
            for r, advantage in zip(now, advantages.flatten().tolist()):
                r.advantage = advantage
            rollouts += now
            if cfg.ssr == "refill" and enough_groups(rollouts, waiting, cfg):
                break
        sleep_engine(engine)

        # 5. select what counts, as much for each rank; a question from elsewhere or before is encoded again
        if cfg.ssr == "refill":
            per_update, replayed = refill(rollouts, questions, waiting, step, stage_cfg), 0
            late = itertools.chain.from_iterable(waiting.values())
            keep_old_logprobs(late, policy, prompts, dummy, stage_cfg)
        else:
            per_update, replayed = select(rollouts, questions, buffer, step, stage_cfg)
        batch = list(itertools.chain.from_iterable(per_update))
        per_update, loads, loans = balance(per_update, prompts, stage_cfg)
        trained = [r for r in itertools.chain.from_iterable(per_update) if has_gradient(r, cfg)]
        encoded = encoded_here(trained, prompts, records, workers, step, log)
        if cfg.perception != "off":
            watch.lap("time/train")
            look_again(trained, policy, encoded, workers, dummy, step, log, stage_cfg)
            watch.lap("time/perception")

        # 6. update
        totals = train_on(per_update, policy, reference, optimizer, encoded, dummy, step, log, stage_cfg)
        if cfg.ssr == "replay":
            settle(*loans)
        watch.lap("time/train")

        # 7. hand the new weights to the sampler
        sync_weights(policy, engine)
        watch.lap("time/sync")

        # 8. log
        metrics = rollout_metrics(rollouts, batch, parts, spec, stage_cfg)
        if metrics["reward/missing"] == 1:
            log.fail(f"step {step}: the judge was silent on every rollout: {SLOW['judge'].fault}")
        metrics |= update_metrics(totals, (*MEASURED, "loss/nll", "perception/kl"), cfg)
        tokens = global_sum([sum(map(len, rollouts)), sum(map(len, trained))])
        metrics["tokens/gen"], metrics["tokens/train"] = tokens
        metrics["data/unreadable"] = unreadable
        replayed, stop_now, metrics["refill/waiting"] = global_sum([replayed, len(stopping), len(waiting)])
        total = len(questions) * stage_cfg.group_size
        metrics["replay/frac"] = replayed / total
        rethought = global_sum([rethought[name] for name in RETHINK])
        for name, count in zip(RETHINK, rethought):
            metrics[f"rethink/{name}"] = count / total
        metrics |= {"ptst/stage": stage, **loads, "optim/lr": lr_at(step, cfg), **watch.laps,
                    "time/step": watch.total(), "mem/peak_gb": peak_memory(device),
                    "mem/host_gb": host_memory()}
        end_if_mismatched(step, metrics, worst_mismatch, log)
        if step % cfg.samples_every == 0:
            log.write("samples.jsonl", shown_groups(rollouts, records, tokenizer, step, stage_cfg.group_size))

        # 9. evaluate and save
        if run.held_out and (step % cfg.eval_every == 0 or step == cfg.steps):
            metrics |= evaluate(engine, everything, held_out, share, processor, stage_cfg)
            log.note(f"step {step}: {metrics['eval/accuracy']:.3f} of {len(run.held_out)} held-out questions "
                     f"right, {metrics['eval/len']:.1f} tokens long")
        log.step(step, metrics, shown=("reward/mean", "len/mean", "groups/effective_frac", "eval/accuracy"))
        if step % cfg.save_every == 0 or step == cfg.steps or stop_now:
            with one_line_errors():
                held_back = {key: list(map(vars, group)) for key, group in waiting.items()}
                extra = {"replay": buffer.state(), "waiting": held_back, "draws": draws}
                save_checkpoint(cfg, step, policy, processor, optimizer, extra,
                                wait=stop_now or step == cfg.steps)
        if stop_now:
            log.note(f"interrupted: saved step {step}; go on with --resume")
            break
        watchdog.step()
        watch = Stopwatch()
    watchdog.done()
    if cfg.engine != "vllm":  # vLLM takes the process group down itself when Python exits
        dist.destroy_process_group()


if __name__ == "__main__":
    main(parse_config(Config))
