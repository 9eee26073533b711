"""RISE: what hop 2 may see, which tokens are graded, what is kept of a rationale and what is exported."""
import dataclasses
import json
import random
import shutil
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import data_prep
import rewards
import eval as evaluation
import sft
import grpo
import rise
from conftest import RECORDS
from test_stages import close, metrics, newest, run, weights

CPU = torch.device("cpu")
PLACES = {"upper left": [0, 0, 500, 500], "upper right": [500, 0, 1000, 500],
          "lower left": [0, 500, 500, 1000], "lower right": [500, 500, 1000, 1000]}
FLAGS = ["--eval_data", "world/test.jsonl", "--eval_n", "4", "--eval_every", "9", "--prompts_per_step", "4",
         "--group_size", "4", "--max_new_tokens", "24", "--warmup", "1", "--token_budget", "1024"]
RISE = ["rise.py", "--model", "warm", "--data", "world/train.jsonl", *FLAGS]


def sun(i, image):
    """A record of the small world: the sun stands in one of four quarters, the picture does not show it."""
    return {"id": f"sun-{i}", "question": "Where is the sun?", "images": [image],
            "answer": json.dumps([[*PLACES.values()][i % 4]]), "answer_type": "boxes",
            "meta": {"target": "sun"}}


def lessons(record, rng):
    """SFT rows for both hops: half of the rationales tell the place, the others do not."""
    place = [*PLACES][int(record["id"].split("-")[1]) % 4]
    told = rng.random() < 0.5
    rationale = f"the {place} quarter is bright" if told else "there is light in the sky"
    guess = record["answer"] if told else json.dumps([rng.choice([*PLACES.values()])])
    for question, response in (
            (rewards.cot_prompt(record), rationale),
            (rewards.reconstruct_prompt(record, rationale), f"<answer> {guess} </answer>")):
        yield {"id": str(rng.random()), "question": question, "images": record["images"],
               "answer_type": "text", "task": "plain", "response": response}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The small world, and a model that learnt in seconds to talk about it: {root}/world, {root}/warm."""
    root, rng = tmp_path_factory.mktemp("rise"), random.Random(0)
    (root / "world").mkdir()
    images = [root / "world" / f"{k}.png" for k in range(16)]
    for k, image in enumerate(images):
        Image.new("RGB", (28, 28), (16 * k, 80, 80)).save(image)
    records = [sun(i, str(images[i % 16])) for i in range(16)]
    rows = [row for _ in range(30) for record in records for row in lessons(record, rng)]
    for name, kept in (("train", records[:12]), ("test", records[12:]), ("lessons", rows)):
        data_prep.write_records(root / "world" / f"{name}.jsonl", kept)
    texts = [text for row in rows for text in (row["question"], row["response"])]
    data_prep.make_tiny(root / "tiny", [*texts, *map(rewards.build_prompt, records)], 0)
    run(root, "sft.py", "--model", "tiny", "--data", "world/lessons.jsonl", "--steps", "100", "--lr", "5e-3",
        "--batch_size", "16", "--warmup", "10", "--out", "warm")
    return root


@pytest.fixture
def work(world, tmp_path):
    """A folder to run in, with the small world."""
    for name in ("world", "warm", "tiny"):
        shutil.copytree(world / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def stage(world, group):
    """Engine, processor and records of the small world, in this process."""
    cfg = rise.Config(group_size=3, max_new_tokens=24, workers=0)
    path = str(data_prep.newest_step(world / "warm"))
    records = data_prep.read_records(world / "world/train.jsonl")
    processor = rise.AutoProcessor.from_pretrained(path)
    return SimpleNamespace(cfg=cfg, processor=processor, records=records, path=path,
                           engine=evaluation.build_engine(path, processor, cfg, CPU))


def encoded(stage, questions, cfg=None):
    return {q: rise.encode_cot(stage.records[q], stage.processor, torch.float32, cfg or stage.cfg)
            for q in questions}


def hands(stage, cfg=None, count=0):
    """Workers, records and processor, as two_hops takes them."""
    encode = partial(rise.encode_hop, records=stage.records, processor=stage.processor, dtype=torch.float32,
                     cfg=cfg or stage.cfg)
    return sft.Workers(encode, count), stage.records, stage.processor


def fake_generate(monkeypatch, processor, write):
    """Replace generate: `write(prompt text, how many the same prompt had before)` is each response."""
    calls = []

    def generate(engine, prompts, seeds, cfg):
        calls.append((prompts, seeds))
        out, count = [], Counter()
        for prompt in prompts:
            text = processor.tokenizer.decode(prompt["request"]["ids"])
            ids = processor.tokenizer(write(text, count[text]), add_special_tokens=False)["input_ids"]
            ids = ids + [processor.tokenizer.eos_token_id]
            count[text] += 1
            out.append((ids, -torch.ones(len(ids)), False))
        return out

    monkeypatch.setattr(grpo, "generate", generate)
    return calls


def rationales(folder):
    return [json.loads(line) for line in (folder / "rationales.jsonl").read_text().splitlines()]


# ----- the two hops


@pytest.mark.parametrize("blind", [False, True])
@pytest.mark.parametrize("said", [
    "it stands at [[0, 0, 500, 500]] in the upper left", "bounded by (0, 0, 500, 500) there",
    "sky <image> <|image_pad|> <|im_end|> sky", "</think> <answer> [[0, 0, 500, 500]] </answer> sky"])
def test_hop_2_sees_the_scrubbed_rationale_and_never_the_annotation(stage, monkeypatch, said, blind):
    """Neither the gold, nor the problem that shows it, nor a placeholder that the policy spelled out."""
    cfg, prompts = dataclasses.replace(stage.cfg, blind=blind), encoded(stage, [0])
    fake_generate(monkeypatch, stage.processor, lambda text, n: said)
    cots, texts, backs = rise.two_hops(stage.engine, prompts, *hands(stage), 1, cfg)
    gold, first = stage.records[0]["answer"], rewards.cot_prompt(stage.records[0])
    assert gold in stage.processor.tokenizer.decode(prompts[0]["input_ids"][0])
    assert [cot.text for cot in cots] == [stage.processor.tokenizer.decode(cots[0].response,
                                                                           skip_special_tokens=True)] * 3
    for text, back in zip(texts, backs, strict=True):
        second = stage.processor.tokenizer.decode(prompts[back.question]["request"]["ids"])
        assert text in second and stage.records[0]["question"] in second
        assert gold not in second and "500, 500" not in second and first not in second
        assert second.count("<|image_pad|>") == (not blind) and second.count("<|im_end|>") == 1
        assert ("pixel_values" in prompts[back.question]) == (not blind)


def test_a_question_that_places_its_image_is_asked_blind_without_the_mark():
    record = {"answer_type": "boxes"}
    assert rise.hop(record, "<image> Where?", [])["question"] == " Where?"
    assert rise.hop(record, "<image> Where?", ["a.png"])["question"] == "<image> Where?"


def test_order_is_prompt_major(stage, monkeypatch):
    """B = 2, G = 3: each reconstruction reads its own rationale, behind its own question's image and text."""
    prompts = encoded(stage, [5, 2])
    golds = {stage.records[q]["answer"]: q for q in (5, 2)}

    def write(text, n):
        owner = [q for gold, q in golds.items() if gold in text]
        told = text.partition("wrote:\n")[2].split("\n")[0]
        return f"tag {'ab'[owner[0] == 2]} {'xyz'[n]}" if owner else told

    calls = fake_generate(monkeypatch, stage.processor, write)
    cots, texts, backs = rise.two_hops(stage.engine, prompts, *hands(stage), 1, stage.cfg)
    expected = [f"tag {q} {g}" for q in "ab" for g in "xyz"]
    assert texts == [cot.text for cot in cots] == [back.text for back in backs] == expected
    assert [cot.question for cot in cots] == [5, 5, 5, 2, 2, 2]
    assert [back.question for back in backs] == [(q, g) for q in (5, 2) for g in range(3)]
    assert [len(call) for call, _ in calls] == [6, 6] and len({s for _, seeds in calls for s in seeds}) == 12
    assert all(torch.equal(prompts[q, g]["pixel_values"], prompts[q]["pixel_values"]) for q, g in
               [back.question for back in backs])


