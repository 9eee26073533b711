"""RISE's data: boxes, distributions and class folders as records, and the mini tasks detect and mood."""
import json
from collections import Counter

import pytest
from PIL import Image

import data_prep
import rewards
from data_prep import read_records

PICTURE = {"id": 7, "file_name": "a.png", "width": 640, "height": 480}


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (640, 480), "red").save(tmp_path / "a.png")
    return tmp_path


def write(folder, rows, name="rows.json"):
    (folder / name).write_text(json.dumps(rows))
    return folder / name


def coco(*boxes, **changes):
    annotations = [{"image_id": 7, "category_id": name, "bbox": box} for name, box in boxes]
    return {"images": [PICTURE], "annotations": annotations,
            "categories": [{"id": 1, "name": "cup"}, {"id": 2, "name": "hot dog"}]} | changes


def test_coco_becomes_a_record_per_image_and_category(folder):
    table = coco((1, [0, 240, 640, 240]), (2, [64, 48, 64, 48]), (1, [0, 12.5, 640.4, 240]))
    table["annotations"].append({"image_id": 7, "category_id": 2, "bbox": [0, 0, 9, 9], "iscrowd": 1})
    cups, dogs = read_records(write(folder, table))
    assert json.loads(cups["answer"]) == [[0, 500, 1000, 1000], [0, 26, 1000, 526]]
    assert json.loads(dogs["answer"]) == [[100, 100, 200, 200]]
    assert dogs["question"] == "Find every hot dog in the picture." and dogs["meta"] == {"target": "hot dog"}
    assert (cups["id"], cups["task"], cups["answer_type"]) == ("7-cup", "detect", "boxes")
    assert cups["images"] == [str(folder / "a.png")]


def test_coco_is_converted_with_images_of_another_folder(folder, capsys):
    (folder / "notes").mkdir()
    path = write(folder / "notes", coco((1, [0, 240, 640, 240])))
    flags = {"source": "records", "input": str(path), "out": str(folder / "out")}
    data_prep.main(data_prep.Config(**flags, image_root=str(folder)))
    assert "1 records (1 boxes), 0 skipped" in capsys.readouterr().out
    (made,) = read_records(folder / "out/train.jsonl")
    assert rewards.accuracy(f"<answer>{made['answer']}</answer>", made) == 1
    with pytest.raises(ValueError, match="0 unreadable|1 unreadable"):
        data_prep.main(data_prep.Config(**flags))


@pytest.mark.parametrize("table, message", [
    (coco((1, [200, 200, 600, 400])), "bbox [200, 200, 600, 400] is no xywh box within 640x480"),
    (coco((1, [0, 0, 0, 9])), "no xywh box"), (coco((1, [-5, 0, 9, 9])), "no xywh box"),
    (coco((1, [1, 2, 3])), "bbox [1, 2, 3] is not four numbers"),
    (coco((3, [1, 2, 3, 4])), "no COCO instances file: it lacks 3"),
    (coco(images=[]), "rows.json: no records"), (coco((1, [1, 2, 3, 4]), images=[]), "it lacks 7"),
    (coco(categories=None), "no COCO instances file"),
    ({"images": [], "annotations": []}, "no COCO instances file: it lacks 'categories'"),
])
def test_coco_refuses(folder, table, message):
    with pytest.raises(ValueError) as error:
        read_records(write(folder, table))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_boxes_say_their_convention(folder):
    """xyxy read as xywh is wrong (0.555556 in RISE's own reward), so each row says, and is checked."""
    lisa = {"image": "a.png", "target": "where one sits", "bbox": [200, 200, 300, 300]}
    rows = [lisa, lisa | {"box_format": "xywh"}, lisa | {"bbox": [[200, 200, 300, 300]]},
            lisa | {"bbox": [64, 48, 128, 96], "width": 640, "height": 480}]
    records = read_records(write(folder, rows))
    assert [json.loads(r["answer"]) for r in records] == [
        [[200, 200, 300, 300]], [[200, 200, 500, 500]], [[200, 200, 300, 300]], [[100, 100, 200, 200]]]
    assert [r["task"] for r in records] == ["ground", "ground", "detect", "ground"]
    assert records[0]["question"] == "Which part of the picture is meant: where one sits?"
    assert "one box, as [x1, y1, x2, y2]" in rewards.build_prompt(records[0])
    for change, message in (({"bbox": [200, 200, 100, 100]}, "no xyxy box within 1000x1000"),
                            ({"bbox": [0, 0, 640, 1480]}, "no xyxy box"), ({"bbox": []}, "neither a box"),
                            ({"box_format": "cxcywh"}, "box_format is 'cxcywh'"),
                            ({"bbox": ["0", 0, 1, 1]}, "not four numbers"),
                            ({"bbox": None}, "neither a box")):
        with pytest.raises(ValueError) as error:
            read_records(write(folder, [lisa, lisa | change]))
        assert "row 2: " in str(error.value) and message in str(error.value)


