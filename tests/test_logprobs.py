"""collate and token_logprobs against full logits, over padding, companions and chunks; every model family."""
import functools
import random
from types import SimpleNamespace

import pytest
import torch

import sft

CPU = torch.device("cpu")


def responses(family, count, longest=6, seed=0):
    """Ragged random responses without banned ids."""
    rng, banned = random.Random(seed), set(family.policy.banned.tolist())
    allowed = [i for i in range(family.plain.get_output_embeddings().weight.shape[0]) if i not in banned]
    return [rng.choices(allowed, k=rng.randint(1, longest)) for _ in range(count)]


def extend(prompt, response):
    """One row's forward kwargs, prompt and response, without padding."""
    ids = torch.cat([prompt["input_ids"], torch.tensor([response])], 1)
    grown = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for key, value in prompt.items():
        if value.shape == prompt["input_ids"].shape and key not in grown:
            grown[key] = torch.nn.functional.pad(value, (0, len(response)))
    return {**prompt, **grown}


def naive(family, prompt, response, temperature=1.0):
    """Log-probabilities of one response from the plain model's full logits."""
    family.plain.model.rope_deltas = None
    logits = family.plain(**extend(prompt, response), use_cache=False).logits[0].float() / temperature
    logits = logits.index_fill(1, family.policy.banned, -torch.inf)
    start = prompt["input_ids"].shape[1] - 1
    return logits[start:start + len(response)].log_softmax(1).gather(1, torch.tensor(response)[:, None])[:, 0]


def scored(family, rows, temperature=1.0, pad_id=0, policy=None):
    """token_logprobs of collated rows, split by row."""
    inputs, mask = sft.collate(rows, family.prompts["image"], pad_id, CPU)
    logps = (policy or family.policy).token_logprobs(inputs, mask, temperature)
    assert logps.shape == (len(inputs["input_ids"]), inputs["input_ids"].shape[1] - 1) == mask.shape
    assert (logps[~mask] == 0).all()
    return logps[mask].split([len(r) for _, r in rows])


def close(got, expected, tolerance=2e-5):
    torch.testing.assert_close(torch.cat(list(got)), torch.cat(list(expected)),
                               atol=tolerance, rtol=tolerance)


# ----- against full logits


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_equals_log_softmax_of_full_logits(family, temperature):
    rows = list(zip(family.prompts.values(), responses(family, 5)))
    with torch.no_grad():
        close(scored(family, rows, temperature), [naive(family, *row, temperature) for row in rows])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradients_equal_those_of_full_logits(family, temperature):
    rows = list(zip(family.prompts.values(), responses(family, 5, seed=1)))
    weights = torch.randn(sum(len(r) for _, r in rows), generator=torch.Generator().manual_seed(0))
    family.plain.zero_grad()
    family.policy.zero_grad()
    (torch.cat([naive(family, *row, temperature) for row in rows]) * weights).sum().backward()
    (torch.cat(scored(family, rows, temperature)) * weights).sum().backward()
    expected = {name: p.grad for name, p in family.plain.named_parameters()}
    got = {name: p.grad for name, p in family.policy.named_parameters()}
    assert got.keys() == expected.keys()
    for name, grad in got.items():
        full = torch.zeros(()) if grad is None else grad.full_tensor()
        want = torch.zeros(()) if expected[name] is None else expected[name]
        torch.testing.assert_close(full, want.expand_as(full), atol=2e-5 * max(1.0, want.abs().max().item()),
                                   rtol=1e-3, msg=lambda m: f"{name}: {m}")
    head = family.plain.get_output_embeddings().weight
    assert head.grad.abs().max() > 0
    family.policy.zero_grad()


def test_a_batch_without_any_response_gives_zero_gradients(family):
    """A rank that has nothing to train still runs forward and backward: FSDP's collectives must match."""
    inputs, mask = sft.collate([], family.prompts["image"], 0, CPU)
    family.policy.zero_grad()
    loss = family.policy.token_logprobs(inputs, mask).sum()
    loss.backward()
    grads = [p.grad.full_tensor() for p in family.policy.parameters() if p.grad is not None]
    assert loss == 0 and grads and all((g == 0).all() for g in grads)
    family.policy.zero_grad()


