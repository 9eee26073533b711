"""generate against transformers' own, token_logprobs, its batch and the softmax; every model family."""
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import RECORDS
from safetensors.torch import load_file
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

import data_prep
import sft
import eval as evaluation
import grpo

CPU = torch.device("cpu")
CFG = grpo.Config(max_new_tokens=10, temperature=1.0)
GREEDY = dataclasses.replace(CFG, temperature=0.0)
NONE = torch.tensor([], dtype=torch.long)
# What transformers is about to drop must not be in use here.
pytestmark = [pytest.mark.filterwarnings("error::FutureWarning"),
              pytest.mark.filterwarnings("error::DeprecationWarning")]


@pytest.fixture
def stops(family):
    """Many stop tokens, so that random models end their responses at different lengths."""
    usual, family.engine.stop = family.engine.stop, [family.engine.stop[0], *range(0, 250, 8)]
    yield family.engine.stop
    family.engine.stop = usual


def transformers_greedy(family, prompt, stop):
    """Response ids of model.generate with the same banned ids, one row."""
    family.plain.model.rope_deltas = None
    out = family.plain.generate(**prompt, do_sample=False, max_new_tokens=CFG.max_new_tokens,
                                eos_token_id=stop, pad_token_id=stop[0],
                                suppress_tokens=family.engine.banned.tolist())
    return out[0, prompt["input_ids"].shape[1]:].tolist()


def teacher_forced(policy, family, rows, temperature=1.0):
    """token_logprobs of (prompt, response) rows, split by row."""
    with torch.no_grad():
        inputs, mask = sft.collate(rows, family.prompts["image"], 0, CPU)
        return policy.token_logprobs(inputs, mask, temperature)[mask].split([len(r) for _, r in rows])


def agree(samples, logps, tolerance=1e-4):
    torch.testing.assert_close(torch.cat([s[1] for s in samples]), torch.cat(list(logps)),
                               atol=tolerance, rtol=0)


def sampling(**options):
    """What sampler_logprobs reads of a Config."""
    return SimpleNamespace(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0, **options})


def same(a, b):
    """Equal tokens and flags, equal logprobs up to rounding."""
    assert [(ids, cut) for ids, _, cut in a] == [(ids, cut) for ids, _, cut in b]
    agree(a, [logps for _, logps, _ in b], 1e-5)


# ----- against transformers


@pytest.mark.parametrize("many_stops", [False, True])
def test_greedy_equals_transformers(family, request, many_stops):
    stop = request.getfixturevalue("stops") if many_stops else family.engine.stop
    got = evaluation.generate(family.engine, [*family.prompts.values()], [0] * 5, GREEDY)
    expected = [transformers_greedy(family, p, stop) for p in family.prompts.values()]
    assert [ids for ids, _, _ in got] == expected
    assert [cut for _, _, cut in got] == [ids[-1] not in stop for ids, _, _ in got]


# ----- against the trainer


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_equal_teacher_forcing(family, stops, temperature):
    prompts = [p for p in family.prompts.values() for _ in range(4)]
    samples = evaluation.generate(family.engine, prompts, range(len(prompts)),
                            dataclasses.replace(CFG, temperature=temperature))
    lengths = {len(ids) for ids, _, _ in samples}
    assert len(lengths) > 3 and any(cut for _, _, cut in samples) and not all(cut for _, _, cut in samples)
    rows = [(p, ids) for p, (ids, _, _) in zip(prompts, samples)]
    agree(samples, teacher_forced(family.policy, family, rows, temperature))


def test_greedy_logprobs_are_those_of_the_unscaled_policy(family):
    prompts = [*family.prompts.values()]
    samples = evaluation.generate(family.engine, prompts, [0] * 5, GREEDY)
    rows = [(p, ids) for p, (ids, _, _) in zip(prompts, samples)]
    agree(samples, teacher_forced(family.policy, family, rows))