def test_distributions(folder):
    emo = {"image": "a.png", "distribution": {"joy": 0.6, "fear": 0.3, "neutral": 0.1}}
    (record,) = read_records(write(folder, [emo]))
    assert record["question"] == "How likely is each of these: joy, fear, neutral?"
    assert record["meta"] == {"classes": ["joy", "fear", "neutral"]}
    assert rewards.agreement(f"<answer>{record['answer']}</answer>", record) == 1
    (cafe,) = read_records(write(folder, [emo | {"distribution": {"Café, bar": 1.0, "joy": 0.0}}]))
    assert "Café" in cafe["answer"] and rewards.accuracy(f"<answer>{cafe['answer']}</answer>", cafe) == 1
    for change, message in (({"joy": 2}, "must add up to 1, not 2.4"), ({"joy": "much"}, "probabilities"),
                            ({"joy": -0.6}, "add up"), ({"joy": 0.5}, "must add up to 1, not 0.9")):
        rows = [emo, emo | {"distribution": emo["distribution"] | change}]
        with pytest.raises(ValueError, match=r"row 2 \(id '1'\): field 'answer'.*" + message):
            read_records(write(folder, rows))


@pytest.mark.parametrize("solution, answer", [
    ("<answer>{'joy': 0.75, 'fear': 0.25}</answer>", {"joy": 0.75, "fear": 0.25}),
    ('<answer>{"Band Aid": 1.0, "frying pan": 0.0}</answer>', {"Band Aid": 1, "frying pan": 0}),
    ("<answer>[[10, 20, 30, 40], [1, 2, 3.5, 4]]</answer>", [[10, 20, 30, 40], [1, 2, 4, 4]]),
    ([10, 20, 30, 40], [[10, 20, 30, 40]]),
])
def test_rise_columns_keep_the_annotation_out_of_the_question(folder, solution, answer):
    problem = f"The annotation is {solution}. Why? Do not repeat it."
    row = {"problem": problem, "image": "a.png", "image_path": "a.png", "target": "cup", "solution": solution}
    (record,) = read_records(write(folder, [row]))
    assert json.loads(record["answer"]) == answer and rewards.cot_prompt(record) == problem
    assert rewards.leaks(record["question"], record) == [] or record["answer_type"] == "distribution"
    assert not any(str(p) in record["question"] for p in (0.75, 0.25, 10, 30, 40))
    second = rewards.reconstruct_prompt(record, "A handle shows.")
    assert "A handle shows." in second and problem not in second and record["answer"] not in second


@pytest.mark.parametrize("solution, message", [
    ("a dog", "answer 'a dog' is neither boxes nor"), ("<answer>[30, 20, 10, 40]</answer>", "no xyxy box"),
    ("{'joy': 0.5}", "must add up to 1"),
])
def test_rise_columns_refuse(folder, solution, message):
    row = {"problem": "p", "image": "a.png", "image_path": "", "target": "cup", "solution": solution}
    with pytest.raises(ValueError, match="row 1.*" + message):
        read_records(write(folder, [row]))


def test_rise_from_a_saved_dataset(folder):
    from datasets import Dataset, DatasetDict
    from datasets import Image as ImageColumn
    columns = {"problem": ["why?"], "image": [str(folder / "a.png")], "image_path": ["a.png"],
               "target": ["cup"], "solution": [[1, 2, 3, 4]]}
    table = Dataset.from_dict(columns).cast_column("image", ImageColumn())
    DatasetDict({"train": table}).save_to_disk(folder / "saved")
    (record,) = read_records(folder / "saved")
    assert record["answer"] == "[[1, 2, 3, 4]]" and record["task"] == "ground"


def test_a_folder_of_classes(folder):
    for name, count in (("frying_pan", 3), ("dog", 1)):
        (folder / "set" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (40, 40)).save(folder / "set" / name / f"{i}.JPEG")
    records = read_records(folder / "set")
    assert [r["id"] for r in records] == ["dog/0", "frying pan/0", "frying pan/1", "frying pan/2"]
    assert records[1]["question"] == "Which of these is in the picture: dog, frying pan?"
    assert (records[1]["answer"], records[1]["answer_type"], records[1]["task"]) == (
        "frying pan", "text", "classify")
    assert rewards.leaks("a frying pan", records[1]) and not rewards.leaks("a pan", records[1])
    assert [r["answer"] for r in read_records(folder / "set", limit=2)] == ["dog", "frying pan"]
    (folder / "set" / "dog" / "notes.txt").write_text("")
    assert data_prep.class_folders(folder / "set") == data_prep.class_folders(folder) == {}


