"""The objective in worked numbers: advantages, clip, KL, reductions, learning rate, data order."""
import dataclasses
import math
import random
from types import SimpleNamespace

import pytest
import torch

import sft
import grpo

EIGHT = {k: [1.0] * k + [0.0] * (8 - k) for k in range(9)}
PLAIN = SimpleNamespace(objective="clip", clip_low=0.2, clip_high=0.35, kl_beta=0.0, is_mode="truncate",
                        is_cap=2.0)


def row(values):
    return torch.tensor([values], dtype=torch.float32)


def loss_of(lengths, advantages, logps, old=None, ref=None, mean="token", **cfg):
    """grpo_loss of ragged rows given flat per-token lists, with the weights of --loss_mean."""
    cfg = SimpleNamespace(**vars(PLAIN) | cfg)
    width = max(lengths)
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]

    def spread(values):
        return torch.zeros(mask.shape).masked_scatter(mask, torch.tensor(values, dtype=torch.float32))

    each = {"token": lambda n: 1 / sum(lengths), "sequence": lambda n: 1 / len(lengths) / n}[mean]
    per_row = [each(n) for n in lengths]
    weights, signs = (spread([x for x, n in zip(xs, lengths) for _ in range(n)])
                      for xs in (per_row, advantages))
    logps, old = spread(logps), spread(old if old is not None else logps)
    return grpo.grpo_loss(logps, old, old, spread(ref) if ref is not None else None, signs, weights, cfg)


# ----- advantages


@pytest.mark.parametrize("rewards, std, eps, expected", [
    (EIGHT[1], False, 1e-4, [0.875] + [-0.125] * 7),
    (EIGHT[1], True, 0.0, [2.4749] + [-0.3536] * 7),
    (EIGHT[4], False, 1e-4, [0.5] * 4 + [-0.5] * 4),
    (EIGHT[4], True, 0.0, [0.9354] * 4 + [-0.9354] * 4),
    (EIGHT[7], False, 1e-4, [0.125] * 7 + [-0.875]),
    (EIGHT[7], True, 0.0, [0.3536] * 7 + [-2.4749]),
    ([1] * 4 + [0] * 12, True, 0.0, [1.6771] * 4 + [-0.5590] * 12),
    ([1, 0, 0, 0], True, 0.0, [1.5] + [-0.5] * 3),
    ([1] + [0] * 15, True, 0.0, [3.75] + [-0.25] * 15),
    ([2, 1, 1, 1, 0, 0, 1, 2], True, 1e-4, [1.3227, 0, 0, 0, -1.3227, -1.3227, 0, 1.3227]),
    ([2] + [0] * 7, True, 1e-4, [2.4745] + [-0.3535] * 7),
    ([1.75] + [1] * 7, True, 1e-4, [2.4739] + [-0.3534] * 7),
    ([2, 1.659091, 1.5, 1, 1, .5, .2, 0], True, 1e-4,
     [1.424362, .947189, .724508, .024654, .024654, -.6752, -1.095112, -1.375054]),
    ([1, 0] * 4, True, 1e-4, [.935239, -.935239] * 4),
])
def test_group_advantages_table(rewards, std, eps, expected):
    got = grpo.group_advantages(row(rewards), std, eps)[0].tolist()
    assert got == pytest.approx(expected, abs=1e-4 if eps == 0 else 6e-5)


@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, -2.7, 1e-8, 1e8])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
@pytest.mark.filterwarnings("ignore:std")  # a group of one has no deviation
def test_equal_rewards_give_exactly_zero(value, size, std):
    assert grpo.group_advantages(torch.full((3, size), value), std).tolist() == [[0.0] * size] * 3


def test_groups_do_not_touch_each_other():
    rewards = torch.tensor([EIGHT[0], EIGHT[3], EIGHT[8], EIGHT[1]])
    together = grpo.group_advantages(rewards)
    assert torch.equal(together, torch.cat([grpo.group_advantages(r[None]) for r in rewards]))
    assert together.isfinite().all() and together.any(1).tolist() == [False, True, False, True]
    assert grpo.group_advantages(torch.zeros(0, 8)).shape == (0, 8)