# ----- banned ids


def test_probabilities_sum_to_one_without_the_banned_ids(family):
    vocab, prompt = family.plain.get_output_embeddings().weight.shape[0], family.prompts["text"]
    allowed = [i for i in range(vocab) if i not in family.policy.banned.tolist()]
    with torch.no_grad():
        logps = torch.cat(scored(family, [(prompt, [i]) for i in allowed]))
    assert logps.exp().sum().item() == pytest.approx(1, abs=1e-4)


def test_placeholder_ids_are_banned_and_have_no_probability(family):
    tok = family.processor.tokenizer
    written = {"idefics3": "<image>", "gemma3": "<image_soft_token>"}
    placeholder = tok.convert_tokens_to_ids(written.get(family.name, "<|image_pad|>"))
    assert (family.prompts["image"]["input_ids"] == placeholder).sum() > 3
    assert placeholder in family.policy.banned.tolist()
    hidden, head = torch.randn(3, 8), torch.randn(20, 8)
    banned, targets = torch.tensor([4, 11]), torch.tensor([4, 3, 11])
    logps, _ = sft.ResponseLogprob.apply(hidden, head, targets, sft.Head(), 1.0, banned)
    assert logps.tolist()[::2] == [-torch.inf] * 2 and logps[1].isfinite()


# ----- padding and companions


@pytest.mark.parametrize("pad_id", [1, 7, 250])
def test_pad_id_does_not_matter(family, pad_id):
    rows = list(zip(family.prompts.values(), responses(family, 5)))
    with torch.no_grad():
        close(scored(family, rows, pad_id=pad_id), scored(family, rows), 1e-6)


def test_garbage_in_padding_changes_nothing(family):
    rows = list(zip(family.prompts.values(), responses(family, 5)))
    inputs, mask = sft.collate(rows, None, 0, CPU)
    padding = inputs["attention_mask"] == 0
    garbage = torch.randint(0, 250, inputs["input_ids"].shape, generator=torch.Generator().manual_seed(0))
    dirty = inputs | {"input_ids": torch.where(padding, garbage, inputs["input_ids"])}
    assert padding.any() and (dirty["input_ids"] != inputs["input_ids"]).any()
    with torch.no_grad():
        close([family.policy.token_logprobs(dirty, mask)], [family.policy.token_logprobs(inputs, mask)], 1e-6)


@pytest.mark.parametrize("names", [
    ("text", "long text"), ("text", "image"), ("image", "text"), ("wide image", "image"),
    ("two images", "text", "image"), ("long text", "two images", "wide image", "text", "image", "two images"),
], ids=", ".join)
def test_ragged_rows_equal_one_row_at_a_time(family, names):
    rows = [(family.prompts[name], r) for name, r in zip(names, responses(family, len(names), seed=2))]
    with torch.no_grad():
        close(scored(family, rows), [part for row in rows for part in scored(family, [row])])


def test_an_empty_response_among_others(family):
    first, second = responses(family, 2)
    rows = [(family.prompts["image"], first),
            (family.prompts["two images"], []),
            (family.prompts["text"], second)]
    with torch.no_grad():
        got = scored(family, rows)
        assert len(got[1]) == 0
        close([got[0], got[2]], [*scored(family, rows[:1]), *scored(family, rows[2:])])


def test_images_and_their_order_matter(family):
    """Guards the tests above: a model that ignored pixels would pass them."""
    prompt, (response,) = family.prompts["image"], responses(family, 1)
    blank = prompt | {"pixel_values": prompt["pixel_values"].flip(-1) * 0.5}
    with torch.no_grad():
        a, b = torch.cat(scored(family, [(prompt, response)])), torch.cat(scored(family, [(blank, response)]))
    assert (a - b).abs().max() > 1e-3


# ----- collate alone


def test_collate_layout():
    long = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    short = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
    inputs, mask = sft.collate([(long, [8]), (short, [8, 9, 4])], None, 1, CPU)
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 8, 1], [5, 6, 8, 9, 4]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1] * 5]
    assert mask.tolist() == [[False, False, True, False], [False, True, True, True]]
    assert inputs["input_ids"][:, 1:][mask].tolist() == [8, 8, 9, 4]


