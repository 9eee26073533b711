"""Selective sample replay, forced rethinking and staged lengths, in the worked numbers of their papers."""
import dataclasses
import json
import math
import random
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import conftest
import sft
import eval as evaluation
import grpo
from test_stages import GRPO, SFT, close, metrics, newest, run, weights, work  # noqa: F401

CFG = grpo.Config(group_size=8, max_new_tokens=2048, rethink_frac=0.99, rethink_rewind=0.0)
TOK = conftest.tokenizer()
END = TOK.eos_token_id
RECORD = {"id": "0", "question": "q", "images": [], "answer": "4", "answer_type": "number"}


def ids(text):
    return TOK(text, add_special_tokens=False)["input_ids"]


def rollout(question, text="", advantage=0.0, truncated=False, **fields):
    """A rollout that wrote `text` and ended."""
    response = ids(text) + [END] * (not truncated)
    return grpo.Rollout(question, response, -torch.arange(1.0, len(response) + 1) / 10, truncated, text,
                        advantage=advantage, **fields)


def prompt(text="one two"):
    tokens = torch.tensor([ids(text)])
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "request": {"ids": ids(text)}}


# ----- selective sample replay


def buffer_of(advantages):
    """A buffer with one rollout per advantage, as one rank enters them."""
    buffer = grpo.ReplayBuffer()
    buffer.add({(1, j, 0): rollout(j, "one", a) for j, a in enumerate(advantages)}, cap=10**6)
    return buffer


FIVE, SIX = [.875, .125, .5, .25, .75], [.75, -.25, .875, -.125, .5, -.5]


@pytest.mark.parametrize("advantages, alpha, expected", [
    (FIVE, 0, [.2] * 5),
    (FIVE, .5, [.2782, .1052, .2103, .1487, .2576]),
    (FIVE, 1, [.35, .05, .2, .1, .3]),
    (FIVE, 2, [.4623, .0094, .1509, .0377, .3396]),
    ([-a for a in FIVE], 1, [.35, .05, .2, .1, .3]),  # the sign does not matter
    (SIX, 1, [.25, .0833, .2917, .0417, .1667, .1667]),
])
def test_draws_follow_equation_1(group, advantages, alpha, expected):
    n = 100_000
    drawn = Counter(buffer_of(advantages).draw(n, alpha, random.Random(0)))
    counts = [drawn[1, j, 0] for j in range(len(advantages))]
    assert all(abs(c / n - p) < 0.01 for c, p in zip(counts, expected))
    exact = [abs(a) ** alpha for a in advantages]
    chi2 = sum((c - n * w / sum(exact)) ** 2 / (n * w / sum(exact)) for c, w in zip(counts, exact))
    assert chi2 < 25  # 5 degrees of freedom: exceeded once in 7,000 seeds


def batch_of(*groups):
    """Rollouts of one question per group, with these advantages."""
    return [rollout(q, "one", a) for q, group in enumerate(groups) for a in group]


HALF = [.5] * 4 + [-.5] * 4


def chosen(cfg, rollouts, buffer=None, step=1, questions=range(2)):
    slices, replayed = grpo.select(rollouts, list(questions), buffer or grpo.ReplayBuffer(), step, cfg)
    assert len(slices) == cfg.updates
    return [r for part in slices for r in part], replayed


@pytest.mark.parametrize("ssr, n, replayed", [("off", 16, 0), ("filter", 8, 0), ("replay", 16, 8)])
def test_what_each_mode_trains_on(group, ssr, n, replayed):
    """GRPO keeps zeros, the filter drops them, replay fills the batch up."""
    rollouts = batch_of([0.0] * 8, HALF)
    got, again = chosen(dataclasses.replace(CFG, ssr=ssr), rollouts)
    assert (len(got), again) == (n, replayed)
    if ssr != "off":
        assert all(r.advantage for r in got)
        assert Counter(map(id, got[:8])) == Counter(map(id, rollouts[8:]))  # each current one exactly once