def test_advantages_sum_to_zero():
    rewards = torch.rand(50, 8, generator=torch.Generator().manual_seed(0))
    for std in (True, False):
        assert grpo.group_advantages(rewards, std).sum(1).abs().max() < 1e-4


# ----- clipped surrogate


@pytest.mark.parametrize("ratio, advantage, loss, clipped", [
    (1.5, .5, -.675, "high"), (0.7, .5, -.35, None), (1.5, -.5, .75, None), (0.7, -.5, .4, "low"),
    (math.exp(-.6 + 1.0), .5, -.675, "high"), (math.exp(-.6 + 1.0), -.5, .7459, None),
    (math.exp(-1.0 + .5), -.5, .4, "low"), (1.0, .5, -.5, None), (1.0, -.5, .5, None),
    (1.35, .5, -.675, None), (1.34, 1, -1.34, None), (0.81, -1, .81, None),
    (0.2, 1, -.2, None), (5.0, -1, 5.0, None),
])
def test_clip_table(ratio, advantage, loss, clipped):
    """Clip range 0.8..1.35: only a high ratio of a good token or a low ratio of a bad one is cut."""
    logps = row([math.log(ratio) - 1]).requires_grad_()
    old = row([-1.0])
    got, stats = grpo.grpo_loss(logps, old, old, None, row([advantage]), row([1.0]), PLAIN)
    got.backward()
    assert got.item() == pytest.approx(loss, abs=1e-4)
    assert stats["loss/policy"].item() == got.item()
    if ratio != 1.35:  # on the edge rounding decides
        cut = {k: stats[f"loss/clip_{k}"].item() for k in ("low", "high")}
        assert cut == {"low": clipped == "low", "high": clipped == "high"}
        assert logps.grad.item() == pytest.approx(0 if clipped else -ratio * advantage, abs=1e-4)


@pytest.mark.parametrize("old, sampler, cap, weight", [
    (-1.0, -1.0, 2.0, 1.0), (-1.0, -1.5, 2.0, math.exp(.5)), (-1.0, -3.0, 2.0, 2.0),
    (-1.0, -0.5, 2.0, math.exp(-.5)), (-1.0, -3.0, 1.0, 1.0), (-1.0, -3.0, 9.0, math.exp(2)),
])
def test_importance_weight_is_capped_above_only(old, sampler, cap, weight):
    logps = row([old]).requires_grad_()
    loss, _ = grpo.grpo_loss(logps, row([old]), row([sampler]), None, row([1.0]), row([1.0]),
                             SimpleNamespace(**vars(PLAIN) | {"is_cap": cap}))
    loss.backward()
    assert loss.item() == pytest.approx(-weight, rel=1e-5)
    assert logps.grad.item() == pytest.approx(-weight, rel=1e-5)


# ----- KL


@pytest.mark.parametrize("logp, ref, k3", [
    (0, .1, 0.005171), (0, -.1, 0.004837), (0, .5, 0.148721), (0, -.5, 0.106531),
    (-1, -1.2, .018731), (-1.2, -1, .021403), (-2, -1, .718282),
    (-1, -1.2, .01873075), (-1, -.8, .02140276), (-.7, -.7, 0.0),
])
def test_k3_table(logp, ref, k3):
    loss, stats = loss_of([1], [0.0], [logp], ref=[ref], kl_beta=0.25)
    assert stats["loss/kl"].item() == pytest.approx(k3, abs=1e-6)
    assert loss.item() == pytest.approx(0.25 * k3, abs=1e-6)