def test_samples_differ_though_the_checkpoint_asks_for_greedy(world, stage, tmp_path):
    """Qwen2-VL ships a temperature of 0.01: what is sampled depends on the flags alone."""
    shutil.copytree(stage.path, tmp_path / "cold")
    path = tmp_path / "cold/generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {
        "temperature": 0.01, "top_p": 0.001, "top_k": 1, "do_sample": True, "repetition_penalty": 1.05}))
    cfg, drawn = dataclasses.replace(stage.cfg, group_size=8), []
    for folder in (stage.path, str(tmp_path / "cold")):
        engine = evaluation.build_engine(folder, stage.processor, cfg, CPU)
        hops = rise.two_hops(engine, encoded(stage, [0, 1]), *hands(stage), 1, cfg)
        drawn.append([rollout.text for rollouts in (hops[0], hops[2]) for rollout in rollouts])
    assert drawn[0] == drawn[1] and len(set(drawn[0][:8])) > 1
    greedy = dataclasses.replace(cfg, temperature=0.0)
    cots, _, _ = rise.two_hops(stage.engine, encoded(stage, [0]), *hands(stage), 1, greedy)
    assert len({cot.text for cot in cots}) == 1


def alike(a, b):
    """Whether two prompts of encode_prompt are the same in everything."""
    if a.keys() != b.keys() or a["request"].keys() != b["request"].keys():
        return False
    pictures = [[image.tobytes() for image in prompt["request"]["images"]] for prompt in (a, b)]
    said = [[prompt["request"]["ids"], prompt["request"]["messages"]] for prompt in (a, b)]
    same = [torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype
            for name in a if name != "request"]
    return all(same) and pictures[0] == pictures[1] and said[0] == said[1]