def test_deficit_is_drawn_from_older_and_current_ones(group):
    """Batch of 16, four effective, two buffered: twelve are drawn from all six."""
    cfg, buffer = dataclasses.replace(CFG, ssr="replay", ssr_episode=0), buffer_of([.75, -.25])
    rollouts = batch_of([.875, -.125, .5, -.5] + [0.0] * 4, [0.0] * 8)
    got, again = chosen(cfg, rollouts, buffer, step=2)
    assert again == 12 and len(got) == 16 and len(buffer.entries) == 6
    assert {r.advantage for r in got} <= set(SIX)


def test_full_batch_draws_nothing_but_is_remembered(group, monkeypatch):
    monkeypatch.setattr(random.Random, "choices", lambda *a, k, **o: [][:k] if not k else pytest.fail("drew"))
    buffer = grpo.ReplayBuffer()
    assert chosen(dataclasses.replace(CFG, ssr="replay"), batch_of(HALF, HALF), buffer)[1] == 0
    assert len(buffer.entries) == 16


def test_a_first_batch_without_advantage_is_skipped(group):
    """The released code loops for ever here."""
    assert chosen(dataclasses.replace(CFG, ssr="replay"), batch_of([0.0] * 8, [0.0] * 8)) == ([], 0)


def test_each_update_gets_its_share(group):
    """Cut by the place of the question in the whole step, not on this rank; what is drawn is cut likewise."""
    cfg = dataclasses.replace(CFG, updates=2, ssr="replay", ssr_episode=0)
    rollouts = [r for q, advantages in ((7, HALF), (4, HALF[:4] + [0.0] * 4)) for r in
                (rollout(q, "one", a) for a in advantages)]
    slices, replayed = grpo.select(rollouts, [9, 7, 8, 4], grpo.ReplayBuffer(), 3, cfg)
    assert [r.question for r in slices[0][:8]] == [7] * 8 and [r.question for r in slices[1][:4]] == [4] * 4
    assert replayed == 4 and [len(part) for part in slices] == [10, 6]
    assert [grpo.which_update(place, 5, 2) for place in range(5)] == [0, 0, 0, 1, 1]


def test_an_episode_ends_with_an_empty_buffer(group):
    cfg, buffer = dataclasses.replace(CFG, ssr="replay", ssr_episode=3), grpo.ReplayBuffer()
    sizes = []
    for step in range(1, 8):
        chosen(cfg, batch_of(HALF, HALF), buffer, step)
        sizes.append(len(buffer.entries))
    assert sizes == [16, 32, 48, 16, 32, 48, 16]


def test_the_oldest_leave_a_full_buffer(group):
    buffer = grpo.ReplayBuffer()
    for step in range(3):
        buffer.add({(step, 0, g): rollout(0, "one", 1.0) for g in range(3)}, cap=8)
    assert [key for key, _ in buffer.entries] == [(0, 0, 1), (0, 0, 2)] + [
        (s, 0, g) for s in (1, 2) for g in range(3)] == [*buffer.held]


def test_buffer_survives_a_checkpoint(group, tmp_path):
    buffer = buffer_of(SIX)
    buffer.held[1, 0, 0].old_logps = torch.tensor([-0.5])
    buffer.held[1, 1, 0].trigger = (0, 1)
    torch.save(buffer.state(), tmp_path / "buffer.pt")
    again = grpo.ReplayBuffer()
    again.restore([torch.load(tmp_path / "buffer.pt", weights_only=True)], cap=99)
    assert again.entries == buffer.entries and again.held.keys() == buffer.held.keys()
    for key, r in buffer.held.items():
        for field in dataclasses.fields(r):
            a, b = getattr(r, field.name), getattr(again.held[key], field.name)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert again.draw(50, 1, random.Random(3)) == buffer.draw(50, 1, random.Random(3))


class Stub(torch.nn.Module):
    """A policy whose token log-probabilities are its parameters; SGD of rate 1 then shows the gradient."""

    def __init__(self, logps):
        super().__init__()
        self.logps, self.banned = torch.nn.Parameter(torch.tensor(logps)), torch.tensor([])
        self.packs = False
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=64))

    def token_logprobs(self, inputs, mask, temperature, with_entropy):
        logps = torch.zeros(mask.shape).masked_scatter(mask, self.logps)
        return logps, torch.zeros(mask.shape)