def test_k3_is_never_negative_and_falls_toward_the_reference():
    logps = (torch.randn(1, 1000, generator=torch.Generator().manual_seed(0)) - 3).requires_grad_()
    ref, zero = torch.full((1, 1000), -3.0), torch.zeros(1, 1000)
    for i in (0, 500):
        one_hot = zero.index_fill(1, torch.tensor(i), 1.0)
        _, stats = grpo.grpo_loss(logps, logps, logps, ref, zero, one_hot,
                                  SimpleNamespace(**vars(PLAIN) | {"kl_beta": 1.0}))
        assert stats["loss/kl"] >= 0
    loss, _ = grpo.grpo_loss(logps, logps.detach(), logps.detach(), ref, zero, zero + 1,
                             SimpleNamespace(**vars(PLAIN) | {"kl_beta": 1.0}))
    loss.backward()
    away = (logps - ref).abs() > 0.01
    assert (logps.grad.sign() == (logps - ref).sign())[away].all()


def test_no_reference_is_needed_without_kl():
    loss, stats = loss_of([2], [1.0], [-1.0, -2.0])
    assert loss.item() == -1.0 and "loss/kl" not in stats


# ----- reductions


@pytest.mark.parametrize("mean, loss", [("token", -0.0556), ("sequence", -0.1667)])
def test_reductions(mean, loss):
    """Lengths 3, 2, 4 with advantages .5, .5, -.5 at ratio 1."""
    assert loss_of([3, 2, 4], [.5, .5, -.5], [-1.0] * 9, mean=mean)[0].item() == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize("lengths, rewards, logps, ref, beta, expected", [
    ([2, 3], None, [-1, -.5, -2, -1, -.3], [-1.2, -.5, -1, -1, -.3], .04, .004976),
    ([3, 1], [1, 0], [-1, -1, -1, -1], [-1.2, -1, -.8, -1.2], 0.0, 0.0),
    ([3, 1], [1, 0], [-1, -1, -1, -1], [-1.2, -1, -.8, -1.2], .04, .00064217),
], ids=["reason-rft", "rise beta 0", "rise beta .04"])
def test_worked_losses(lengths, rewards, logps, ref, beta, expected):
    """Mean over a completion's tokens, then over completions, at ratio 1."""
    advantages = grpo.group_advantages(row(rewards))[0].tolist() if rewards else [1.0, -1.0]
    loss, _ = loss_of(lengths, advantages, logps, ref=ref, mean="sequence", kl_beta=beta)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("advantage, tokens, loss", [
    (1.0, ([-1, -.5], [-1.2, -.5]), -.999625), (-1.0, ([-2, -1, -.3], [-1, -1, -.3]), 1.009577),
])
def test_worked_single_completions(advantage, tokens, loss):
    got, _ = loss_of([len(tokens[0])], [advantage], tokens[0], ref=tokens[1], kl_beta=.04)
    assert got.item() == pytest.approx(loss, abs=1e-6)


# ----- against other implementations


