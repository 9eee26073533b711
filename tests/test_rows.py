"""A prompt and its image are computed once: rows of several responses against rows of one,
in every family.
"""
import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, FAMILIES, MORE_FAMILIES, made_family
from test_logprobs import close, responses, scored
from test_selfcheck import Log, config, rows_of, run  # noqa: F401

import grpo
import sft

SIZES = (3, 1, 4, 2, 5)  # responses to each of the family's five prompts


@pytest.fixture(scope="module", params=[*FAMILIES, *MORE_FAMILIES])
def family(request, tmp_path_factory, group):
    return made_family(request.param, str(tmp_path_factory.mktemp(request.param)))


@pytest.fixture
def groups(family):
    """Prompts with 0, 1 and 2 images of different sizes, and ragged responses to each."""
    if family.name == "gemma3":
        pytest.skip("has sliding windows: a row for each response")
    prompts = list(family.prompts.values())
    return [sft.Group(prompt, responses(family, n, seed=n)) for prompt, n in zip(prompts, SIZES)]


def apart(groups):
    return [(group.prompt, response) for group in groups for response in group.responses]


def logps_of(policy, rows):
    inputs, mask = sft.collate(rows, None, 0, CPU)
    return policy.token_logprobs(inputs, mask)[mask]


def gradients(policy, rows):
    policy.zero_grad()
    logps = logps_of(policy, rows)
    weights = torch.randn(len(logps), generator=torch.Generator().manual_seed(0))
    (weights * logps).sum().backward()
    return {name: p.grad.full_tensor().clone() for name, p in policy.named_parameters() if p.grad is not None}


# ----- what is computed


LAYOUTS = {"a row a question": lambda groups: groups, "one row": lambda groups: [groups],
           "rows of two": lambda groups: [groups[:2], groups[2:4], groups[4]],
           "beside rows of one": lambda groups: [*apart(groups[:3]), groups[3:]]}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probabilities_are_those_of_a_row_each(family, groups, layout):
    with torch.no_grad():
        alone = torch.cat([scored(family, [row])[0] for row in apart(groups)])
        close([logps_of(family.policy, LAYOUTS[layout](groups))], [alone], 1e-5)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_gradients_are_those_of_a_row_each(family, groups, checkpointing):
    cfg = config(gradient_checkpointing=checkpointing)
    policy, _ = sft.load_policy(family.path, cfg, CPU)
    expected = gradients(policy, apart(groups))
    got = gradients(policy, [groups[:3], groups[3], groups[4]])
    assert got.keys() == expected.keys()
    largest = max(g.norm() for g in expected.values())
    for name in expected:
        size = max(expected[name].norm(), 1e-2 * largest)  # a key's bias has none but rounding
        assert (got[name] - expected[name]).norm() <= 1e-5 * size, name


def test_the_vision_tower_sees_each_image_once(family, groups):
    def patches(rows):
        return sft.collate(rows, None, 0, CPU)[0]["pixel_values"].numel()

    one_each = patches([sft.Group(group.prompt, group.responses[:1]) for group in groups])
    assert patches(groups) == patches([groups]) == one_each < patches(apart(groups))


def test_a_response_sees_neither_its_siblings_nor_other_questions(family, groups):
    """Whatever else stands in the row, to the last bit of what is masked."""
    first, *others = groups
    with torch.no_grad():
        before = logps_of(family.policy, [groups])[:len(first.responses[0])]
        turned = sft.Group(first.prompt, [first.responses[0], *(r[::-1] for r in first.responses[1:])])
        others = [sft.Group(g.prompt, [r[::-1] for r in g.responses]) for g in others]
        after = logps_of(family.policy, [[turned, *others]])[:len(first.responses[0])]
    assert torch.equal(before, after)