@pytest.mark.parametrize("blind", [False, True])
def test_hop_2_is_encoded_in_the_workers_and_sends_no_pixels(stage, monkeypatch, blind):
    """While the trainer waits with the others; every prompt is as encode_prompt makes it in one go."""
    cfg, prompts = dataclasses.replace(stage.cfg, blind=blind), encoded(stage, [0, 3])
    fake_generate(monkeypatch, stage.processor, lambda text, n: f"sky {'xyz'[n]}")
    workers, records, processor = hands(stage, cfg, count=2)
    with monkeypatch.context() as patch:
        patch.setattr(rise, "encode_prompt", lambda *_: pytest.fail("the trainer encodes"))
        _, texts, backs = rise.two_hops(stage.engine, prompts, workers, records, processor, 1, cfg)
    workers.close()
    for text, back in zip(texts, backs, strict=True):
        q, _ = back.question
        images = [] if blind else prompts[q]["request"]["images"]
        second = rise.hop(records[q], rewards.reconstruct_prompt(records[q], text), images)
        assert alike(prompts[back.question], sft.encode_prompt(second, processor, cfg.max_pixels))
        assert blind or prompts[back.question]["pixel_values"] is prompts[q]["pixel_values"]
    sent = rise.encode_reconstruction(records[0], images, texts[0], processor, cfg)
    assert "pixel_values" not in sent and "images" not in sent["request"]


@pytest.mark.parametrize("name", RECORDS)
def test_pixels_of_hop_1_are_those_of_hop_2(family, name):
    """For each family's processor: with no image, one and two, and however many words stand around them."""
    record, cfg = dict(RECORDS[name], answer="one"), rise.Config(max_pixels=10**6)
    first = rise.encode_cot(record, family.processor, torch.bfloat16, cfg)
    images = first["request"]["images"]
    sent = rise.encode_reconstruction(record, images, "red one two", family.processor, cfg)
    second = rise.hop(record, rewards.reconstruct_prompt(record, "red one two"), images)
    whole = sft.encode_prompt(second, family.processor, 10**6, dtype=torch.bfloat16)
    assert alike(rise.with_pixels(sent, first, blind=False), whole)


# ----- reward


def rollout(text, truncated=False, question=0):
    return grpo.Rollout(question, [1, 2], torch.zeros(2), truncated, text)


GOLD = "<answer> [[0, 0, 500, 500]] </answer>"