@pytest.mark.parametrize("train", ["all", "language"])
def test_sync_makes_the_engine_equal_to_the_policy(family, train):
    cfg = dataclasses.replace(CFG, freeze_vision=train == "language", lr=0.02)
    policy, processor = sft.load_policy(family.path, cfg, CPU)
    engine = evaluation.build_engine(family.path, processor, cfg, CPU)
    prompts = [*family.prompts.values()]
    before = evaluation.generate(engine, prompts, range(5), cfg)
    optimizer = sft.make_optimizer(policy, cfg)
    rows = [(p, ids) for p, (ids, _, _) in zip(prompts, before)]
    inputs, mask = sft.collate(rows, None, 0, CPU)
    policy.token_logprobs(inputs, mask).sum().backward()
    optimizer.step()
    moved = torch.cat(teacher_forced(policy, family, rows)) - torch.cat([s[1] for s in before])
    assert moved.abs().max() > 0.01
    for _ in range(2):
        grpo.sync_weights(policy, engine)
    after = evaluation.generate(engine, prompts, range(5), cfg)
    agree(after, teacher_forced(policy, family, [(p, ids) for p, (ids, _, _) in zip(prompts, after)]))
    mine = dict(engine.named_parameters())
    for name, p in policy.named_parameters():
        assert torch.equal(mine[name], p.full_tensor() if hasattr(p, "full_tensor") else p), name


def test_sync_leaves_no_graph_behind(family):
    """An engine weight that remembers where it was copied from keeps every earlier copy's graph alive."""
    policy, processor = sft.load_policy(family.path, CFG, CPU)
    engine = evaluation.build_engine(family.path, processor, CFG, CPU)
    grpo.sync_weights(policy, engine)
    assert not any(p.requires_grad for p in engine.parameters())


# ----- a rollout depends on nothing but its prompt and seed


@pytest.mark.parametrize("rollout_tokens", [1, 150, 400, 10**6])
def test_rollouts_do_not_depend_on_rollout_tokens(family, stops, rollout_tokens):
    prompts = [p for p in family.prompts.values() for _ in range(3)]
    cfg = dataclasses.replace(CFG, rollout_tokens=rollout_tokens)
    same(evaluation.generate(family.engine, prompts, range(15), cfg),
         evaluation.generate(family.engine, prompts, range(15), CFG))


def test_rollouts_do_not_depend_on_companions_order_or_object_identity(family, stops):
    prompts, seeds = [p for p in family.prompts.values() for _ in range(2)], [*range(10)]
    together = evaluation.generate(family.engine, prompts, seeds, CFG)
    same([evaluation.generate(family.engine, [p], [s], CFG)[0] for p, s in zip(prompts, seeds)], together)
    same(evaluation.generate(family.engine, prompts[::-1], seeds[::-1], CFG)[::-1], together)
    same(evaluation.generate(family.engine, [dict(p) for p in prompts], seeds, CFG), together)


def test_same_seed_same_rollout_other_seed_another(family):
    prompt = family.prompts["image"]
    ids = [tuple(s[0]) for s in evaluation.generate(family.engine, [prompt] * 16, [*range(8)] * 2, CFG)]
    assert ids[:8] == ids[8:] and len(set(ids[:8])) == 8


def test_rollout_seeds_are_distinct_and_fixed():
    cfg = grpo.Config(seed=1)
    keys = [(c, s, q, g) for c in (cfg, grpo.Config(seed=2))
            for s in (1, 2) for q in range(20) for g in range(8)]
    seeds = [grpo.rollout_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys) and seeds == [grpo.rollout_seed(*key) for key in keys]
    assert all(0 <= s < 2**63 for s in seeds)


def test_no_prompts():
    engine = torch.nn.Identity()
    engine.banned, engine.stop = torch.tensor([1]), [0]
    assert evaluation.generate(engine, [], [], CFG) == []


# ----- sampling