def updated(rollouts, logps, **flags):
    """(sums, gradient per token) of one update; denominators are those of these rollouts alone."""
    cfg = dataclasses.replace(CFG, clip_high=0.35, max_grad_norm=1e9, lr=1.0, warmup=0, **flags)
    policy = Stub(logps)
    optimizer = torch.optim.SGD(policy.parameters(), 0.0)
    optimizer.skipped = 0
    tokens = sum(grpo.policy_mask(r, cfg).sum() for r in rollouts)
    imitated = sum(len(r) for r in rollouts if grpo.is_imitated(r))
    sums = grpo.update(policy, optimizer, rollouts, float(tokens), imitated, {0: prompt()}, None, 1, None,
                       cfg)
    return sums, torch.tensor(logps) - policy.logps.detach()


@pytest.mark.parametrize("stored, current, advantage, loss", [
    (-1.0, -0.6, 0.5, -0.675), (-1.0, -0.6, -0.5, 0.7459), (-0.5, -1.0, -0.5, 0.4)])
def test_replayed_rollouts_keep_their_old_logps_and_advantage(group, stored, current, advantage, loss):
    old = torch.tensor([stored])
    r = grpo.Rollout(0, [END], old, False, "", advantage=advantage, old_logps=old)
    stats, _ = updated([r], [current])
    assert stats["loss/policy"] == pytest.approx(loss, abs=1e-4)
    assert stats["largest gap"] == 0  # how far the policy has moved is no mismatch of the engine


def test_fresh_rollouts_learn_their_old_logps_in_their_own_update(group):
    r = grpo.Rollout(0, [END, END], torch.tensor([-.2, -.3]), False, "", advantage=1.0)
    updated([r], [-.25, -.35])
    assert r.old_logps.tolist() == pytest.approx([-.25, -.35])


# ----- forced rethinking


def rethink(monkeypatch, rollouts, write, cfg=CFG, **flags):
    """force_rethink with an engine that writes `write(prompt text)`; returns (sums, prompts it was given)."""
    cfg, given = dataclasses.replace(cfg, **flags), []

    def scripted(engine, prompts, seeds, cfg):
        given.extend(prompts)
        texts = [write(TOK.decode(p["input_ids"][0])) for p in prompts]
        return [(ids(t) + [END], torch.full((len(ids(t)) + 1,), -0.7), False) if t is not None else
                ([5] * cfg.max_new_tokens, torch.zeros(cfg.max_new_tokens), True) for t in texts]

    monkeypatch.setattr(grpo, "generate", scripted)
    records = [RECORD] * (1 + max(r.question for r in rollouts))
    prompts = {q: prompt() for q in range(len(records))}
    return grpo.force_rethink(None, rollouts, prompts, records, TOK, 1, cfg), given


def eight(right):
    """A group whose first `right` responses are right."""
    return [rollout(0, f"<think> one </think> <answer> {4 if g < right else 3} </answer>") for g in range(8)]


LONG = "one two three four five six seven eight nine ten " * 4


def test_splice_is_prefix_trigger_continuation(group, monkeypatch):
    """Token ids are never decoded and encoded again; one stop token, at the end; y1's logprobs are kept."""
    rollouts = eight(0)
    before = list(rollouts)
    sums, given = rethink(monkeypatch, rollouts, lambda text: LONG + "<answer> 4 </answer>")
    changed = [(old, new) for old, new in zip(before, rollouts) if new is not old]
    assert len(changed) == 2 == sums["accepted"] and sums["fixed"] == sums["frac"] > 2 and not sums["broke"]
    for old, new in changed:
        start, stop = new.trigger
        assert new.response[:start] == old.response[:-1]
        assert new.response[start:stop] in [ids(text) for text in grpo.TRIGGERS.values()]
        assert new.response[stop:] == ids(LONG + "<answer> 4 </answer>") + [END]
        assert new.response.count(END) == 1 and new.response[-1] == END
        assert torch.equal(new.sampler_logps[:start], old.sampler_logps[:-1])
        assert new.sampler_logps[start:stop].isnan().all() and (new.sampler_logps[stop:] == -0.7).all()
        assert len(new.sampler_logps) == len(new.response)
        begun = next(p for p in given if p["request"]["ids"][-stop:] == new.response[:stop])
        assert begun["request"]["ids"] == ids("one two") + new.response[:stop]
        assert begun["input_ids"][0].tolist() == begun["request"]["ids"]
        assert begun["attention_mask"].all()