@pytest.mark.parametrize("cot, back, more, reward, agrees, parsed", [
    ("the upper left", GOLD, {}, 2.0, 1.0, True),
    ("the upper left", "<answer> [[0, 0, 500, 1000]] </answer>", {}, 1.5, 0.5, True),
    ("the upper left", "<answer> nowhere </answer>", {}, 1.0, 0.0, False),
    ("the upper left", "[[0, 0, 500, 500]]", {}, 0.0, 0.0, False),
    ("left of [0, 0, 500, 500]", GOLD, {}, 1.1, 1.0, True),
    ("left of [0, 0, 500, 500]", GOLD, {"leak_penalty": 0.5, "format_weight": 0.0}, 0.5, 1.0, True),
    ("the upper left", GOLD, {"format_weight": 0.25}, 1.25, 1.0, True),
    ("[0, 0, 500, 500]", GOLD, {}, 0.0, 1.0, True),  # nothing is left of it
    ("", GOLD, {}, 0.0, 1.0, True),
])
def test_reward(cot, back, more, reward, agrees, parsed):
    """agreement x leak penalty + format; nothing for a rationale that scrubbing empties."""
    record, cfg = sun(0, "x.png"), dataclasses.replace(rise.Config(), **more)
    got = rise.score_rationale(rollout(cot), rewards.scrub(cot, record), rollout(back), record, cfg)
    assert got["reward"] == pytest.approx(reward) and got["agreement"] == pytest.approx(agrees)
    assert got["parsed"] == parsed and bool(got["leaks"]) == ("[" in cot)


def test_a_rationale_that_was_cut_off_earns_nothing():
    got = rise.score_rationale(rollout("the upper left", True), "the upper left", rollout(GOLD),
                               sun(0, "x.png"), rise.Config())
    assert got["reward"] == 0 and got["agreement"] == 1 and got["truncated"]


MOOD = {"answer_type": "distribution", "answer": '{"joy": 0.6, "fear": 0.4}'}


@pytest.mark.parametrize("record, back, form, parsed", [
    (MOOD, '{"joy": 0.5, "fear": 0.3}', .818731, True),
    (MOOD, '{"joy": 7}', 0, False),
    (dict(answer_type="boxes", answer="[[1, 2, 3, 4]]", task="ground"), "[1, 2, 3, 4]", 1, True),
    (dict(answer_type="boxes", answer="[[1, 2, 3, 4]]", task="ground"), "[[1, 2, 3, 4]]", 0, True),
    (dict(answer_type="number", answer="4"), "4", 1, True),
])
def test_format_fits_the_answer(record, back, form, parsed):
    got = rise.score_rationale(rollout("bright"), "bright", rollout(f"<answer> {back} </answer>"), record,
                     rise.Config())
    assert got["format"] == pytest.approx(form, abs=1e-6) and got["parsed"] == parsed


# ----- which tokens are graded


@pytest.mark.parametrize("graded, cot, back", [("cot", 1, 0), ("reconstruction", 0, 1), ("both", 1, 1)])
def test_gradient_reaches_the_graded_segment_only(world, group, monkeypatch, tmp_path, graded, cot, back):
    """Which tokens have a gradient on their log-probability, seen while rise.main trains a step."""
    seen = Counter()

    def watched(policy, inputs, mask, temperature=1.0, with_entropy=False):
        if not with_entropy:  # it is update that asks for the entropy; the self-check does not
            return token_logprobs(policy, inputs, mask, temperature)
        logps, entropy = token_logprobs(policy, inputs, mask, temperature, with_entropy=True)
        texts = [processor.tokenizer.decode(row) for row in inputs["input_ids"]]

        def count(grad):
            for text, own, of_response in zip(texts, grad, mask):
                hop = "back" if "wrote:" in text else "cot"
                seen[hop] += int((own[of_response] != 0).sum())
                seen["elsewhere"] += int((own[~of_response] != 0).sum())
        logps.register_hook(count)
        return logps, entropy

    token_logprobs = sft.token_logprobs
    processor = rise.AutoProcessor.from_pretrained(data_prep.newest_step(world / "warm"))
    monkeypatch.setattr(sft, "token_logprobs", watched)
    rows = train(world, monkeypatch, tmp_path, "--steps", "1", "--graded", graded)
    assert (seen["cot"] > 0, seen["back"] > 0, seen["elsewhere"]) == (cot, back, 0)
    assert rows[-1]["tokens/train"] == seen["cot"] + seen["back"]


