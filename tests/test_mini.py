"""The mini suite and the tiny model: answers that pixels confirm, balanced, without overlap, reproducible."""
import hashlib
import json
import random
from collections import Counter

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import data_prep
import rewards

SPLITS = ("train", "id", "ood")
FILES = [(task, split) for task, (_, splits, _) in data_prep.MINI.items() for split in splits]


def rows(folder, split, task="counting"):
    return data_prep.read_records(folder / f"{task}_{split}.jsonl")


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
def test_areas_agree_with_the_pixels(tiny, split):
    """Four points of a cell tell the pieces apart: a full square holds all of them, a half two."""
    for row in rows(tiny.mini, split, "structure"):
        image, areas = Image.open(row["images"][0]).convert("RGB"), []
        for i in range(9):
            x, y = 28 * (i % 3), 28 * (i // 3)
            filled = sum(image.getpixel((x + dx, y + dy)) in ((150, 190, 235), (190, 170, 235))
                         for dx, dy in ((14, 7), (14, 21), (7, 14), (21, 14)))
            areas.append({0: 0, 2: 0.5, 4: 1}[filled])
        top, middle, bottom = (sum(areas[k:k + 3]) for k in (0, 3, 6))
        if row["answer_type"] == "number":
            assert float(row["answer"]) == top + middle + bottom, row["id"]
        else:
            by_name = {"top": top, "middle": middle, "bottom": bottom}
            chosen = by_name.pop(row["choices"]["ABC".index(row["answer"])])
            assert chosen > max(by_name.values()), row["id"]


@pytest.mark.parametrize("split", ["train", "id", "left", "right"])
def test_calls_turn_the_first_picture_into_the_second(tiny, split):
    shapes = {"cube": "square", "sphere": "round"}
    for row in rows(tiny.mini, split, "transform"):
        end = data_prep.apply_calls(row["meta"]["objects"], row["answer"])
        for objects, path in zip((row["meta"]["objects"], end), row["images"]):
            board = [()] * 9
            for thing in objects.values():
                board[thing["cell"]] = (thing["color"], shapes[thing["shape"]])
            assert read_board(path) == board, row["id"]
        assert row["answer"].count("change_") == row["meta"]["steps"] == int(row["id"].split("-")[-1]) % 3 + 1


def test_a_view_from_the_side_shows_other_pixels():
    column = [("red", "cube") if k % 3 == 1 else None for k in range(9)]
    views = {data_prep.draw_board(column, style, data_prep.draw_object).tobytes()
             for style in ("id", "left", "right")}
    assert len(views) == 3


@pytest.mark.parametrize("answer, message", [
    ("change_color(7, red)", "no object 7"), ("change_position(0, behind)", "leaves the board"),
    ("change_position(0, right)", "meets another"),
])
def test_calls_that_cannot_be_carried_out(answer, message):
    objects = {str(k): {"shape": "cube", "color": "red", "cell": k} for k in (0, 1)}
    with pytest.raises(ValueError, match=message):
        data_prep.apply_calls(objects, answer)
    assert objects["0"]["cell"] == 0


@pytest.mark.parametrize("task, split", FILES)
def test_every_response_keeps_the_format_and_is_right(tiny, task, split):
    for row in rows(tiny.mini, split, task):
        response = row["response"]
        assert rewards.accuracy(response, row) == rewards.format_think_answer(response, row) == 1
        assert rewards.build_prompt(row).count("<answer>") == 1


@pytest.mark.parametrize("task, kinds", [
    ("counting", ["0 1 2 3 4 5"]), ("structure", ["A B C", "1 1.5 2 2.5 3 3.5 4 4.5"]),
])
def test_a_blind_guess_scores_little(task, kinds):
    """1 in 6 on counts, 1 in 8 on areas; the longest row is as often the top as the middle or the bottom."""
    rows = [data_prep.MINI[task][0](random.Random(i), i, "id") for i in range(480)]
    counts = Counter(row["choices"]["ABC".index(row["answer"])] if "choices" in row else row["answer"]
                     for row in rows)
    for answers in kinds:
        names = "top middle bottom" if answers == "A B C" else answers
        assert len({counts.pop(name) for name in names.split()}) == 1
    assert not counts


@pytest.mark.parametrize("task", data_prep.MINI)
def test_no_scene_and_question_occur_twice(tiny, task):
    found = [row for name, split in FILES if name == task for row in rows(tiny.mini, split, task)]
    keys = [(row["question"], *(hashlib.sha256(open(path, "rb").read()).digest() for path in row["images"]))
            for row in found]
    assert len(keys) == len(set(keys)) > 40


@pytest.mark.parametrize("task", ["counting", "structure", "transform"])
@pytest.mark.parametrize("form", ["ans_sft", "cot_sft", "rl", "stage1", "stage2"])
def test_the_training_sets_of_a_mini_task_round_trip(tiny, tmp_path, task, form):
    board = "board" if task == "transform" else ""
    meta = str(tiny.mini / f"{task}_meta.json")
    data_prep.main(data_prep.Config(source="reason_rft", input=meta, form=form, stage1_n=6, task=board,
                                    strict=True, out=str(tmp_path)))
    made = data_prep.read_records(tmp_path / f"{task}_meta_{form}.jsonl")
    assert len(made) == {"stage1": 6, "stage2": 18}.get(form, 24)
    for row in made:
        assert len(row["images"]) == 1 + (task == "transform")
        assert row["task"].removesuffix("_answer") == (board or task), row
        response = row.get("response", f"<think> - </think> <answer> {row['answer']} </answer>")
        assert rewards.accuracy(response, row) == 1
        assert rewards.format_think_answer(response, row) == (form != "ans_sft")
        assert ("<answer>" in rewards.build_prompt(row)) == (form != "ans_sft")


def test_only_training_rows_are_answered_at_a_glance(tiny):
    styles = {split: {row["meta"]["style"] for row in rows(tiny.mini, split)} for split in SPLITS}
    assert styles == {"train": {"glance", "look"}, "id": {"look"}, "ood": {"look"}}


@pytest.mark.parametrize("task", ["counting", "structure", "transform"])
def test_lessons_tell_to_look_what_is_then_looked_at(tiny, task):
    """They are the training rows, of which some ask for it; those are sure to go cell by cell."""
    train = {row["id"]: row for row in rows(tiny.mini, "train", task)}
    lessons = rows(tiny.mini, "lessons", task)
    assert [row["id"] for row in lessons] == list(train)
    told = [row for row in lessons if row["meta"]["style"] == "told"]
    assert len(told) == sum(row["question"].endswith(" Look at each cell.") for row in lessons) > 5
    assert all(row == train[row["id"]] for row in lessons if row not in told)
    for row in told:
        same = {name for name in row if row[name] == train[row["id"]][name]}
        assert {"id", "images", "answer", "answer_type", "task"} <= same and "question" not in same
        assert rewards.accuracy(row["response"], row) == 1 and "at first sight" not in row["response"]


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
    for step in ("step_000002", "step_000010", "step_000012.tmp"):
        (tmp_path / "run" / step).mkdir(parents=True)
        (tmp_path / "run" / step / "meta.json").write_text("{}")
    assert data_prep.resolve_model("run") == "run/step_000010"
    (tmp_path / "run/step_000011").mkdir()
    with pytest.raises(ValueError, match="step_000011/meta.json is missing; .* from run/step_000010"):
        data_prep.resolve_model("run")
    assert data_prep.resolve_model(tiny.model) == tiny.model
    assert data_prep.resolve_model("Qwen/Qwen2.5-VL-3B-Instruct") == "Qwen/Qwen2.5-VL-3B-Instruct"


# ----- RISE's lessons


@pytest.mark.parametrize("task", ["detect", "mood"])
def test_lessons_tell_no_more_than_their_rationale_and_never_the_answer(tiny, task):
    """A whole rationale is read as the gold answer, a part of one as less; hop 2 does not show the gold."""
    records = {r["id"]: r for r in data_prep.read_records(tiny.mini / f"{task}_train.jsonl")}
    lessons = data_prep.read_records(tiny.mini / f"{task}_talk.jsonl", need=("response",))
    kinds = {kind: {row["id"].rpartition("/")[0]: row for row in lessons if row["id"].endswith(kind)}
             for kind in ("see", "write", "read", "good", "guess")}
    assert [len(rows) for rows in kinds.values()] == [6, 24, 24, 24, 3]
    for name, record in records.items():
        write, read, good = (kinds[kind][name] for kind in ("write", "read", "good"))
        rationale, whole = write["response"], record["meta"]["rationale"]
        assert (rewards.agreement(read["response"], record) == 1) == (rationale == whole)
        assert rewards.agreement(good["response"], record) == 1 and whole in good["question"]
        assert rewards.scrub(rationale, record) == rationale and not rewards.leaks(rationale, record)
        assert rationale in read["question"] and record["answer"] not in read["question"] + good["question"]
        assert record["answer"] in write["question"]
    for name, guess in kinds["guess"].items():
        assert rewards.format_think_answer(guess["response"], records[name]) == 1
        assert kinds["see"][name]["response"] == records[name]["meta"]["rationale"]