@pytest.mark.parametrize("kind, answer, message", [
    ("boxes", "[]", "must be a JSON list of boxes"), ("boxes", "{}", "JSON list"), ("boxes", "x", "Expect"),
    ("boxes", "[1, 2, 3, 4]", "JSON list"), ("boxes", "[[1, 2, 3]]", "JSON list"), ("boxes", "3", "JSON"),
    ("boxes", "[[1, 2, 3, 4000]]", "JSON list"), ("boxes", "[[3, 2, 1, 4]]", "holds [3, 2, 1, 4], which"),
    ("boxes", "[[1, 2, 3, NaN]]", "JSON list"), ("distribution", "[1]", "JSON object"),
    ("distribution", '{"cat": 1}', "'cat', which is not in meta"),
    ("distribution", '{"joy": 0.7}', "not 0.7"),
    ("distribution", '{"joy": NaN}', "not nan"), ("distribution", "{}", "not 0"),
])
def test_annotations_are_checked(kind, answer, message):
    record = {"id": "q", "question": "", "images": [], "answer": answer, "answer_type": kind,
              "meta": {"classes": ["joy", "fear"]}}
    with pytest.raises(ValueError) as error:
        data_prep.check_record(record, "f row 1")
    assert message in str(error.value) and f"field 'answer' of type {kind!r}" in str(error.value)


# ----- the mini tasks

SPLITS = ("train", "id", "ood")


def seen_boxes(path, asked):
    """Tight boxes, on the scale, of what has the asked colour or shape: by pixels, one cell at a time."""
    image, boxes = Image.open(path).convert("RGB"), []
    names = {rgb: name for name, rgb in data_prep.COLOURS.items()}
    for row, column in ((y, x) for y in range(0, 84, 28) for x in range(0, 84, 28)):
        cell = [(x, y) for x in range(column, column + 28) for y in range(row, row + 28)
                if image.getpixel((x, y)) in names]
        if not cell:
            continue
        colours = {names[image.getpixel(point)] for point in cell}
        shape = "square" if (column + 27, row + 27) in cell else "round"
        if asked in {*colours, shape}:
            (x1, x2), (y1, y2) = ((min(side), max(side) + 1) for side in zip(*cell))
            boxes.append([round(1000 * side / 84) for side in (x1, y1, x2, y2)])
    return boxes


@pytest.mark.parametrize("split", SPLITS)
def test_boxes_agree_with_the_pixels(tiny, split):
    counts = Counter()
    for row in read_records(tiny.mini / f"detect_{split}.jsonl"):
        boxes = json.loads(row["answer"])
        assert boxes == seen_boxes(row["images"][0], row["question"].split()[2]), row["id"]
        counts[len(boxes)] += 1
    assert len(counts) == 4 and len(set(counts.values())) == 1  # 1 to 4 boxes, equally often


def seen_face(path, tilt):
    """What the parts of a face look like, from where its dark, white and red pixels are."""
    image = Image.open(path).convert("RGB").rotate(-tilt, Image.Resampling.BICUBIC)
    inks = [data_prep.INK, (90, 20, 30), (255, 255, 255), image.getpixel((42, 50))]

    def nearest(x, y):
        return min(inks, key=lambda ink: sum(abs(a - b) for a, b in zip(ink, image.getpixel((x, y)))))

    def points(x1, x2, y1, y2, colour=data_prep.INK):
        return [(x, y) for x in range(x1, x2) for y in range(y1, y2) if nearest(x, y) == colour]

    outer, inner = ([y for _, y in points(x, x + 3, 13, 32)] for x in (14, 24))
    tilt, height = min(inner) - min(outer), min(outer)
    brows = "low" if tilt > 3 else "steep" if tilt < -3 else "high" if height < 20 else "level"
    eye = points(10, 32, 32, 50)
    width, tall = (max(side) - min(side) for side in zip(*eye))
    eyes = "dots" if width < 9 else "wide" if tall > 10 else "narrow" if tall > 3 else "closed"
    red, white, dark = (points(29, 56, 57, 82, colour) for colour in ((90, 20, 30), (255, 255, 255),
                                                                     data_prep.INK))
    if len(red) > 60:  # a turned picture has a few at the edges of its lines
        mouth = "open" if len(red) > 220 else "round"
    elif len(white) > 40:
        mouth = "teeth"
    else:
        left, quarter, middle = (min(y for x, y in dark if x == at) for at in (33, 36, 42))
        mouth = ("smile" if middle > left + 2 else "frown" if middle < left - 2
                 else "wave" if quarter > middle + 2 else "flat")
    return {"mouth": mouth, "brows": brows, "eyes": eyes}


@pytest.mark.parametrize("split", SPLITS)
def test_moods_agree_with_the_pixels(tiny, split):
    tilt = data_prep.TILT if split == "ood" else 0
    for row in read_records(tiny.mini / f"mood_{split}.jsonl"):
        told = dict.fromkeys(data_prep.EMOTIONS, 0)
        for part, look in seen_face(row["images"][0], tilt).items():
            told[data_prep.FACES[part][look]] += {"mouth": 0.5, "brows": 0.3, "eyes": 0.2}[part]
        assert told == pytest.approx(json.loads(row["answer"])), row["id"]


@pytest.mark.parametrize("task, words", [("detect", 16), ("mood", 26)])
def test_rationales_say_what_is_seen_and_not_the_answer(tiny, task, words):
    for row in read_records(tiny.mini / f"{task}_train.jsonl"):
        rationale = row["meta"]["rationale"]
        assert rewards.leaks(rationale, row) == [] and rewards.scrub(rationale, row) == rationale
        assert rewards.agreement(row["response"], row) == 1
        assert len(row["answer"].split()) <= words