@pytest.mark.parametrize("name", ["text", "two images"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_follow_the_softmax(family, name, temperature):
    """Chi-square of 4,000 first tokens; bins of fewer than 5 expected draws are merged."""
    prompt, n = family.prompts[name], 4000
    cfg = dataclasses.replace(CFG, temperature=temperature, max_new_tokens=1, rollout_tokens=10**7)
    counts = Counter(ids[0] for ids, _, _ in evaluation.generate(family.engine, [prompt] * n, range(n), cfg))
    family.plain.model.rope_deltas = None
    with torch.no_grad():
        logits = family.plain(**prompt).logits[0, -1] / temperature
    expected = n * logits.index_fill(0, family.engine.banned, -torch.inf).double().softmax(0)
    rare = expected < 5
    pairs = [(counts[i], expected[i].item()) for i in (~rare).nonzero()[:, 0].tolist()]
    pairs.append((sum(counts[i] for i in rare.nonzero()[:, 0].tolist()), expected[rare].sum().item() + 1e-9))
    assert len(pairs) > 5 and sum(seen for seen, _ in pairs) == n
    chi, freedom = sum((seen - want) ** 2 / want for seen, want in pairs if want > 1e-6), len(pairs) - 1
    assert chi < freedom + 4 * math.sqrt(2 * freedom) + 4


def test_top_k_1_is_greedy(family):
    prompts = [*family.prompts.values()]
    got = evaluation.generate(family.engine, prompts, range(5), dataclasses.replace(CFG, top_k=1))
    greedy = evaluation.generate(family.engine, prompts, [0] * 5, GREEDY)
    assert [ids for ids, _, _ in got] == [ids for ids, _, _ in greedy]
    assert all((logps == 0).all() for _, logps, _ in got)


def test_a_draw_of_exactly_zero_does_not_pick_a_banned_first_id(family, monkeypatch):
    monkeypatch.setattr(family.engine, "banned", torch.tensor([0, 1]))
    monkeypatch.setattr(torch, "rand", lambda *size, generator=None, **kind: torch.zeros(*size, **kind))
    (ids, logps, _), = evaluation.generate(family.engine, [family.prompts["text"]], [0], CFG)
    assert set(ids) == {2} and logps.isfinite().all()


@pytest.mark.parametrize("top_k, top_p", [(0, 0.5), (3, 1.0), (20, 0.6)])
def test_truncated_sampling_stays_inside_and_renormalises(family, top_k, top_p):
    prompt, n = family.prompts["image"], 200
    cfg = dataclasses.replace(CFG, max_new_tokens=1, top_k=top_k, top_p=top_p)
    family.plain.model.rope_deltas = None
    with torch.no_grad():
        logits = family.plain(**prompt).logits[0, -1].index_fill(0, family.engine.banned, -torch.inf)
    ranked = sorted(enumerate(logits.softmax(0).tolist()), key=lambda pair: -pair[1])[:top_k or None]
    kept, total = {}, sum(p for _, p in ranked)
    for i, p in ranked:
        if sum(kept.values()) < top_p * total:
            kept[i] = p
    samples = evaluation.generate(family.engine, [prompt] * n, range(n), cfg)
    assert 1 < len({ids[0] for ids, _, _ in samples}) and {ids[0] for ids, _, _ in samples} <= kept.keys()
    for ids, logps, _ in samples:
        assert logps.item() == pytest.approx(math.log(kept[ids[0]] / sum(kept.values())), abs=1e-4)


@pytest.mark.parametrize("top_k, top_p, kept", [
    (0, 1.0, [0, 1, 2, 3]), (0, 0.5, [1]), (0, 0.51, [1, 3]), (0, 0.79, [1, 3]), (0, 0.81, [1, 2, 3]),
    (0, 0.96, [0, 1, 2, 3]), (0, 1e-9, [1]),
    (1, 1.0, [1]), (2, 1.0, [1, 3]), (4, 1.0, [0, 1, 2, 3]), (50, 1.0, [0, 1, 2, 3]),
    (2, 0.6, [1]), (2, 0.63, [1, 3]), (3, 0.5, [1]), (3, 0.53, [1, 3])])
def test_truncate_table(top_k, top_p, kept):
    """Probabilities .05 .5 .15 .3; the nucleus is taken of what top-k left, renormalised."""
    probs = torch.tensor([[0.05, 0.5, 0.15, 0.3]])
    logprobs = evaluation.sampler_logprobs(probs.log(), NONE, sampling(top_k=top_k, top_p=top_p))
    assert logprobs.isfinite()[0].nonzero()[:, 0].tolist() == kept
    torch.testing.assert_close(logprobs[0, kept].exp(), probs[0, kept] / probs[0, kept].sum())


def kept_by_definition(logits, top_k, top_p):
    """Slow reference of one row: ids by rank, the first top_k,
    of those the nucleus with the one that crosses it.
    """
    ranked = logits.sort(descending=True)
    values, order = ranked.values.double(), ranked.indices.tolist()
    if top_k:  # whatever is as likely as the last of them stays too
        order = [i for i, value in zip(order, values.tolist()) if value >= values[min(top_k, len(order)) - 1]]
    probs = logits.double()[order].softmax(0).tolist()
    kept, before = [], 0.0
    for i, p in zip(order, probs):
        if before < top_p:
            kept.append(i)
        before += p
    return kept


@pytest.mark.parametrize("top_k, top_p", [
    (0, 0.5), (0, 0.9), (0, 0.999), (0, 1e-6), (5, 1.0), (5, 0.7), (1000, 0.8)])
@pytest.mark.parametrize("ties", [False, True])
def test_truncation_is_by_definition(top_k, top_p, ties):
    """As many tokens, of the same probabilities; which of equal ones is cut is anyone's choice."""
    logits = 3 * torch.randn(200, 300, generator=torch.Generator().manual_seed(top_k))
    if ties:
        logits = logits.round()
    got = evaluation.sampler_logprobs(logits, NONE, sampling(top_k=top_k, top_p=top_p))
    for row, cut in zip(logits, got):
        expected = kept_by_definition(row, top_k, top_p)
        mine = cut.isfinite().nonzero()[:, 0]
        assert torch.equal(row[mine].sort().values, row[expected].sort().values)
        assert ties or set(mine.tolist()) == set(expected)
        torch.testing.assert_close(cut[mine], row[mine].log_softmax(0))


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (0, 0.5), (3, 1.0), (3, 0.6), (50, 0.9)])
def test_the_temperature_comes_before_the_cut_and_banned_ids_take_no_place(top_k, top_p):
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(1))
    banned = torch.tensor([0, 7])
    others = torch.tensor([i for i in range(40) if i not in (0, 7)])
    got = evaluation.sampler_logprobs(logits, banned, sampling(temperature=0.5, top_k=top_k, top_p=top_p))
    alone = evaluation.sampler_logprobs(2 * logits[:, others], NONE, sampling(top_k=top_k, top_p=top_p))
    assert got[:, banned].isinf().all()
    torch.testing.assert_close(got[:, others], alone)


