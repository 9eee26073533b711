"""Masked and noised images: PAPO, VPPO and NoisyRollout in the worked numbers of their papers,
and as whole runs.
"""
import dataclasses
import json
import math
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import conftest
import data_prep
import grpo
import sft
from test_methods import END, prompt, taught, updated  # noqa: F401
from test_stages import GRPO, close, metrics, newest, run, weights, work  # noqa: F401

PAPO = SimpleNamespace(perception="papo", perception_kl=0.02, perception_entropy=0.03)


# ----- images


def levels(image):
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


def patches(image):
    """(row, column): the pixels of each patch."""
    pixels = levels(image)
    return {(y, x): pixels[y:y + 14, x:x + 14]
            for y in range(0, image.height, 14) for x in range(0, image.width, 14)}


@pytest.mark.parametrize("size", [(84, 56), (60, 45), (14, 14), (5, 97)])
def test_patches_are_black_or_as_they_were(size):
    image = conftest.picture(*size)
    before, after = patches(image), patches(sft.blackened(image, 0.5, random.Random(1)))
    assert after.keys() == before.keys()
    for place, patch in after.items():
        assert not patch.any() or torch.equal(patch, before[place])
    assert sft.blackened(image, 0, random.Random(1)).tobytes() == image.tobytes()
    assert not levels(sft.blackened(image, 1, random.Random(1))).any()


@pytest.mark.parametrize("share", [0.5, 0.6])
def test_the_share_of_black_patches(share):
    image = Image.new("RGB", (1400, 1400), (200, 100, 50))
    black = [not patch.any() for patch in patches(sft.blackened(image, share, random.Random(7))).values()]
    assert sum(black) / len(black) == pytest.approx(share, abs=0.02)
    again, other = (sft.blackened(image, share, random.Random(seed)).tobytes() for seed in (7, 8))
    assert again == sft.blackened(image, share, random.Random(7)).tobytes() != other


def kept(step):
    """What is left of the image after that step, by the spec's formula."""
    product = 1.0
    for k in range(step + 1):
        beta = 1 / (1 + math.exp(6 - 12 * k / 999)) * (0.005 - 1e-5) + 1e-5
        product *= 1 - beta
    return product


@pytest.mark.parametrize("step", [0, 100, 250, 499])
def test_noise_is_the_diffusion_forward_process(step):
    """Of a grey so little is clipped that mean and spread are those of the formula."""
    image = Image.new("RGB", (300, 300), (128, 128, 128))
    mixed = levels(sft.diffused(image, step, random.Random(0))).float() / 255
    noise = torch.randn(10**5, generator=torch.Generator().manual_seed(1))
    expected = (math.sqrt(kept(step)) * 128 / 255 + math.sqrt(1 - kept(step)) * noise).clamp(0, 1)
    assert mixed.mean() == pytest.approx(expected.mean().item(), abs=4e-3)
    assert mixed.std() == pytest.approx(expected.std().item(), abs=4e-3)


def test_noise_is_a_function_of_its_seed():
    image = conftest.picture(60, 45)
    one, again, other = (sft.diffused(image, 300, random.Random(seed)).tobytes() for seed in (0, 0, 1))
    assert one == again != other
    barely = levels(sft.diffused(image, 0, random.Random(0))).float() - levels(image).float()
    assert barely.abs().mean() < 2


@pytest.mark.parametrize("step, steps, level", [
    (1, 60, 499), (40, 60, 250), (60, 60, 0), (40, 100, 250), (50, 100, 23), (1, 3, 500), (100, 1000, 70)])
def test_the_noise_fades(monkeypatch, step, steps, level):
    """int(500 (1 - sigmoid(30 (k - 40) / K)))"""
    used = []
    monkeypatch.setattr(sft, "diffused", lambda image, step, chance: used.append(step) or image)
    record = conftest.question("one", conftest.picture(56, 56))
    sft.encode_view((0, "noised"), step, [record], lambda record: record, grpo.Config(steps=steps))
    assert used == [level]