def check_forced(policy, engine, processor, records, monkeypatch):
    """Spliced responses of a real engine: exact ids, logprobs of a teacher-forced pass, no vision token."""
    cfg = grpo.Config(engine="vllm", group_size=4, max_new_tokens=30, rethink_frac=0.9, rethink_min=1,
                      rethink_max=12)
    ends = range(3, len(processor.tokenizer), 6)  # so that random models end
    monkeypatch.setattr(engine, "stop", [*engine.stop, *ends])
    monkeypatch.setattr(grpo, "accuracy", lambda text, record: 1.0)
    prompts = {q: sft.encode_prompt(record, processor, 10**6) for q, record in enumerate(records)}
    asked = [q for q in prompts for _ in range(4)]
    samples = evaluation.generate(engine, [prompts[q] for q in asked], [7 * i for i in range(len(asked))],
                                  cfg)
    rollouts = [grpo.Rollout(q, *sample, "one") for q, sample in zip(asked, samples)]
    before = list(rollouts)
    sums = grpo.force_rethink(engine, rollouts, prompts, records, processor.tokenizer, 1, cfg)
    assert sums["accepted"] == sum(a is not b for a, b in zip(before, rollouts)) >= 2
    for old, new in zip(before, rollouts):
        if new is not old:
            start, stop = new.trigger
            assert new.response[:start] == old.response[:start] and new.response[-1] in engine.stop
            assert new.response[start:stop] in [processor.tokenizer(t, add_special_tokens=False)["input_ids"]
                                                for t in grpo.TRIGGERS.values()]
            assert not set(new.response) & set(engine.banned.tolist())
            inputs, mask = sft.collate([(prompts[new.question], new.response)], None, 0, conftest.CPU)
            with torch.no_grad():
                logps = policy.token_logprobs(inputs, mask)[mask]
            sampled = ~new.sampler_logps.isnan()
            assert sampled.sum() == len(new.response) - (stop - start)
            assert (logps - new.sampler_logps)[sampled].abs().max() < 1e-4


def test_forced_responses_of_the_transformers_engine(family, monkeypatch):
    check_forced(family.policy, family.engine, family.processor, [*conftest.RECORDS.values()], monkeypatch)


@pytest.mark.parametrize("mode, expected", [
    ("none", [1] * 10), ("trigger", [1, 1, 1, 0, 0, 0, 0, 1, 1, 1]), ("prefix", [0] * 7 + [1] * 3)])
def test_masks_of_the_policy_loss(mode, expected):
    r = grpo.Rollout(0, list(range(10)), torch.zeros(10), False, "", trigger=(3, 7))
    assert grpo.policy_mask(r, dataclasses.replace(CFG, rethink_mask=mode)).tolist() == expected
    assert grpo.policy_mask(dataclasses.replace(r, trigger=None), CFG).tolist() == [1] * 10


@pytest.mark.parametrize("text, kept", [
    ("Step 1. one\n\nStep 2. two\n\nThus \\boxed{4}", "Step 1. one\n\nStep 2. two"),
    ("To answer this, one\n\ntwo\n\nThe answer is 4", "To answer this, one\n\ntwo"),  # the last cue
    ("<think> one two </think> <answer> 4 </answer>", "<think> one two"),
    ("one two three \\boxed{4}", "one two three"),
    ("one two three", "one two three"),
])
def test_rewind_cuts_before_the_last_answer(text, kept):
    tokens = ids(text)
    cut = grpo.before_answer(tokens, TOK)
    assert TOK.decode(tokens[:cut]).rstrip() == kept


def test_rewound_counts_the_dropped_tokens(group, monkeypatch):
    rollouts = eight(0)
    rethink(monkeypatch, rollouts, lambda text: LONG + "<answer> 4 </answer>", rethink_rewind=1.0)
    dropped = len(ids("</think> <answer> 3 </answer>"))
    assert [r.rewound for r in rollouts if r.trigger] == [dropped] * 2 and dropped > 3
    assert not any(r.rewound for r in rollouts if not r.trigger)