# ----- hostile checkpoints


def test_vision_tokens_are_never_sampled_however_large_their_logits(family):
    prompts = [p for p in family.prompts.values() for _ in range(2)]
    usual = [evaluation.generate(family.engine, prompts, range(10), cfg) for cfg in (CFG, GREEDY)]

    def favour(module, args, out):
        out.logits[..., family.engine.banned] += 1e4

    hook = family.engine.register_forward_hook(favour)
    try:
        shouted = [evaluation.generate(family.engine, prompts, range(10), cfg) for cfg in (CFG, GREEDY)]
    finally:
        hook.remove()
    for a, b in zip(shouted, usual):
        same(a, b)
        assert not {t for ids, _, _ in a for t in ids} & set(family.engine.banned.tolist())


def test_sampling_ignores_the_checkpoints_generation_config(family, tmp_path):
    """Qwen2-VL ships temperature 0.01, top_k 1 and a repetition penalty: a group of 8 would be 8 copies."""
    path = shutil.copytree(family.path, tmp_path / "model")
    shipped = json.loads((path / "generation_config.json").read_text())
    odd = dict(do_sample=True, temperature=0.01, top_k=1, top_p=0.001, repetition_penalty=1.5)
    (path / "generation_config.json").write_text(json.dumps(shipped | odd))
    engine = evaluation.build_engine(path, family.processor, CFG, CPU)
    assert engine.stop == family.engine.stop
    prompts = [family.prompts["image"]] * 8
    group = evaluation.generate(engine, prompts, range(8), CFG)
    same(group, evaluation.generate(family.engine, prompts, range(8), CFG))
    assert len({tuple(ids) for ids, _, _ in group}) > 4


# ----- the end of a response


def test_first_stop_token_is_what_the_template_writes(family):
    ends = {"idefics3": "<end_of_utterance>", "gemma3": "<end_of_turn>"}
    end = ends.get(family.name, "<|im_end|>")
    assert family.engine.stop[0] == family.processor.tokenizer.convert_tokens_to_ids(end)


@pytest.mark.parametrize("known, more", [(None, []), (7, [7]), ([7], [7]), ([7, 9], [7, 9]), ([], [])])
def test_stop_ids_also_hold_the_checkpoints_own(family, known, more):
    tok = family.processor.tokenizer
    expected = [tok.eos_token_id, *more]  # in these families the tokenizer's own is what the template writes
    assert sft.stop_ids(SimpleNamespace(eos_token_id=known), family.processor) == expected
    again = sft.stop_ids(SimpleNamespace(eos_token_id=[tok.eos_token_id, *more]), family.processor)
    assert again == expected