def slow_loss(rows, cfg):
    """The objective as a loop over rows of (advantage, weight, [(logp, old, sampler, ref), ...])."""
    policy = low = high = kl = 0.0
    for advantage, weight, tokens in rows:
        for logp, old, sampler, ref in tokens:
            ratio = math.exp(logp - old)
            bounded = min(max(ratio, 1 - cfg.clip_low), 1 + cfg.clip_high)
            surrogate = min(ratio * advantage, bounded * advantage)
            policy -= weight * min(cfg.is_cap, math.exp(old - sampler)) * surrogate
            low += weight * (ratio < 1 - cfg.clip_low and advantage < 0)
            high += weight * (ratio > 1 + cfg.clip_high and advantage > 0)
            kl += weight * (math.exp(ref - logp) - (ref - logp) - 1)
    return policy + cfg.kl_beta * kl, policy, low, high, kl


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("mean", ["token", "sequence"])
def test_equals_a_slow_loop_on_ragged_rows(seed, mean):
    rng = random.Random(seed)
    cfg = SimpleNamespace(**vars(PLAIN) | {
        "clip_low": rng.choice([.1, .2]), "clip_high": rng.choice([.2, .28]), "kl_beta": rng.choice([.01, 1]),
        "is_cap": rng.choice([1.2, 2])})
    lengths = [rng.randint(1, 9) for _ in range(7)]

    def draw():
        return [-rng.expovariate(1), *(rng.gauss(0, .4) for _ in range(3))]

    rows = []
    for n in lengths:
        tokens = [(x, x + a, x + a + b, x + c) for x, a, b, c in (draw() for _ in range(n))]
        rows.append((rng.gauss(0, 1), 1 / sum(lengths) if mean == "token" else 1 / len(lengths) / n, tokens))
    mask = torch.arange(12)[None] < torch.tensor(lengths)[:, None]
    garbage = torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed))  # outside the response
    fields = [garbage.masked_scatter(mask, torch.tensor([t[k] for _, _, tokens in rows for t in tokens]))
              for k in range(4)]
    advantages = torch.tensor([a for a, _, _ in rows])[:, None].expand(mask.shape)
    weights = torch.tensor([w for _, w, _ in rows])[:, None] * mask
    logps = fields[0].requires_grad_()
    loss, stats = grpo.grpo_loss(logps, *fields[1:], advantages, weights, cfg)
    loss.backward()
    expected = slow_loss(rows, cfg)
    got = [loss.item(), *(stats[f"loss/{k}"].item() for k in ("policy", "clip_low", "clip_high", "kl"))]
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-5) and min(expected[2:]) > 0
    assert (logps.grad[~mask] == 0).all()
    i, j = next((i, j) for i, n in enumerate(lengths) for j in range(n))
    nudged = [(a, w, [(t[0] + 1e-5, *t[1:]) if (r, c) == (i, j) else t for c, t in enumerate(ts)])
              for r, (a, w, ts) in enumerate(rows)]
    slope = (slow_loss(nudged, cfg)[0] - expected[0]) / 1e-5
    assert logps.grad[i, j].item() == pytest.approx(slope, rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_equals_the_common_trainers_formula(beta):
    """(r - mean) / (std + 1e-4); -min(ratio A, clip(ratio) A) + beta k3; mean per completion first."""
    g = torch.Generator().manual_seed(3)
    rewards = torch.rand(4, 8, generator=g)
    mask = torch.arange(10)[None] < torch.randint(1, 11, (32, 1), generator=g)
    logps = -torch.rand(32, 10, generator=g)
    old, ref = (logps + 0.5 * torch.randn(32, 10, generator=g) for _ in range(2))
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    advantages = advantages.view(-1, 1)
    ratio = torch.exp(logps - old)
    per_token = -torch.min(ratio * advantages, torch.clamp(ratio, 0.8, 1.2) * advantages)
    per_token = per_token + beta * (torch.exp(ref - logps) - (ref - logps) - 1)
    expected = ((per_token * mask).sum(1) / mask.sum(1)).mean()
    mine = grpo.group_advantages(rewards).view(-1, 1).expand(mask.shape)
    cfg = SimpleNamespace(**vars(PLAIN) | {"clip_high": 0.2, "kl_beta": beta})
    loss, _ = grpo.grpo_loss(logps, old, old, ref, mine, mask / mask.sum(1, keepdim=True) / 32, cfg)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


# ----- other objectives


def slow_gain(name, logp, old, log_ratios, advantage, cfg):
    """What a token adds: log_ratios are those of its whole rollout."""
    ratio = math.exp(sum(log_ratios) / len(log_ratios) if name == "gspo" else logp - old)
    bounded = min(max(ratio, 1 - cfg.clip_low), 1 + cfg.clip_high)
    if name == "cispo":
        return bounded * advantage * logp
    if name == "sapo":
        tau = 1.05 if advantage < 0 else 1.0
        return advantage * 4 / tau / (1 + math.exp(-tau * (ratio - 1)))
    return min(ratio * advantage, bounded * advantage)


def slow_slopes(name, rollout, advantage, cfg):
    """d gain / d logp of each token of [(logp, old)], summed over the rollout,
    by the rules of each objective.
    """
    log_ratios = [logp - old for logp, old in rollout]
    slopes = []
    for logp, old in rollout:
        mean = sum(log_ratios) / len(log_ratios)
        ratio = math.exp(mean if name == "gspo" else logp - old)
        bounded = min(max(ratio, 1 - cfg.clip_low), 1 + cfg.clip_high)
        inside = ratio * advantage <= bounded * advantage
        if name == "cispo":
            slopes.append(bounded * advantage)
        elif name == "sapo":
            tau = 1.05 if advantage < 0 else 1.0
            gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
            slopes.append(4 * advantage * gate * (1 - gate) * ratio)
        else:  # gspo: n tokens share the ratio, each moves it by 1 / n
            slopes.append(ratio * advantage * inside)
    return slopes


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("is_mode", ["truncate", "sequence"])
@pytest.mark.parametrize("name", grpo.OBJECTIVES)
def test_objectives_equal_a_slow_loop(name, is_mode, seed):
    """Rollouts of several lengths, two of them in one row, with forced tokens that nothing may count."""
    rng = random.Random(seed)
    cfg = SimpleNamespace(**vars(PLAIN) | {"objective": name, "is_mode": is_mode, "is_cap": 1.3,
                                           "clip_high": 0.28})
    rollouts = [[(rng.gauss(-1, .5), rng.gauss(-1, .5), rng.gauss(0, .2), rng.random() < 0.8)
                 for _ in range(n)] for n in (1, 4, 6, 2, 9)]
    for rollout in rollouts:
        rollout[0] = (*rollout[0][:3], True)  # each has a token that counts
    advantages = [rng.gauss(0, 1) for _ in rollouts]
    rows = [[0, 1], [2], [3, 4]]
    width = max(sum(len(rollouts[i]) for i in row) for row in rows)

    def laid_out(of_token):
        table = torch.zeros(len(rows), width)
        for b, members in enumerate(rows):
            values = [of_token(i, token) for i in members for token in rollouts[i]]
            table[b, :len(values)] = torch.tensor(values)
        return table

    logps = laid_out(lambda i, t: t[0]).requires_grad_()
    old, sampler = laid_out(lambda i, t: t[1]), laid_out(lambda i, t: t[1] - t[2] if t[3] else t[1])
    weights = laid_out(lambda i, t: 0.05 * t[3])
    loss, sums = grpo.grpo_loss(logps, old, sampler, None, laid_out(lambda i, t: advantages[i]), weights, cfg,
                                laid_out(lambda i, t: i).long())
    loss.backward()

    expected, slopes, dropped = 0.0, [], 0.0
    for rollout, advantage in zip(rollouts, advantages):
        counted = [(logp, old) for logp, old, _, counts in rollout if counts]
        product = math.exp(sum(gap for *_, gap, counts in rollout if counts))
        whole = product * (product <= 1.3)
        corrections = [min(math.exp(gap), 1.3) if is_mode == "truncate" else whole for *_, gap, _ in rollout]
        shared = sum(c for c, t in zip(corrections, rollout) if t[3]) / len(counted)  # a ratio that all share
        of_counted = iter(slow_slopes(name, counted, advantage, cfg))
        for (logp, was, _, counts), correction in zip(rollout, corrections):
            gain = slow_gain(name, logp, was, [a - b for a, b in counted], advantage, cfg) if counts else 0
            expected -= 0.05 * correction * gain
            of_slope = shared if name == "gspo" else correction
            slopes.append(-0.05 * of_slope * next(of_counted) if counts else 0.0)
            dropped += 0.05 * counts * (correction == 0)
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert sums["mismatch/dropped"].item() == pytest.approx(dropped, abs=1e-6)
    order = [logps.grad[b, :sum(len(rollouts[i]) for i in row)] for b, row in enumerate(rows)]
    assert torch.cat(order).tolist() == pytest.approx(slopes, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("is_mode, expected", [("truncate", [0.5, 1.0, 2.0]), ("sequence", [1.25] * 3)])
def test_sampler_correction_table(is_mode, expected):
    cfg = SimpleNamespace(is_mode=is_mode, is_cap=2.0)
    gap, one = row([0.5, 1.0, 2.5]).log(), torch.ones(1, 3)
    got = grpo.sampler_correction(gap, one, torch.zeros(1, 3, dtype=torch.long), cfg)
    assert got[0].tolist() == pytest.approx(expected)
    cfg.is_cap = 1.2
    got = grpo.sampler_correction(gap, one, torch.zeros(1, 3, dtype=torch.long), cfg)
    assert got[0].tolist() == pytest.approx([0.5, 1.0, 1.2] if is_mode == "truncate" else [0, 0, 0])


@pytest.mark.parametrize("name, ratio, advantage, gain", [
    ("clip", 1.5, 1, 1.28), ("gspo", 1.5, 1, 1.28), ("cispo", 1.5, 1, 1.28 * -1), ("sapo", 1.0, 1, 2.0),
    ("sapo", 1.0, -1, -2 / 1.05), ("sapo", 3.0, 1, 4 / (1 + math.exp(-2))), ("clip", 0.5, -1, -0.8)])
def test_objective_table(name, ratio, advantage, gain):
    """At logp -1; cispo's gain is its weight times that."""
    cfg = SimpleNamespace(**vars(PLAIN) | {"objective": name, "clip_high": 0.28})
    logps, old = row([-1.0]), row([-1.0 - math.log(ratio)])
    loss, _ = grpo.grpo_loss(logps, old, old, None, row([advantage]), row([1.0]), cfg)
    assert -loss.item() == pytest.approx(gain, rel=1e-5)


@pytest.mark.parametrize("loss_mean, expected", [
    ("token", [1/8, 1/8]), ("sequence", [1/16, 1/24]), ("constant", [1/80, 1/80])])
def test_what_a_token_counts(loss_mean, expected):
    """8 tokens or rollouts in the batch; responses of 2 and 3 tokens of at most 10."""
    cfg = SimpleNamespace(loss_mean=loss_mean, rethink_mask="none", max_new_tokens=10)
    for length, weight in zip((2, 3), expected):
        r = grpo.Rollout(0, [5] * length, torch.zeros(length), False, "")
        assert grpo.token_weights(r, 8, cfg).tolist() == pytest.approx([weight] * length)


# ----- learning rate


COSINE = dataclasses.replace(grpo.Config(), steps=750, warmup=23, lr=1e-6, lr_floor=0.5, schedule="cosine")


@pytest.mark.parametrize("cfg, step, lr", [
    (COSINE, 0, 0.0), (COSINE, 23, 1e-6), (COSINE, 386, 7.505e-7),
    (COSINE, 749, 5.0e-7), (COSINE, 750, 5.0e-7),
    (dict(steps=10, warmup=0, schedule="constant"), 1, 1.0),
    (dict(steps=10, warmup=0, schedule="constant"), 10, 1.0),
    (dict(steps=10, warmup=4, schedule="constant"), 1, .25),
    (dict(steps=10, warmup=4, schedule="constant"), 4, 1.0),
    (dict(steps=10, warmup=0, schedule="linear", lr_floor=0.0), 5, .5),
    (dict(steps=10, warmup=0, schedule="linear", lr_floor=.2), 10, .2),
    (dict(steps=10, warmup=0, schedule="cosine", lr_floor=0.0), 5, .5),
    (dict(steps=10, warmup=0, schedule="cosine", lr_floor=.1), 10, .1),
    (dict(steps=1, warmup=1, schedule="cosine"), 1, 1.0),
    (dict(steps=3, warmup=3, schedule="linear"), 3, 1.0),
])
def test_lr_at(cfg, step, lr):
    cfg = dataclasses.replace(grpo.Config(), lr=1.0, **cfg) if isinstance(cfg, dict) else cfg
    assert sft.lr_at(step, cfg) == pytest.approx(lr, rel=1e-3, abs=1e-12)


# ----- data order


@pytest.mark.parametrize("total, per_step", [(10, 3), (12, 4), (7, 7), (5, 8), (1, 1), (1, 4), (100, 32)])
def test_data_order_covers_every_record_and_repeats_none_within_a_step(total, per_step):
    steps = 2 * total + 3
    plan = sft.data_order(total, per_step, 0, steps, 0)
    assert len(plan) == steps and all(len(set(drawn)) == len(drawn) for drawn in plan)
    assert all(set(drawn) <= set(range(total)) and drawn for drawn in plan)
    drawn_at_least = [sum(i in drawn for drawn in plan) for i in range(total)]
    assert min(drawn_at_least) >= steps * min(per_step, total) // total // 2


def test_an_epoch_shows_every_record_exactly_once():
    plan = sft.data_order(12, 4, 0, 9, 5)
    for epoch in range(3):
        assert sorted(sum(plan[3 * epoch:3 * epoch + 3], [])) == list(range(12))
    assert plan[:3] != plan[3:6]


@pytest.mark.parametrize("total, per_step", [(10, 3), (12, 4), (5, 8)])
def test_data_order_resumes_anywhere_and_depends_on_the_seed_alone(total, per_step):
    plan = sft.data_order(total, per_step, 0, 20, 7)
    random.seed(123)
    torch.manual_seed(123)
    assert all(sft.data_order(total, per_step, done, 20, 7) == plan[done:] for done in range(21))
    assert sft.data_order(total, per_step, 0, 30, 7)[:20] == plan != sft.data_order(total, per_step, 0, 20, 8)


# ----- micro-batches


@pytest.mark.parametrize("lengths, budget, expected", [
    ([], 10, []), ([3], 10, [[0]]), ([30], 10, [[0]]), ([5, 5], 10, [[0, 1]]),
    ([5, 5, 1], 10, [[0, 1], [2]]), ([1, 9, 2], 10, [[1], [2, 0]]), ([4, 30, 4], 10, [[1], [0, 2]]),
    ([2, 2, 2, 2, 2, 2], 4, [[0, 1], [2, 3], [4, 5]]),
])
def test_micro_batches_table(group, lengths, budget, expected):
    """A row each."""
    of_rows = [[[i] for i in batch] for batch in expected]
    assert sft.micro_batches(lengths, budget) == of_rows


@pytest.mark.parametrize("lengths, budget, expected", [
    ([5, 5, 1], 10, [[[0], [1]], [[2]]]), ([1, 9, 2], 10, [[[1]], [[2], [0]]]),
    ([9, 4, 5], 18, [[[0], [2, 1]]]), ([10, 4, 3, 3, 2], 10, [[[0]], [[1], [2]], [[3], [4]]]),
    ([10, 4, 3, 3, 2], 20, [[[0], [1, 2, 3]], [[4]]]),
    ([8, 3, 3, 3, 2], 16, [[[0], [1, 2, 4]], [[3]]]),
])
def test_short_groups_share_a_row_without_making_it_longer(group, lengths, budget, expected):
    """A row is as long as the longest of its micro-batch; what is left over starts the next one."""
    assert sft.micro_batches(lengths, budget, packs=True) == expected


@pytest.mark.parametrize("scale, expected", [(1e9, 2), (8, 1), (4, 1), (16, 1)])
def test_the_budget_counts_attention(group, scale, expected):
    """Two rows of 8 tokens cost 16, with attention 16 * (1 + 8 / scale)."""
    assert len(sft.micro_batches([8, 8], 17, scale=scale)[0]) == expected


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("scale", [1e9, 100])
@pytest.mark.parametrize("budget", [1, 50, 256, 10**6])
def test_micro_batches_keep_the_budget_and_every_row(group, budget, scale, packs):
    lengths = [random.Random(budget + i).randint(1, 60) for i in range(200)]
    batches = sft.micro_batches(lengths, budget, packs, scale)
    everyone = [i for rows in batches for row in rows for i in row]
    assert sorted(everyone) == list(range(200)) and (packs or all(len(row) == 1 for row in sum(batches, [])))
    before = 61
    for rows in batches:
        width = max(sum(lengths[i] for i in row) for row in rows)
        assert width == max(lengths[i] for i in sum(rows, [])) <= before
        assert len(rows) == 1 or len(rows) * width * (1 + width / scale) <= budget
        before = width
