"""The mini suite and the tiny model: answers that pixels confirm, balanced, without overlap, reproducible."""
import hashlib
import json
from collections import Counter

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import data_prep
import rewards

SPLITS = ("train", "id", "ood")


def rows(folder, split):
    return data_prep.read_records(folder / f"counting_{split}.jsonl")


def read_board(path):
    """An oracle that knows nothing of the generator: a cell's middle tells colour, its box's corner shape."""
    image, board = Image.open(path).convert("RGB"), []
    for i in range(9):
        x, y = 28 * (i % 3), 28 * (i // 3)
        paper, middle = image.getpixel((x + 27, y + 27)), image.getpixel((x + 16, y + 15))
        if middle == paper:
            board.append(())
            continue
        colour = min(data_prep.COLOURS,
                     key=lambda c: sum(abs(a - b) for a, b in zip(middle, data_prep.COLOURS[c])))
        right = max(dx for dx in range(14, 28) if image.getpixel((x + dx, y + 15)) != paper)
        bottom = max(dy for dy in range(14, 28) if image.getpixel((x + 16, y + dy)) != paper)
        board.append((colour, "round" if image.getpixel((x + right, y + bottom)) == paper else "square"))
    return board


@pytest.mark.parametrize("split", SPLITS)
def test_answers_agree_with_the_pixels(tiny, split):
    for row in rows(tiny.mini, split):
        asked = row["question"].split()[2]
        assert sum(asked in cell for cell in read_board(row["images"][0])) == int(row["answer"]), row["id"]


@pytest.mark.parametrize("split", SPLITS)
def test_every_response_keeps_the_format_and_is_right(tiny, split):
    for row in rows(tiny.mini, split):
        response = row["response"]
        assert rewards.accuracy(response, row) == rewards.format_think_answer(response, row) == 1


@pytest.mark.parametrize("split", SPLITS)
def test_a_blind_guess_scores_one_in_six(tiny, split):
    counts = Counter(row["answer"] for row in rows(tiny.mini, split))
    assert set(counts) == set("012345") and max(counts.values()) / sum(counts.values()) < 0.25


def test_no_scene_and_question_occur_twice(tiny):
    keys = [(row["question"], hashlib.sha256(open(row["images"][0], "rb").read()).hexdigest())
            for split in SPLITS for row in rows(tiny.mini, split)]
    assert len(keys) == len(set(keys))


def test_only_training_rows_are_answered_at_a_glance(tiny):
    styles = {split: {row["meta"]["style"] for row in rows(tiny.mini, split)} for split in SPLITS}
    assert styles == {"train": {"glance", "look"}, "id": {"look"}, "ood": {"look"}}


def test_same_seed_same_bytes_other_seed_other_scenes(tmp_path):
    sizes = {"train": 8, "id": 4, "ood": 4}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        data_prep.make_mini(tmp_path / name, seed, sizes)
    files = {name: {str(p.relative_to(tmp_path / name)): p.read_bytes()
                    for p in (tmp_path / name).rglob("*") if p.is_file()}
             for name in "abc"}
    assert files["a"] == files["b"] and files["a"].keys() == files["c"].keys()
    assert all(files["a"][name] != files["c"][name] for name in files["a"] if name.endswith(".jsonl"))


def test_tiny_is_a_small_real_qwen(tiny):
    model = AutoModelForImageTextToText.from_pretrained(tiny.model)
    processor = AutoProcessor.from_pretrained(tiny.model)
    assert model.config.model_type == "qwen2_5_vl" and sum(p.numel() for p in model.parameters()) < 2_000_000
    text = model.config.text_config
    assert text.hidden_size // text.num_attention_heads == 64  # a head size that vLLM's kernels take
    for row in rows(tiny.mini, "train"):
        ids = processor.tokenizer(row["response"])["input_ids"]
        assert processor.tokenizer.decode(ids) == row["response"] and len(ids) == len(row["response"].split())


@pytest.mark.parametrize("text", [
    "naïve 中文 \\frac{1}{2}\n\n  two  spaces", "redder unthink<think>", "", "\t🙂",
])
def test_the_tokenizer_keeps_any_text(tiny, text):
    tokenizer = AutoProcessor.from_pretrained(tiny.model).tokenizer
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_same_model_is_made_again(tiny, tmp_path):
    texts = [t for r in tiny.records for t in (rewards.build_prompt(r), r["response"])]
    data_prep.make_tiny(tmp_path / "again", texts, 0)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (open(f"{tiny.model}/{name}", "rb").read())


@pytest.mark.parametrize("path, message", [
    ("out/nowhere", "no such model"), ("./x", "no such model"),
    ("empty", "neither a model"), ("started", "no complete checkpoint"),
])
def test_resolve_model_refuses(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "started").mkdir()
    (tmp_path / "started/config.json").write_text(json.dumps({"config": {}}))
    with pytest.raises(ValueError, match=message):
        data_prep.resolve_model(path)


def test_resolve_model_takes_the_newest_complete_step(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for step, complete in (("step_000002", True), ("step_000010", True),
                           ("step_000011", False), ("step_000012.tmp", True)):
        (tmp_path / "run" / step).mkdir(parents=True)
        if complete:
            (tmp_path / "run" / step / "meta.json").write_text("{}")
    assert data_prep.resolve_model("run") == "run/step_000010"
    assert data_prep.resolve_model(tiny.model) == tiny.model
    assert data_prep.resolve_model("Qwen/Qwen2.5-VL-3B-Instruct") == "Qwen/Qwen2.5-VL-3B-Instruct"