def train(world, monkeypatch, tmp_path, *flags):
    """rise.main in this process, whose process group it neither makes nor ends."""
    monkeypatch.setattr(rise, "init_distributed", lambda _: (0, 1, CPU))
    monkeypatch.setattr(rise.dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(rise, "catch_signals", lambda: [])
    monkeypatch.chdir(world)
    rise.main(rise.parse_config(rise.Config, [*RISE[1:], "--out", str(tmp_path / "run"), "--workers", "0",
                                              "--eval_data", "", *flags]))
    return metrics(tmp_path / "run")


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_reference_exists_only_with_a_kl_term(world, group, monkeypatch, tmp_path, beta):
    built, load = [], sft.load_policy

    def counted(path, cfg, device, trainable=True):
        built.append(trainable)
        return load(path, cfg, device, trainable)

    for stage in (sft, rise):  # open_run loads the policy, main the reference
        monkeypatch.setattr(stage, "load_policy", counted)
    rows = train(world, monkeypatch, tmp_path, "--steps", "2", "--kl_beta", str(beta), "--updates", "2")
    assert built == [True] + [False] * bool(beta)
    assert all(("loss/kl" in row) and (row["loss/kl"] > 0) == bool(beta) for row in rows[1:])


# ----- filter and export


def kept(i, agreement, reward=None, rationale="bright", **more):
    return {"record": sun(i, "x.png"), "rationale": rationale, "agreement": agreement, "leaks": [],
            "reward": agreement + 1 if reward is None else reward, "truncated": False, **more}


def test_filter_keeps_one_row_an_image():
    """Threshold inclusive, best by total, then agreement, then the shorter text, then file order."""
    rows = [kept(0, a, rationale=text) for a, text in zip(
        [.2, .91, .91, .5, .9, .1, .3, .91], ["a b", "long one", "short", "e", "f", "g", "h", "other"])]
    records, reasons = rise.best_of(rows, 0.9)
    assert [r["response"] for r in records] == [f"<think> short </think> {GOLD}"]
    assert reasons == {"below --tau 0.9": 4, "not the best": 3}
    assert len(rise.best_of([kept(0, .9)], .9)[0]) == 1 and not rise.best_of([kept(0, .8999)], .9)[0]


@pytest.mark.parametrize("first, second, best", [
    (kept(0, .9, reward=1.8, rationale="a"), kept(0, .95, reward=1.7, rationale="b"), "a"),
    (kept(0, .9, reward=1.8, rationale="a"), kept(0, .95, reward=1.8, rationale="b"), "b"),
    (kept(0, .9, rationale="aa"), kept(0, .9, rationale="b"), "b"),
    (kept(0, .9, rationale="a"), kept(0, .9, rationale="b"), "a"),
    (kept(0, 1.0, rationale="a", leaks=["sun"]), kept(0, .9, rationale="b"), "b"),
    (kept(0, 1.0, rationale="a", truncated=True), kept(0, .9, rationale="b"), "b"),
    (kept(0, 1.0, rationale=" "), kept(0, .9, rationale="b"), "b"),
    (kept(0, 1.0, rationale="a </think> b"), kept(0, .9, rationale="b"), "b"),
])
def test_best_of(first, second, best):
    records, reasons = rise.best_of([first, second], .9)
    assert [r["response"] for r in records] == [f"<think> {best} </think> {GOLD}"] and reasons.total() == 1


def test_filter_keeps_a_row_for_each_record():
    records, reasons = rise.best_of([kept(i, 1.0) for i in (3, 1, 3, 2)], 0.5)
    assert [r["id"] for r in records] == ["sun-3", "sun-1", "sun-2"] and reasons == {"not the best": 1}


# ----- the stage as users start it


def test_from_rationales_to_rise_r1(work):
    """RISE-CoT finds the rationales that tell, annotate exports them, sft.py and grpo.py go on from there."""
    run(work, *RISE, "--prompts_per_step", "6", "--group_size", "8", "--steps", "14", "--lr", "4e-4",
        "--out", "out/rise")
    rows = metrics(work / "out/rise")[1:]
    first, last = (sum(row["reward/agreement"] for row in part) / 2 for part in (rows[:2], rows[-2:]))
    assert last > first + 0.1
    output = run(work, "rise.py", "--phase", "annotate", "--data", "world/train.jsonl", *FLAGS)
    exported = data_prep.read_records(work / "out/annotate/sft.jsonl", need=("answer", "response"))
    assert f"{len(exported)} of 12 records" in output and len(exported) > 8
    for row in exported:
        assert row["question"] == "Where is the sun?" and row["answer"] not in rewards.build_prompt(row)
        told = row["response"], row
        assert rewards.accuracy(*told) == rewards.format_think_answer(*told) == rewards.agreement(*told) == 1
        assert row["response"].endswith(f"<answer> {row['answer']} </answer>")
    assert len(rationales(work / "out/annotate")) == 12 * 4
    run(work, "sft.py", "--model", "out/rise", "--data", "out/annotate/sft.jsonl", "--steps", "2",
        "--out", "r1")
    run(work, "grpo.py", "--model", "r1", "--data", "world/train.jsonl", "--reward", "agreement=1,format=1",
        "--eval_data", "", "--steps", "1", "--prompts_per_step", "4", "--group_size", "4", "--out", "out/r1")
    output = run(work, "rise.py", "--phase", "annotate", "--data", "out/rise/rationales.jsonl", "--tau", "1",
                 "--out", "again")
    assert "of 12 records; left out of 672 rationales" in output and (work / "again/sft.jsonl").exists()


def test_a_line_of_rationales_holds_all_that_the_next_phase_needs(work):
    """The record with its task prompt and image, all texts, every term, step and sample; in order."""
    run(work, *RISE, "--steps", "2", "--out", "one")
    rows = rationales(work / "one")
    assert [(row["step"], row["sample"]) for row in rows] == [(s, g) for s in (1, 2) for _ in range(4)
                                                              for g in range(4)]
    for row in rows:
        assert row.keys() == {"step", "sample", "cot", "rationale", "reconstruction", "reward", "agreement",
                              "format", "leaks", "parsed", "truncated", "tokens", "record"}
        assert Image.open(row["record"]["images"][0]).size == (28, 28)
        assert row["record"]["question"] == "Where is the sun?" and "response" not in row["record"]


def test_embedded_images_are_kept_beside_the_rationales(world, tmp_path, group):
    """A Hub data set holds its images as bytes; a line of JSON names a file."""
    data = (world / "world/0.png").read_bytes()
    log = SimpleNamespace(rank=0, out=tmp_path, write=lambda name, rows: wrote.extend(rows))
    wrote = []
    rise.write_rationales(log, 1, [(0, 0, {}), (0, 1, {})], [sun(0, {"bytes": data, "path": None})])
    assert [row["sample"] for row in wrote] == [0, 1]
    assert {open(row["record"]["images"][0], "rb").read() for row in wrote} == {data}


def test_resume_is_bitwise_and_repeats_no_step(work):
    """Interrupted after step 2, with step 3 half written: all files are those of an unbroken run."""
    run(work, *RISE, "--steps", "4", "--save_every", "2", "--keep", "9", "--graded", "both", "--out", "whole")
    shutil.copytree(work / "whole", work / "cut")
    shutil.rmtree(work / "cut/step_000004")
    path = work / "cut/rationales.jsonl"
    path.write_text(path.read_text()[:-600])  # steps 3 and 4 were written, the last line not wholly
    run(work, *RISE, "--steps", "4", "--save_every", "2", "--keep", "9", "--graded", "both", "--out", "cut",
        "--resume")
    assert metrics(work / "cut") == metrics(work / "whole")
    assert path.read_text() == (work / "whole/rationales.jsonl").read_text()
    a, b = weights(work / "cut/step_000004"), weights(work / "whole/step_000004")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_annotate_resumes_and_asks_nothing_twice(work):
    command = ["rise.py", "--phase", "annotate", "--model", "warm", "--data", "world/train.jsonl", *FLAGS,
               "--tau", "0", "--out", "notes"]
    run(work, *command)
    path, exported = work / "notes/rationales.jsonl", (work / "notes/sft.jsonl").read_text()
    whole = path.read_text()
    assert len(whole.splitlines()) == 48
    path.write_text("".join(whole.splitlines(True)[:27]) + '{"step": 2, "sam')
    run(work, *command, "--resume")
    assert path.read_text() == whole and (work / "notes/sft.jsonl").read_text() == exported


def test_two_ranks_equal_one(work):
    """Same questions, uneven texts: the same rationales in the same order, each once; the same weights."""
    command = [*RISE, "--steps", "2", "--lr", "1e-4", "--kl_beta", "0.01", "--updates", "2"]
    run(work, *command, "--out", "one")
    run(work, *command, "--out", "two", ranks=2)
    assert rationales(work / "one") == rationales(work / "two")
    for a, b in zip(metrics(work / "one"), metrics(work / "two"), strict=True):
        close(a, b)
    close(weights(newest(work / "one")), weights(newest(work / "two")))


def test_a_rank_without_a_readable_question_does_not_hang(work):
    """Two ranks, two questions a step, one image broken: counted, and half as many rationales; blind, too."""
    lines = (work / "world/train.jsonl").read_text().splitlines()[:2]
    (work / "world" / json.loads(lines[0])["images"][0]).write_bytes(b"broken")
    (work / "world/two.jsonl").write_text("\n".join(lines) + "\n")
    run(work, *RISE, "--data", "world/two.jsonl", "--prompts_per_step", "2", "--steps", "2", "--out", "half",
        "--blind", "--graded", "both", ranks=2)
    assert [row["data/unreadable"] for row in metrics(work / "half") if row["step"]] == [1, 1]
    assert Counter(row["record"]["id"] for row in rationales(work / "half")) == {
        json.loads(lines[1])["id"]: 8}


def test_a_prompt_that_is_too_long_is_left_out_and_named(work):
    """One is named and the others train; where all are too long the run ends before its first step."""
    path = work / "long.jsonl"
    records = data_prep.read_records(work / "world/train.jsonl")[:4]
    records[1]["question"] = "sky " * 90
    data_prep.write_records(path, records)
    output = run(work, *RISE, "--data", str(path), "--steps", "1", "--max_prompt_tokens", "90",
                 "--out", "some")
    assert metrics(work / "some")[-1]["data/unreadable"] == 1 and len(rationales(work / "some")) == 12
    assert f"record {records[1]['id']} skipped" in output and "--max_prompt_tokens is 90" in output
    output = run(work, *RISE, "--steps", "1", "--max_prompt_tokens", "50", "--out", "none", code=1)
    assert "none of the first rows can be used" in output and "--max_prompt_tokens is 50" in output


BAD = {
    "unknown phase": (["--phase", "label"], "--phase"),
    "unknown segment": (["--graded", "all"], "--graded"),
    "group of one": (["--group_size", "1"], "--group_size"),
    "threshold in percent": (["--tau", "90"], "--tau 90.0"),
    "missing model": (["--model", "out/nothing"], "out/nothing"),
    "too long, strict": (["--max_prompt_tokens", "9", "--strict"], "--max_prompt_tokens is 9"),
    "nothing good enough": (["--phase", "annotate", "--data", "rationales.jsonl"], "0 of 1 records"),
    "not rationales": (["--phase", "annotate", "--data", "world/rationales.jsonl"], "line 1: no 'agreement'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(work, case):
    flags, named = BAD[case]
    (work / "rationales.jsonl").write_text(json.dumps(kept(0, 0.1)) + "\n")
    (work / "world/rationales.jsonl").write_text('{"step": 1}\n')
    output = run(work, *RISE, "--steps", "1", "--out", "never", *flags, code=1)
    last = output.strip().splitlines()[-1]
    assert last.startswith("rise.py:") and named in last and "Traceback" not in output
    assert "strict" in case or not (work / "never").exists()