def test_collate_aligns_a_key_that_the_first_row_lacks():
    ids = [torch.tensor([[5, 6, 7]]), torch.tensor([[5, 6, 7, 8]])]
    rows = [({"input_ids": ids[0]}, [9]),
            ({"input_ids": ids[1], "token_type_ids": torch.tensor([[0, 1, 1, 0]])}, [9])]
    inputs, _ = sft.collate(rows, None, 0, CPU)
    assert inputs["token_type_ids"].tolist() == [[0] * 5, [0, 1, 1, 0, 0]]


def test_collate_adds_the_dummy_only_to_batches_without_images(family):
    text, image = family.prompts["text"], family.prompts["image"]
    for rows, more in (([(text, [1])], 1), ([(image, [1])], 0), ([(text, [1]), (image, [2])], 0), ([], 1)):
        inputs, mask = sft.collate(rows, image, 0, CPU)
        assert len(inputs["input_ids"]) == len(rows) + more and "pixel_values" in inputs
        assert mask.sum() == len(rows)


# ----- chunks


def fake_policy(hidden, head, banned=()):
    """What token_logprobs needs of a model: a body that returns `hidden` and an output head."""
    matrix = SimpleNamespace(weight=head)
    matrix.logprobs = functools.partial(sft.head_logprobs, matrix)
    return SimpleNamespace(model=lambda **_: SimpleNamespace(last_hidden_state=hidden),
                           banned=torch.tensor(banned, dtype=torch.long), head=sft.Head(),
                           get_output_embeddings=lambda: matrix)


@pytest.mark.parametrize("tokens", [32, 48])
def test_chunk_boundaries(tokens):
    """A vocabulary of 2^20 leaves 32 positions to a chunk: one exactly, one and a half."""
    vocab, generator = 2**20, torch.Generator().manual_seed(0)
    chunks = sft.ResponseLogprob.chunks(torch.zeros(33, 1), torch.zeros(vocab, 1), sft.Head(), 1.0, [])
    assert [rows.stop - rows.start for rows, _ in chunks] == [32, 32]
    hidden = torch.randn(1, tokens + 1, 16, generator=generator)
    head = torch.randn(vocab, 16, generator=generator) / 4
    ids, banned = torch.randint(0, vocab, (1, tokens + 1), generator=generator), [3, 77]
    weights = torch.randn(tokens, generator=generator)
    leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    logps = sft.token_logprobs(fake_policy(*leaves, banned), {"input_ids": ids},
                                torch.ones(1, tokens, dtype=torch.bool), 0.5)
    (logps[0] * weights).sum().backward()
    exact = head.double()  # fp32 log_softmax loses 1e-4 over so many ids
    some, d_some = torch.tensor([*range(500), *ids[0].tolist()]).unique(), 0.0
    for t in range(tokens):
        logits = (exact @ hidden[0, t].double() / 0.5).index_fill(0, torch.tensor(banned), -torch.inf)
        row = logits.log_softmax(0)
        torch.testing.assert_close(logps[0, t].double(), row[ids[0, t + 1]], atol=1e-5, rtol=0)
        slope = -row.exp() * weights[t] / 0.5
        slope[ids[0, t + 1]] += weights[t] / 0.5
        d_some = d_some + slope[some, None] * hidden[0, t].double()
        if t in (0, 31, 32, tokens - 1):
            torch.testing.assert_close(leaves[0].grad[0, t].double(), slope @ exact, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(leaves[1].grad[some].double(), d_some, atol=1e-5, rtol=1e-4)


def test_frozen_head_gets_no_gradient():
    hidden, head = torch.randn(1, 4, 3, requires_grad=True), torch.randn(9, 3)
    sft.token_logprobs(fake_policy(hidden, head), {"input_ids": torch.arange(4)[None]},
                        torch.ones(1, 3, dtype=torch.bool)).sum().backward()
    assert head.grad is None and hidden.grad[:, :3].abs().sum() > 0 and (hidden.grad[:, 3] == 0).all()