@pytest.mark.parametrize("tail", ["", " ", "\n"])
def test_ordinary_text_after_a_turn_is_no_stop_token(family, tail):
    """LLaVA-1.5's template writes a space after a turn: as a stop token it would end responses at a space."""
    def template(turns, **_):
        return "".join(t["content"][0]["text"] + tail for t in turns)

    tok = family.processor.tokenizer
    processor = SimpleNamespace(tokenizer=tok, apply_chat_template=template)
    assert sft.stop_ids(SimpleNamespace(eos_token_id=None), processor) == [tok.eos_token_id]


def test_a_response_ends_with_its_only_stop_token_or_is_truncated(family, stops):
    samples = evaluation.generate(family.engine, [family.prompts["image"]] * 32, range(32), CFG)
    for ids, logps, cut in samples:
        assert len(ids) == len(logps) <= CFG.max_new_tokens and not set(ids[:-1]) & set(stops)
        assert cut == (ids[-1] not in stops) and (len(ids) == CFG.max_new_tokens or not cut)
    assert {cut for _, _, cut in samples} == {True, False}


# ----- servers, without one


@pytest.fixture
def server(group, family, tmp_path, monkeypatch):
    """A Server whose two vLLMs answer from `replies`, and what was sent to them."""
    sent = []

    def call(self, url, route, body=None, until=None, read=None):
        sent.append((url, route, body))
        if route == "/v1/models":
            return "served"
        if route != "/v1/chat/completions":
            return None
        choices = [{"token_ids": [5, 6 + k], "finish_reason": ("stop", "length")[k],
                    "logprobs": {"content": [{"logprob": -0.5}, {"logprob": -1.0 - k}]}}
                   for k in range(body["n"])]
        return read({"prompt_token_ids": ids_of[json.dumps(body["messages"])], "choices": choices})

    ids_of = {}
    monkeypatch.setattr(evaluation.Server, "call", call)
    cfg = dataclasses.replace(CFG, servers=("http://a", "http://b"), out=str(tmp_path / "run"))
    return SimpleNamespace(engine=evaluation.Server(family.path, family.processor, torch.float32, cfg),
                           sent=sent, ids_of=ids_of)


def test_a_server_is_asked_once_for_all_samples_of_a_prompt(server, family):
    prompts = [sft.encode_prompt(question, family.processor, 10**6) for question in RECORDS.values()][:3]
    for prompt in prompts:
        messages = data_prep.chat_messages(prompt["request"]["messages"], prompt["request"]["images"])
        server.ids_of[json.dumps(messages)] = prompt["input_ids"][0].tolist()
    rows = [prompts[0], prompts[2], prompts[0], prompts[1]]
    got = evaluation.generate(server.engine, rows, [7, 8, 9, 10], CFG)
    assert [s.ids for s in got] == [[5, 6], [5, 6], [5, 7], [5, 6]]
    assert [s.truncated for s in got] == [False, False, True, False]
    assert [s.logprobs.tolist() for s in got] == [[-0.5, -1.0], [-0.5, -1.0], [-0.5, -2.0], [-0.5, -1.0]]
    bodies = [body for _, route, body in server.sent if route == "/v1/chat/completions"]
    asked = [body | {"messages": None} for body in bodies]
    assert sorted((body["n"], body["seed"]) for body in asked) == [(1, 8), (1, 10), (2, 7)]
    banned = {str(token): -100.0 for token in server.engine.banned.tolist()}
    for body in json.loads(json.dumps(asked)):  # as it is sent
        assert body["logprobs"] is True and body["return_token_ids"] is True and body["model"] == "served"
        assert body["max_tokens"] == CFG.max_new_tokens and body["stop_token_ids"] == server.engine.stop
        assert body["logit_bias"] == banned and (
            body["temperature"], body["top_p"], body["top_k"]) == (1.0, 1.0, 0)


def test_a_server_that_reads_a_prompt_otherwise_is_an_error(server, family):
    prompt = sft.encode_prompt(RECORDS["text"], family.processor, 10**6)
    messages = data_prep.chat_messages(prompt["request"]["messages"], [])
    server.ids_of[json.dumps(messages)] = [1, 2, 3]
    with pytest.raises(ValueError, match="reads a prompt as 3 tokens, the trainer as .*: "
                                         "their processors differ"):
        evaluation.generate(server.engine, [prompt], [0], CFG)