def test_truncated_and_long_responses_are_never_forced(group, monkeypatch):
    cut = [rollout(0, "one", truncated=True) for _ in range(8)]
    assert rethink(monkeypatch, cut, lambda text: None)[0]["frac"] == 0
    room = CFG.max_new_tokens - CFG.rethink_max - 1
    for words, forced in ((room - 1, True), (room, False)):  # and the stop token
        rollouts = [grpo.Rollout(0, [7] * words + [END], torch.zeros(words + 1), False, "") for _ in range(8)]
        assert (rethink(monkeypatch, rollouts, lambda text: None)[0]["frac"] > 0) == forced


def test_share_of_forced_responses(group, monkeypatch):
    """10,000 eligible at 0.65: 6,500 +- 150, none at 0."""
    rollouts = [rollout(q, "one") for q in range(1250) for _ in range(8)]
    before = list(rollouts)
    sums, _ = rethink(monkeypatch, rollouts, lambda text: None, rethink_frac=0.65)
    assert abs(sums["frac"] - 6500) < 150 and sums["accepted"] == 0
    assert all(a is b for a, b in zip(rollouts, before))  # failed tries leave everything as it was
    assert rethink(monkeypatch, rollouts, lambda text: None, rethink_frac=0.0)[0]["frac"] == 0


def test_kinds_of_trigger(group, monkeypatch):
    """bare 20 %, question 30 %, by outcome 50 %: right responses are verified, wrong ones corrected."""
    for right, other in ((0, "correct"), (8, "verify")):
        rollouts = [r for q in range(300) for r in (dataclasses.replace(r, question=q) for r in eight(right))]
        _, given = rethink(monkeypatch, rollouts, lambda text: None)
        found = Counter(next(kind for kind, trigger in sorted(grpo.TRIGGERS.items(), key=lambda t: -len(t[1]))
                             if p["request"]["ids"][-len(ids(trigger)):] == ids(trigger)) for p in given)
        assert found.keys() == {"bare", "question", other}
        for kind, share in (("bare", .2), ("question", .3), (other, .5)):
            assert found[kind] / found.total() == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("write, accepted", [
    (LONG + "<answer> 4 </answer>", 2),
    (LONG + "<answer> 3 </answer>", 0),  # wrong
    (LONG + "<answer> 4 </answer> <answer> 3 </answer>", 0),  # the last answer decides
    (None, 0),  # never ended
    ("<answer> 4 </answer>", 0),  # too short
    (LONG + "wait, wait, wait, <answer> 4 </answer>", 2),
    (LONG + "wait, wait, wait, wait, <answer> 4 </answer>", 0),  # five hesitations with the trigger's
])
def test_what_is_accepted(group, monkeypatch, write, accepted):
    rollouts = eight(4)
    before = list(rollouts)
    sums, _ = rethink(monkeypatch, rollouts, lambda text: write)
    assert sums["accepted"] == accepted == sum(a is not b for a, b in zip(before, rollouts))
    assert len(rollouts) == 8