def test_what_the_workers_are_asked_for(family):
    """The same tokens and grids, other pixels; the engine's own images are those that were changed."""
    records = [conftest.RECORDS[name] for name in ("two images", "text")]
    cfg = grpo.Config(perception="papo", steps=60, max_pixels=10**6)

    def encode(record):
        return sft.encode_prompt(record, family.processor, cfg.max_pixels)

    def view(asked, step=1, seed=0):
        return sft.encode_view(asked, step, records, encode, dataclasses.replace(cfg, seed=seed))

    plain = view(0)
    assert [image.tobytes() for image in plain["request"]["images"]] == [
        image.tobytes() for image in records[0]["images"]]
    for name in ("masked", "noised"):
        changed = view((0, name))
        assert changed.keys() == plain.keys() and torch.equal(changed["input_ids"], plain["input_ids"])
        pixels = [[p[key] for key in sft.pixel_names(plain)] for p in (plain, changed)]
        assert all(a.shape == b.shape for a, b in zip(*pixels)) and not all(map(torch.equal, *pixels))
        images = [image.tobytes() for image in changed["request"]["images"]]
        assert len(images) == 2 and all(a != b.tobytes() for a, b in zip(images, records[0]["images"]))
        assert images == [image.tobytes() for image in view((0, name))["request"]["images"]]
        for other in (view((0, name), step=2), view((0, name), seed=1)):
            assert images != [image.tobytes() for image in other["request"]["images"]]
        assert torch.equal(view((1, name))["input_ids"], view(1)["input_ids"])  # a question without an image


def test_a_loaded_image_is_loaded_again_as_it_is():
    for size in ((900, 700), (3, 500), (28, 28)):
        once = data_prep.load_image(conftest.picture(*size), 50_000)
        assert data_prep.load_image(once, 50_000).tobytes() == once.tobytes()


# ----- PAPO


@pytest.mark.parametrize("gap, value", [
    (0, 0), (0.5, 0.1487), (-1, 0.3679), (100, math.exp(20) - 21), (-100, 19)])