def test_servers_load_weights_in_files_and_forget_what_they_cached(server):
    class Large:  # says it has 3 GiB
        nbytes = 3 * 2**30

        def __init__(self, value):
            self.value = value

        def cpu(self):
            return torch.tensor([self.value])

    folder = server.engine.folder
    for names in ("abcde", "fg"):  # the second time nothing of the first is left
        del server.sent[:]
        server.engine.reload((name, Large(float(i))) for i, name in enumerate(names))
        files = sorted(folder.iterdir())
        assert [sorted(load_file(path)) for path in files] == (
            [["a", "b"], ["c", "d"], ["e"]] if names == "abcde" else [["f", "g"]])
        assert {k: v.item() for path in files for k, v in load_file(path).items()} == {
            name: i for i, name in enumerate(names)}
        for url in ("http://a", "http://b"):
            mine = [(route, body) for to, route, body in server.sent if to == url]
            assert [route for route, _ in mine] == ["/collective_rpc", "/reset_prefix_cache",
                                                    "/reset_mm_cache", "/reset_encoder_cache"]
            assert mine[0][1] == {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}


# ----- transformers moves on

RL = ["--steps", "1", "--prompts_per_step", "2", "--group_size", "2", "--max_new_tokens", "4",
      "--eval_n", "2", "--workers", "0"]


@pytest.mark.parametrize("command", [
    ["sft.py", "--steps", "1", "--batch_size", "2", "--eval_n", "2", "--workers", "0"], ["grpo.py", *RL],
    ["grpo.py", *RL, "--top_k", "5", "--top_p", "0.9", "--kl_beta", "0.1"], ["rise.py", *RL],
    ["eval.py", "--bench", "counting-id", "--limit", "2", "--max_new_tokens", "4"]],
    ids=["sft", "grpo", "grpo more", "rise", "eval"])
def test_no_stage_uses_what_goes_away(command, tiny, tmp_path):
    """Not as a Python warning, which is an error here, and not as a line in the log."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mini").symlink_to(tiny.mini)
    script = Path(evaluation.__file__).with_name(command[0])
    done = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", script, "--model", tiny.model, *command[1:]],
        text=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)
    assert done.returncode == 0 and "deprecated" not in done.stdout, done.stdout[-3000:]


class CountsOnly(torch.nn.Module):
    """Like Kimi K2.5: images come with a grid, positions count tokens all the same (no rope_deltas)."""

    def __init__(self):
        super().__init__()
        self.model = torch.nn.Module()
        self.stop = [0]

    def forward(self, position_ids=None, past_key_values=None, **inputs):
        self.positions = position_ids
        cache = DynamicCache()
        cache.update(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4), 0)
        return CausalLMOutputWithPast(logits=torch.zeros(1, 1, 8), past_key_values=cache)


def test_a_grid_does_not_mean_that_positions_are_of_images():
    engine = CountsOnly()
    prompt = {"input_ids": torch.tensor([[4, 5, 6]]), "attention_mask": torch.ones(1, 3, dtype=torch.long),
              "pixel_values": torch.zeros(4, 12), "image_grid_thw": torch.tensor([[1, 2, 2]])}
    _, _, shift, _ = evaluation.prefill(engine, [prompt], torch.tensor([0, 0]))
    assert shift is None and engine.positions.tolist() == [[0, 1, 2]]


def test_a_cache_layer_with_room_holds_what_the_usual_one_does(monkeypatch):
    monkeypatch.setattr(evaluation.RoomyLayer, "ROOM", 3)
    usual, roomy = DynamicLayer(), DynamicLayer()
    first = torch.randn(2, 4, 1, 5, 8)
    for layer in (usual, roomy):
        layer.update(*first)
    roomy.__class__ = evaluation.RoomyLayer
    for step in range(12):  # further than the room, and rows leave on the way
        if step in (0, 5):
            rows = torch.tensor([3, 0, 1] if step == 0 else [2, 0])
            usual.reorder_cache(rows)
            roomy.reorder_cache(rows)
        new = torch.randn(2, len(usual.keys), 1, 1 + step % 2, 8)
        for mine, theirs in zip(roomy.update(*new), usual.update(*new)):
            assert torch.equal(mine, theirs)