def test_each_response_gets_its_own_verdict(group, monkeypatch):
    """Among eight, only those that began with five or six end right; only they are replaced."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    rollouts = [rollout(0, f"{word} <answer> 3 </answer>") for word in words]
    rethink(monkeypatch, rollouts, lambda text: LONG + (
        "<answer> 4 </answer>" if text.removeprefix("one two").split()[0].endswith(("five", "six"))
        else "<answer> 9 </answer>"), rethink_frac=0.999)
    replaced = [words[g] for g, r in enumerate(rollouts) if r.trigger]
    assert replaced == ["five", "six"]
    assert all("<answer> 4 </answer>" in r.text for r in rollouts if r.trigger)


def test_wrong_ones_of_easy_groups_are_left_alone(group, monkeypatch):
    for right, forced in ((5, 8), (6, 6)):
        sums, _ = rethink(monkeypatch, eight(right), lambda text: None, rethink_frac=0.999)
        assert sums["frac"] == forced


def test_nll_on_forced_responses_with_an_advantage(group):
    """Log-probs [-.1 -.2 -.3] [-.5 -.5] [-1 x 4], forced 1 0 1, advantages + + -: NLL 0.2, weight 0.05."""
    rows = [(4, -.5, (0, 1)), (3, .5, (1, 2)), (2, .5, None)]  # longest first, as micro-batches sort them
    logps = [-1., -1., -1., -1., -.1, -.2, -.3, -.5, -.5]

    def made():
        parts = iter(torch.tensor(logps).split([4, 3, 2]))
        return [grpo.Rollout(0, [END] * n, next(parts), False, "", advantage=a, trigger=t)
                for n, a, t in rows]

    stats, grad = updated(made(), logps, rethink_nll=0.05)
    _, without = updated(made(), logps, rethink_nll=0.0)
    assert stats["loss/nll"] == pytest.approx(0.2)
    assert (grad - without).tolist() == pytest.approx([0] * 4 + [-0.05 / 3] * 3 + [0] * 2, abs=1e-6)
    assert without[0] == 0 and without[5] == 0  # triggers are not in the policy loss
    stats, _ = updated(made()[2:], logps[7:])
    assert "loss/nll" not in stats


def test_forced_tokens_have_ratio_one_and_no_mismatch(group):
    r = grpo.Rollout(0, [END] * 3, torch.tensor([-.1, math.nan, -.3]), False, "", 0., 1., trigger=(1, 2))
    stats, grad = updated([r], [-.1, -5., -.3], rethink_mask="none", rethink_nll=0.0)
    assert grad.tolist() == pytest.approx([-1 / 3] * 3) and stats["largest gap"] == pytest.approx(0, abs=1e-6)


# ----- staged lengths, truncated responses, difficulty


@pytest.mark.parametrize("step, stage, length, size", [
    (1, 1, 4096, 16), (100, 1, 4096, 16), (101, 2, 8192, 8), (150, 2, 8192, 8), (200, 2, 8192, 8)])
def test_stages(step, stage, length, size):
    cfg = grpo.Config(ptst="4096x16:100,8192x8:100")
    stages = grpo.parse_ptst(cfg.ptst)
    assert stages == [(4096, 16, 100), (8192, 8, 100)] and grpo.parse_ptst("") == []
    now, changed = grpo.staged(cfg, stages, step)
    assert (now, changed.max_new_tokens, changed.group_size) == (stage, length, size)
    assert length * size == 65536
    assert dataclasses.replace(changed, max_new_tokens=cfg.max_new_tokens, group_size=cfg.group_size) == cfg
    assert grpo.staged(grpo.Config(), [], step) == (0, grpo.Config())


@pytest.mark.parametrize("text", ["4096x16", "4096:100", "4096x16:100;8192x8:100", "ax2:3", "4x2:1,"])
def test_bad_stages(text):
    with pytest.raises(ValueError, match="--ptst"):
        grpo.parse_ptst(text)


def test_masked_truncated_responses_count_in_the_baseline_only(group):
    """One right answer and 15 cut ones: +3.75 and -0.25; masked, the 15 are not in the loss."""
    rewards = torch.tensor([[1.0] + [0.0] * 15])
    advantages = grpo.group_advantages(rewards, eps=0.0)[0].tolist()
    assert advantages[0] == pytest.approx(3.75) and advantages[1] == pytest.approx(-.25)
    rollouts = [rollout(0, "one", a, truncated=g > 0) for g, a in enumerate(advantages)]
    for flag, n in (("keep", 16), ("zero", 16), ("mask", 1)):
        cfg = dataclasses.replace(CFG, truncated=flag, group_size=16)
        assert len(chosen(cfg, rollouts, questions=[0])[0]) == n


@pytest.mark.parametrize("right, size, level", [
    (0, 8, "all_wrong"), (1, 8, "hard"), (2, 8, "hard"), (3, 8, "medium"), (5, 8, "medium"), (6, 8, "easy"),
    (7, 8, "easy"), (8, 8, "all_right"), (1, 16, "all_wrong"), (2, 16, "hard"), (5, 16, "hard"),
    (6, 16, "medium"), (11, 16, "medium"), (12, 16, "easy"), (15, 16, "easy"), (16, 16, "all_right"),
    (0, 2, "all_wrong"), (1, 2, "medium"), (2, 2, "all_right"),
])
def test_difficulty(right, size, level):
    """Each limit, 1/8, 3/8, 6/8 and 1, belongs to the level above it."""
    assert grpo.difficulty(right / size) == level


def test_means(group):
    """Sums over counts, name by name; what nobody added is 0 and is there, so that all ranks add up alike."""
    means = sft.Means("a", "b", "c", "never")
    for value in (1, 0, True, torch.tensor(0.5)):
        means.add("a", value)
    means.add("b", torch.tensor([1.0, 2.0]).sum(), 2)
    means.add("b", 6, 1)
    means.add("c", 0, 0)
    found = means.over_ranks()
    assert found == {"a": 0.625, "b": 3.0, "c": 0.0, "never": 0.0} and [*found] == ["a", "b", "c", "never"]
    assert all(type(value) is float for value in found.values())
    with pytest.raises(KeyError):
        means.add("unknown", 1)


def test_difficulty_of_groups(group):
    cfg = grpo.Config(group_size=8)
    rewards = torch.tensor([[1.0] * k + [0.0] * (8 - k) for k in range(9)])
    parts = [{"accuracy": x, "solved": x == 1} for x in rewards.flatten().tolist()]
    rollouts = [rollout(0, "one", reward=part["accuracy"]) for part in parts]
    found = grpo.rollout_metrics(rollouts, [], parts, [], cfg)
    counts = [found[f"groups/{name}"] * 9 for name in ("all_wrong", "hard", "medium", "easy", "all_right")]
    assert counts == pytest.approx([1, 2, 3, 2, 1])
    assert found["groups/effective_frac"] == pytest.approx(7 / 9)


# ----- refill


def groups_of(*shares):
    """Rollouts of questions 10, 11, ..: groups of two, each with an advantage or none."""
    return [rollout(10 + q, "one", advantage) for q, has in enumerate(shares) for advantage in
            ((0.7, -0.7) if has else (0.0, 0.0))]


def test_refill_takes_whole_groups_in_their_order_and_keeps_the_rest(group):
    cfg = dataclasses.replace(CFG, ssr="refill", group_size=2, prompts_per_step=2, updates=2)
    waiting = {}
    first = groups_of(0, 1, 1, 0, 1)
    assert grpo.enough_groups(first, waiting, cfg) and not grpo.enough_groups(groups_of(0, 1), waiting, cfg)
    slices = grpo.refill(first, [10, 11, 12, 13, 14], waiting, 3, cfg)
    assert [[r.question for r in part] for part in slices] == [[11, 11], [12, 12]]
    assert list(waiting) == [(3, 4)] and [r.question for r in waiting[3, 4]] == [14, 14]
    assert grpo.enough_groups(groups_of(1), waiting, cfg)
    slices = grpo.refill(groups_of(1), [10], waiting, 4, cfg)  # what waited comes first
    assert [[r.question for r in part] for part in slices] == [[14, 14], [10, 10]] and not waiting
    assert grpo.refill(groups_of(0, 0), [10, 11], waiting, 5, cfg) == [[], []]


def test_refill_keeps_what_has_no_advantage_within_a_group(group):
    """It counts in the denominator, as in plain GRPO; a truncated rollout that is masked does not."""
    cfg = dataclasses.replace(CFG, ssr="refill", group_size=3, prompts_per_step=1, truncated="mask")
    rollouts = [rollout(0, "one", 0.5), rollout(0, "one", 0.0), rollout(0, "one", -0.5, truncated=True)]
    [part] = grpo.refill(rollouts, [0], {}, 1, cfg)
    assert part == rollouts[:2]


def test_a_step_draws_at_least_once(group):
    with pytest.raises(ValueError, match="--refill_max"):
        grpo.check(grpo.Config(ssr="refill", refill_max=0))


# ----- whole runs


@pytest.fixture
def taught(work):  # noqa: F811
    """grpo.py on a model that has begun to learn: its responses end, differ, and are sometimes right."""
    run(work, *SFT, "--steps", "25", "--lr", "3e-3", "--out", "taught")
    return [*GRPO, "--model", "taught", "--eval_data", "", "--warmup", "0"]


METHODS = ["--ssr", "replay", "--ssr_episode", "4", "--rethink_frac", "0.6", "--rethink_min", "1",
           "--rethink_max", "24", "--max_new_tokens", "48"]


def test_methods_on_two_ranks_equal_one(work, taught):  # noqa: F811
    """Unequal effective counts on the ranks, 20 steps: no hang, and what a single rank does."""
    command = [*taught, *METHODS, "--steps", "20", "--prompts_per_step", "5"]
    run(work, *command, "--out", "one")
    run(work, *command, "--out", "two", ranks=2)
    rows = metrics(work / "one")
    assert sum(row["replay/frac"] > 0 for row in rows) > 5
    assert sum(row["rethink/accepted"] > 0 for row in rows) > 5
    for a, b in zip(rows, metrics(work / "two"), strict=True):
        close(a, b, 1e-4)
    close(weights(newest(work / "one")), weights(newest(work / "two")), 1e-4)


def test_staged_run_resumes_in_its_second_stage(work, taught):  # noqa: F811
    """Lengths and groups change exactly at the boundary; replay, rethinking and stages go on after a stop."""
    command = [*taught, *METHODS, "--ptst", "48x6:3,72x4:3", "--save_every", "4", "--keep", "9"]
    run(work, *command, "--out", "whole")
    rows = metrics(work / "whole")
    assert [row["ptst/stage"] for row in rows] == [1, 1, 1, 2, 2, 2]
    assert [round(row["tokens/gen"] / row["len/mean"] / 6) for row in rows] == [6, 6, 6, 4, 4, 4]
    run(work, *command, "--out", "cut")
    shutil.rmtree(work / "cut/step_000006")
    run(work, *command, "--out", "cut", "--resume")
    assert json.dumps(metrics(work / "cut")) == json.dumps(rows)
    a, b = (weights(newest(work / name)) for name in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)


REFILL = ["--ssr", "refill", "--prompts_per_step", "3", "--updates", "2", "--max_new_tokens", "48",
          "--reward", "accuracy=1"]


def test_refill_on_two_ranks_resumes(work, taught):  # noqa: F811
    """Few questions have an advantage: more are drawn, and some wait; cut in the middle, on two ranks."""
    command = [*taught, *REFILL, "--save_every", "3", "--keep", "9"]
    run(work, *command, "--steps", "6", "--out", "whole")
    rows = metrics(work / "whole")
    drawn = [row["tokens/gen"] / row["len/mean"] for row in rows]  # rollouts
    assert max(drawn) > min(drawn) and max(row["refill/waiting"] for row in rows) > 0
    run(work, *command, "--steps", "3", "--out", "cut", ranks=2)
    run(work, *command, "--steps", "6", "--out", "cut", "--resume")
    for a, b in zip(rows, metrics(work / "cut"), strict=True):
        close(a, b, 1e-4)
    close(weights(newest(work / "whole")), weights(newest(work / "cut")), 1e-4)
    run(work, *command, "--steps", "6", "--out", "again")
    shutil.rmtree(work / "again/step_000006")
    run(work, *command, "--steps", "6", "--out", "again", "--resume")
    assert json.dumps(metrics(work / "again")) == json.dumps(rows)


@pytest.mark.parametrize("unit, longest", [("tokens", 0), ("characters", 1)])
def test_the_length_bonus_counts_tokens_or_characters(unit, longest):
    """Of two right responses one has more tokens, the other more characters: the longer one gets no bonus."""
    rollouts = [grpo.Rollout(0, [1] * 40, torch.zeros(40), False, "a" * 40),
                grpo.Rollout(0, [1] * 10, torch.zeros(10), False, "a" * 400)]
    cfg = dataclasses.replace(CFG, group_size=2, length_bonus=1.0, length_unit=unit)
    grpo.add_length_bonus(rollouts, [{"solved": True}, {"solved": True}], cfg)
    rewards = [r.reward for r in rollouts]
    assert rewards.index(min(rewards)) == longest and min(rewards) < max(rewards)