def test_k3_table(gap, value):
    assert grpo.k3(torch.tensor(float(gap))).item() == pytest.approx(value, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("perception", ["papo", "vppo"])
def test_perception_loss_equals_a_slow_loop(perception, seed):
    rng = random.Random(seed)
    cfg = SimpleNamespace(perception=perception, perception_kl=0.3, perception_entropy=0.2)
    tokens = [(rng.gauss(-1, 1), rng.gauss(-2, 1), rng.choice([0, 0.1, 0.05])) for _ in range(12)]
    logps, masked, weight = (torch.tensor(column).view(3, 4) for column in zip(*tokens))
    logps.requires_grad_()
    loss, kl = grpo.perception_loss(logps, masked, weight, cfg)
    loss.backward()
    expected = total = 0.0
    slopes = []
    gamma = 0.3 if perception == "papo" else 0
    for new, blind, w in tokens:
        e = blind - new
        total += w * (math.exp(e) - e - 1)
        expected += w * (0.2 * -new - gamma * (math.exp(e) - e - 1))
        slopes.append(w * (-0.2 + gamma * (math.exp(e) - 1)))
    assert loss.item() == pytest.approx(expected, rel=1e-4) and kl.item() == pytest.approx(total, rel=1e-4)
    assert logps.grad.flatten().tolist() == pytest.approx(slopes, rel=1e-4, abs=1e-7) and not kl.requires_grad


def seen_rollout(advantage, masked, credit=None, logps=(-.1, -.2)):
    return grpo.Rollout(0, [END] * len(logps), torch.tensor(logps), False, "", advantage=advantage,
                        masked_logps=torch.tensor(masked), credit=credit)


def test_papo_in_an_update(group):
    """Without an advantage a rollout still learns to depend on its image; the gradient is the formula's."""
    logps, masked = [-.1, -.2], [-.6, -1.2]
    flags = {"perception": "papo", "perception_kl": 0.5, "perception_entropy": 0.1}
    sums, grad = updated([seen_rollout(0.0, masked)], logps, **flags)
    slopes = [0.5 * (-0.1 + 0.5 * (math.exp(b - a) - 1)) for a, b in zip(logps, masked)]
    assert grad.tolist() == pytest.approx(slopes, rel=1e-4)
    gaps = [math.exp(b - a) - (b - a) - 1 for a, b in zip(logps, masked)]
    assert sums["perception/kl"] == pytest.approx(sum(gaps) / 2, rel=1e-4)
    _, both = updated([seen_rollout(1.0, masked)], logps, **flags)
    assert both.tolist() == pytest.approx([slope - 0.5 for slope in slopes], rel=1e-4)


@pytest.mark.parametrize("flags, trains", [
    ({}, False), ({"kl_beta": 0.1}, True), ({"perception": "papo"}, True), ({"perception": "vppo"}, True),
    ({"noisy_frac": 0.5}, False)])
def test_which_groups_without_an_advantage_are_trained_on(flags, trains):
    assert grpo.has_gradient(seen_rollout(0.0, [-1., -1.]), grpo.Config(**flags)) == trains
    assert grpo.has_gradient(seen_rollout(0.5, [-1., -1.]), grpo.Config(**flags))


# ----- VPPO


@pytest.mark.parametrize("reliance, chosen", [
    ([0.5, 0.1, 0.9, 0.2, 0.3], [1, 0, 1, 0, 0]), ([0.3], [1]), ([0.1, 0.2], [0, 1]), ([1, 2, 3], [0, 1, 1]),
    ([9, 8, 7, 6, 5, 4, 3, 2, 1, 0], [1] * 4 + [0] * 6), (list(range(11)), [0] * 6 + [1] * 5)])
def test_two_fifths_of_the_tokens(reliance, chosen):
    assert grpo.most_reliant(torch.tensor(reliance, dtype=torch.float32)).tolist() == chosen


@pytest.mark.parametrize("means, factors", [
    ([0, 0.5, 1], [0.9, 1.0, 1.1]), ([2, 4, 6], [0.9, 1.0, 1.1]), ([3, 3], [1, 1]), ([], []), ([1], [1]),
    ([0, 1], [0.9, 1.1]), ([0, 0, 0, 1], [0.9, 0.9, 0.9, 1.3])])
def test_factors_of_vppo(group, means, factors):
    found = grpo.vppo_factors([torch.tensor([mean - 1.0, mean + 1.0]) for mean in means])
    assert found == pytest.approx(factors)


def test_factors_are_of_the_whole_batch(monkeypatch):
    """Two ranks: one has rollouts of 0 and 1, the other of 2 and 4."""
    shares = [[0, 1], [2, 4]]
    monkeypatch.setattr(grpo, "global_max", lambda value: {0: 0, -1: 0, 1: 4, 4: 4, -2: 0}[value])
    monkeypatch.setattr(grpo, "global_sum", lambda values: [7 / 4, 4])
    found = [grpo.vppo_factors([torch.tensor([float(mean)]) for mean in means]) for means in shares]
    scaled, most = [0, 1 / 4, 2 / 4, 1], 0.9 + 0.1 * 4 / (7 / 4)
    assert sum(found, []) == pytest.approx([0.9 + (most - 0.9) * n for n in scaled])
    assert sum(sum(found, [])) / 4 == pytest.approx(1)


def test_vppo_in_an_update(group):
    """A token that is not chosen has no gradient but counts in the denominator;
    the factor scales the others.
    """
    logps = [-.1, -.2, -.3, -.4, -.5]
    credit = torch.tensor([0.0, 1.1, 0.0, 1.1, 0.0])
    r = seen_rollout(1.0, [-1.0] * 5, credit, logps)
    sums, grad = updated([r], logps, perception="vppo", perception_entropy=0.0)
    assert grad.tolist() == pytest.approx([0, -1.1 / 5, 0, -1.1 / 5, 0])
    _, grad = updated([r], logps, perception="vppo", perception_entropy=0.06)
    assert grad.tolist() == pytest.approx([-.012 + slope for slope in (0, -.22, 0, -.22, 0)])
    assert sums["perception/kl"] > 0


# ----- the second look


class Hands:
    """Workers that encode at once, and remember what for."""

    def __init__(self, encode):
        self.encode, self.asked = encode, []

    def prepared(self, batches, first_step=0):
        for step, batch in enumerate(batches, first_step):
            self.asked += [(asked, step) for asked in batch]
            yield [(asked, self.encode(asked, step)) for asked in batch]


@pytest.fixture
def looked(tiny, group):
    """look_again on the tiny model, with all it needs, and what it should find."""
    def look(perception):
        cfg = grpo.Config(perception=perception, max_new_tokens=8)
        policy, processor = sft.load_policy(tiny.model, cfg, conftest.CPU)

        def encode(record):
            return sft.encode_prompt(record, processor, cfg.max_pixels)

        hands = Hands(lambda asked, step: sft.encode_view(asked, step, tiny.records, encode, cfg))
        prompts = {q: hands.encode(q, 5) for q in (2, 4)}
        rollouts = [grpo.Rollout(q, [20 + i, 30, 40 + i], torch.zeros(3), False, "")
                    for i, q in enumerate((2, 2, 4))]
        rollouts[1].old_logps = torch.tensor([-7.0, -7.0, -7.0])  # replayed: it keeps what it had
        rollouts[0].trigger = (0, 1)
        grpo.look_again([*rollouts, rollouts[0]], policy, prompts, hands, None, 5, None, cfg)
        own = {}
        for view in ("masked", None):
            rows = [(hands.encode((r.question, view) if view else r.question, 5), r.response)
                    for r in rollouts]
            own[view] = sft.row_logprobs(policy, rows, None)
        return rollouts, hands, own[None], own["masked"]
    return look


def test_a_second_look_scores_the_same_responses_with_masked_images(looked):
    rollouts, hands, seen, masked = looked("papo")
    assert hands.asked == [((2, "masked"), 5), ((4, "masked"), 5)]
    for r, with_image, without in zip(rollouts, seen, masked):
        assert r.masked_logps.tolist() == pytest.approx(without.tolist(), abs=1e-5)
        assert (without - with_image).abs().max() > 1e-3
        assert not r.masked_logps.requires_grad and r.credit is None and isinstance(r.question, int)
    assert rollouts[0].old_logps is None and rollouts[1].old_logps.tolist() == [-7.0] * 3


def test_vppo_credits_what_relies_on_the_image(looked):
    """Against the policy of this step, also for what was replayed; a forced token is no choice."""
    rollouts, _, seen, masked = looked("vppo")
    reliance = [grpo.k3(without - with_image) for with_image, without in zip(seen, masked)]
    reliance[0][0] = 0
    factors = grpo.vppo_factors(reliance)
    for r, of_token, factor in zip(rollouts, reliance, factors):
        assert r.credit.tolist() == pytest.approx((factor * grpo.most_reliant(of_token)).tolist(), abs=1e-4)
        assert (r.credit > 0).sum() == 2
    assert rollouts[0].credit[0] == 0
    assert rollouts[0].old_logps.tolist() == pytest.approx(seen[0].tolist(), abs=1e-5)
    assert rollouts[1].old_logps.tolist() == [-7.0] * 3


# ----- NoisyRollout


@pytest.mark.parametrize("share, size, noised", [
    (0.5, 8, 4), (0.5, 2, 1), (0.25, 8, 2), (0.01, 4, 1), (0.99, 4, 3)])
def test_the_last_of_a_group_see_noise(monkeypatch, share, size, noised):
    """They come back as rollouts of their question, in their places, with nothing to correct."""
    asked = []

    def sample(engine, questions, prompts, seeds, tokenizer, cfg):
        asked.extend(prompts[q] for q in questions)
        return [grpo.Rollout(q, [1, 2], torch.tensor([-1., -2.]), False, str(seed))
                for q, seed in zip(questions, seeds)]

    monkeypatch.setattr(grpo, "sample_rollouts", sample)
    cfg = grpo.Config(noisy_frac=share, group_size=size)
    questions = [q for q in (3, 1) for _ in range(size)]
    hands = Hands(lambda asked, step: f"{asked[0]} {asked[1]} {step}")
    rollouts = grpo.sample_noised(None, questions, {3: "3", 1: "1"}, range(2 * size), None, hands, 7, None,
                                  cfg)
    clean = size - noised
    assert asked == ["3"] * clean + ["3 noised 7"] * noised + ["1"] * clean + ["1 noised 7"] * noised
    assert [r.question for r in rollouts] == questions and [
        r.text for r in rollouts] == [*map(str, range(2 * size))]
    for i, r in enumerate(rollouts):
        assert r.sampler_logps.isnan().all() == (i % size >= clean)


@pytest.mark.parametrize("is_mode", ["truncate", "sequence"])
def test_noised_rollouts_are_not_corrected_and_no_mismatch(group, is_mode):
    """The clean one's sampler is off by 0.3 a token; what sampled the other does not matter."""
    logps = [-.5, -.5, -.7, -.9]
    clean = grpo.Rollout(0, [END] * 2, torch.tensor([-.8, -.8]), False, "", advantage=1.0)
    noised = grpo.Rollout(0, [END] * 2, torch.full((2,), math.nan), False, "", advantage=1.0)
    sums, grad = updated([clean, noised], logps, is_mode=is_mode, is_cap=9.0)
    weight = math.exp(0.3 if is_mode == "truncate" else 0.6)
    assert grad.tolist() == pytest.approx([-weight / 4] * 2 + [-1 / 4] * 2, rel=1e-4)
    assert sums["gap"] / sums["sampled"] == pytest.approx(0.3) and sums["sampled"] == 2
    assert noised.old_logps.tolist() == pytest.approx([-.7, -.9])  # under the clean image


@pytest.mark.parametrize("flags, line", [
    ({"noisy_frac": 1.0}, "--noisy_frac is a share"), ({"noisy_frac": -0.1}, "--noisy_frac is a share"),
    ({"perception": "vppo", "objective": "gspo"}, "--perception vppo chooses tokens")])
def test_what_is_refused(flags, line):
    with pytest.raises(ValueError, match=line):
        grpo.check(grpo.Config(**flags))


# ----- whole runs


@pytest.fixture
def rewarded(work):  # noqa: F811
    """grpo.py on a random model with a reward that differs within a group."""
    (work / "mine.py").write_text("def vowels(response, record):\n"
                                  "    return sum(map(response.count, 'aeiou')) % 5 / 4\n")
    return [*GRPO, "--reward", "mine.py:vowels=1", "--eval_data", "", "--warmup", "0", "--lr", "1e-3",
            "--prompts_per_step", "4"]


def check_whole_run(work, command, **differs):  # noqa: F811
    """Three steps are the same on two ranks, and the same to the bit when cut and resumed,
    on one and on two.
    """
    command = [*command, "--steps", "3", "--save_every", "1", "--keep", "9"]
    found = []
    for out, ranks in (("one", 1), ("two", 2)):
        run(work, *command, "--out", out, ranks=ranks)
        rows, end = metrics(work / out), weights(newest(work / out))
        shutil.rmtree(work / out / "step_000003")
        run(work, *command, "--out", out, "--resume", ranks=ranks)
        assert json.dumps(metrics(work / out)) == json.dumps(rows)
        again = weights(newest(work / out))
        assert all(torch.equal(end[name], again[name]) for name in end)
        found.append((rows, end))
    for a, b in zip(found[0][0], found[1][0], strict=True):
        close(a, b, 1e-4)
    close(found[0][1], found[1][1], 1e-4)
    return found[0][0]


@pytest.mark.parametrize("flags", [["--perception", "papo"], ["--perception", "vppo", "--updates", "2"],
                                   ["--noisy_frac", "0.5"]], ids=lambda flags: flags[1])
def test_each_alone_trains_and_resumes(work, rewarded, flags):  # noqa: F811
    rows = check_whole_run(work, [*rewarded, *flags])
    assert all((row["perception/kl"] > 0) == ("--perception" in flags) for row in rows)
    assert all(row["optim/grad_norm"] > 0 and 0 < row["mismatch/max"] < 1e-4 for row in rows)
    run(work, *rewarded, "--steps", "1", "--out", "plain")
    [plain] = metrics(work / "plain")
    assert plain["mismatch/mean"] > 0 and plain["perception/kl"] == 0
    a, b = weights(work / "one/step_000001"), weights(work / "plain/step_000001")
    assert any(not torch.equal(a[name], b[name]) for name in a)
    times = [json.loads(line) for line in (work / "one/metrics.jsonl").read_text().splitlines()]
    assert all(("time/perception" in row) == ("--perception" in flags) for row in times)


def test_everything_together(work, taught):  # noqa: F811
    """Replay, rethinking, adapters, one ratio a rollout, masked and noised images."""
    rows = check_whole_run(work, [*taught, "--ssr", "replay", "--rethink_frac", "0.6", "--rethink_min", "1",
                                  "--rethink_max", "24", "--max_new_tokens", "48", "--objective", "gspo",
                                  "--perception", "papo", "--noisy_frac", "0.5", "--updates", "2",
                                  "--lora_rank", "4"])
    for name in ("replay/frac", "rethink/frac", "perception/kl"):
        assert max(row[name] for row in rows) > 0