def test_layout_of_a_group():
    prompt = {"input_ids": torch.tensor([[7, 8, 9]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    group = sft.Group(prompt, [[1, 2], [3], []])
    places, owners = group.layout()
    assert group.over_tokens("input_ids").tolist() == [7, 8, 9, 1, 2, 9, 3, 9] and len(group) == 8
    assert places.tolist() == [0, 1, 2, 3, 4, 2, 3, 2] and owners.tolist() == [0, 0, 1, 1, 1, 2, 2, 3]
    inputs, mask = sft.collate([group], None, 0, CPU)
    assert mask[0].tolist() == [False, False, True, True, False, True, False]
    seen = inputs["seen"][0, 0].int().tolist()
    assert seen[4] == [1, 1, 1, 1, 1, 0, 0, 0] and seen[6] == [1, 1, 0, 0, 0, 1, 1, 0]
    assert seen[7] == [1, 1, 0, 0, 0, 0, 0, 1]


# ----- the update


@pytest.mark.parametrize("flags", [{}, {"kl_beta": 0.1, "updates": 2}, {"loss_mean": "sequence"},
                                   {"token_budget": 120}, {"token_budget": 1}, {"rethink_mask": "prefix"}],
                         ids=lambda flags: " ".join(flags) or "plain")
def test_an_update_is_that_of_a_row_each(run, monkeypatch, flags):  # noqa: F811
    """With replayed rollouts, one of them twice, and a forced one; gradients, metrics and what is kept."""
    cfg = config(group_size=3, **{"token_budget": 2048, **flags})
    reference = sft.load_policy(run.policy.config._name_or_path, cfg, CPU, trainable=False)[0]
    stream = torch.Generator().manual_seed(1)
    found = []
    monkeypatch.setattr(grpo, "optimizer_step", lambda policy, *_: found.append({
        name: p.grad.full_tensor().clone() for name, p in policy.named_parameters()
        if p.grad is not None}) or 1.0)
    prompts = dict(enumerate(run.prompts))

    def rollouts():
        stream.manual_seed(1)
        made = []
        for i in range(9):
            ids = torch.randint(20, 60, (2 + i,), generator=stream).tolist()
            logps = -torch.rand(len(ids), generator=stream)
            made.append(grpo.Rollout(i // 3, ids, logps, False, "", advantage=(-1) ** i * (0.5 + i)))
        made[4].old_logps = made[4].sampler_logps - 0.1  # replayed: the policy has moved since
        made[5].trigger = (2, 4)
        made[5].sampler_logps[2:4] = torch.nan
        made[7].advantage = 0.0
        return made

    results = []
    for packs in (False, True):
        run.policy.packs = reference.packs = packs
        run.policy.zero_grad()
        made = rollouts()
        halves = [[*made[:5], made[4]], made[5:]] if cfg.updates == 2 else [[*made, made[4]]]
        totals = grpo.train_on(halves, run.policy, reference if cfg.kl_beta else None, run.optimizer, prompts,
                               run.dummy, 1, Log(), cfg)
        results.append((found.copy(), totals, made))
        found.clear()
    (one_each, totals, made), (shared, shared_totals, shared_made) = results
    for expected, got in zip(one_each, shared, strict=True):
        assert expected.keys() == got.keys()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], atol=1e-5, rtol=1e-4, msg=name)
    assert shared_totals == pytest.approx(totals, abs=1e-4, rel=1e-4)
    for a, b in zip(made, shared_made):
        for field in ("old_logps", "ref_logps"):
            if getattr(a, field) is not None:
                torch.testing.assert_close(getattr(b, field), getattr(a, field), atol=1e-5, rtol=1e-5)


# ----- which rollouts share a row


def grouped(lengths, prompt=10, packs=True, budget=10**6, hidden=10**6):
    """Members of the groups that rollouts of (question, response length) make."""
    text = SimpleNamespace(hidden_size=hidden)
    policy = SimpleNamespace(packs=packs, config=SimpleNamespace(get_text_config=lambda: text))
    prompts = {q: {"input_ids": torch.ones(1, prompt, dtype=torch.long)} for q, _ in lengths}
    rollouts = [grpo.Rollout(q, [1] * n, torch.zeros(n), False, "") for q, n in lengths]
    groups, members = sft.question_groups(rollouts, prompts, policy, budget)
    assert sorted(itertools.chain.from_iterable(members)) == list(range(len(lengths)))
    assert [len(group.responses) for group in groups] == [len(m) for m in members]
    return members


@pytest.mark.parametrize("flags, expected", [
    ({}, [[0, 2, 3], [1]]),
    ({"packs": False}, [[0], [1], [2], [3]]),
    ({"budget": 22}, [[0, 2], [1], [3]]),  # 10 + 5 + 1 + 5 fit
    ({"budget": 20}, [[0], [1], [2], [3]]),
    ({"hidden": 1}, [[0, 2], [1], [3]]),  # where looking at six others costs as much as all else
    ({"hidden": 1, "prompt": 5}, [[0], [1], [2], [3]]),
    ({"hidden": 1, "prompt": 100}, [[0, 2, 3], [1]]),
])
def test_rollouts_share_a_row_where_that_is_less_to_compute(flags, expected):
    assert grouped([(0, 5), (1, 5), (0, 5), (0, 5)], **flags) == expected


def test_long_responses_to_a_short_prompt_have_rows_of_their_own():
    """Each token would have all siblings to look at:
    8 responses of 4,096 tokens at the size of a 3B model.
    """
    assert grouped([(0, 4096)] * 8, prompt=100, hidden=2048) == [[i] for i in range(8)]
    assert grouped([(0, 256)] * 8, prompt=1000, hidden=2048) == [list(range(8))]


# ----- which families


def test_a_family_with_sliding_windows_has_a_row_for_each_response(family):
    rows = [(prompt, response) for prompt, response in zip(family.prompts.values(), responses(family, 5))]
    alone = [scored(family, [row])[0] for row in rows]
    reason = sft.why_not_packed(family.policy, rows, None, alone, 1e-3)
    assert reason == ("not all layers look at all tokens" if family.name == "gemma3" else "")


@pytest.mark.parametrize("kinds, window, expected", [
    (None, None, ""), (None, 4096, "layers"), (["full_attention"] * 2, 4096, ""),
    (["full_attention", "linear_attention"], None, "layers"), (["sliding_attention"], None, "layers")])
def test_layers_that_do_not_see_all_tokens(run, monkeypatch, kinds, window, expected):  # noqa: F811
    """A window is no longer than the check's few tokens: only the configuration tells."""
    text = SimpleNamespace(layer_types=kinds, sliding_window=window, hidden_size=64)
    monkeypatch.setattr(type(run.policy.config), "get_text_config", lambda self, *_, **__: text)
    alone = [sft.row_logprobs(run.policy, [row], run.dummy)[0] for row in rows_of(run)]
    assert expected in sft.why_not_packed(run.policy, rows_of(run), run.dummy, alone, 1e-3)


def test_flash_attention_is_not_even_tried(run):  # noqa: F811
    """Its kernels would take the mask for another one."""
    run.policy.config.get_text_config()._attn_implementation = "flash_attention_2"
    assert "--attn sdpa" in sft.why_not_packed(run.policy, rows_of(run), run.dummy, None, 1e-3)


def blind(seen, places, starts, **inputs):
    """An attention that takes no mask: a response sees its siblings."""
    return inputs | {"position_ids": places}


def crashing(**inputs):
    raise RuntimeError("The size of tensor a (30)\nmust match")


@pytest.mark.parametrize("inputs_of, reason", [
    (lambda model, **inputs: blind(**inputs), "log-probabilities change by"),
    (lambda model, seen, places, starts, **inputs: inputs | {
        "attention_mask": seen, "position_ids": torch.arange(places.shape[1])[None]},
     "log-probabilities change by"),
    (lambda model, **inputs: crashing(), "RuntimeError: The size of tensor a (30)")],
    ids=["no mask", "no positions", "crash"])
def test_what_a_family_does_wrong_shows_and_costs_only_time(
        run, monkeypatch, inputs_of, reason):  # noqa: F811
    monkeypatch.setattr(sft, "placed_inputs", inputs_of)
    sft.self_check(run.policy, rows_of(run), run.dummy, run.log)
    assert not run.policy.packs and "a row holds one response: " in run.log.notes[-1]
    assert reason in run.log.notes[-1] and "\n" not in run.log.notes[-1]
    run.policy.token_logprobs(*sft.collate(rows_of(run), run.dummy, 0, CPU)).sum().backward()  # it goes on


def test_the_self_check_says_so(run):  # noqa: F811
    sft.self_check(run.policy, rows_of(run), run.dummy, run.log)
    assert run.policy.packs and run.log.notes[-1] == "a row holds a prompt with all its responses"


def test_sft_loss_is_the_same_packed(run):  # noqa: F811
    """Short rows side by side; another budget, another layout, the same sum."""
    rows = [(prompt, list(range(20, 20 + n)))
            for prompt, n in zip(run.prompts * 3, (1, 30, 4, 9, 2, 17, 3, 5, 40))]
    found, widths = [], []
    for packs, budget in [(False, 10**6), (True, 10**6), (True, 200), (True, 1)]:
        run.policy.packs = packs
        cfg = dataclasses.replace(config(), token_budget=budget)
        with torch.no_grad():
            found.append(sum(loss.item() for loss, _ in sft.losses(run.policy, rows, run.dummy, cfg)))
        groups = [sft.Group(prompt, [response]) for prompt, response in rows]
        sizes = [i["input_ids"].numel()
                 for _, i, _ in sft.group_batches(groups, run.policy, run.dummy, budget)]
        widths.append(sum(sizes))
    assert found == pytest.approx([found[0]] * 4, rel=1e-5) and widths[1] < widths[0]
