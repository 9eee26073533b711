"""The record schema, images and readers of data_prep.py. Offline; python -m pytest tests/test_data_prep.py"""
import dataclasses
import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import data_prep
import rewards
from data_prep import (BadImage, build_messages, check_record, check_records, load_image, read_records,
                       write_records)

REAL = Path(__file__).parents[2] / "shared" / "real"
CHOICE = {"answer": "B", "answer_type": "choice", "choices": ["one", "two"]}


def record(**fields):
    base = {"id": "q1", "question": "How many?", "images": ["a.png"], "answer": "3", "answer_type": "number"}
    return {field: value for field, value in (base | fields).items() if value is not None}


def png(color="red", size=(30, 40), mode="RGB"):
    Image.new(mode, size, color).save(out := io.BytesIO(), "PNG")
    return out.getvalue()


def real(name):
    if not (REAL / name).exists():
        pytest.skip(f"{name} is not here")
    return REAL / name


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ----- records -----
@pytest.mark.parametrize("fields", [
    {}, CHOICE, {"images": []}, {"question": "<image> and <image>", "images": ["a.png", "b.png"]},
    {"images": ["a.png", "b.png"]}, {"question": ""},
    {"precision": 2, "task": "counting", "source": "s", "meta": {"k": 1}},
    {"question": "Which?", **CHOICE, "choices": ["<image>", "<image>"], "images": ["a.png", "b.png"]},
    {"images": [{"bytes": b"x", "path": None}, Image.new("RGB", (1, 1)), Path("a.png")]},
])
def test_good_records_come_back_as_they_are(fields):
    good = record(**fields)
    assert check_record(good, "f.jsonl row 1") is good


@pytest.mark.parametrize("fields, message", [
    ({"id": None}, "(id None): field 'id' is missing"),
    ({"question": None}, "field 'question' is missing"),
    ({"images": None}, "field 'images' is missing"),
    ({"answer": None}, "field 'answer' is missing"),
    ({"answer_type": None}, "field 'answer_type' is missing"),
    ({"answer": None, "anwser": "3"},
     "field 'anwser' is unknown; did you mean 'answer'? (extra values go into 'meta')"),
    ({"choises": []}, "field 'choises' is unknown; did you mean 'choices'?"),
    ({"id": 7}, "(id 7): field 'id' must be str, not int"),
    ({"answer": 3}, "field 'answer' must be str, not int"),
    ({"images": "a.png"}, "field 'images' must be list, not str"),
    ({"precision": 1.0}, "field 'precision' must be int, not float"),
    ({"meta": []}, "field 'meta' must be dict, not list"),
    ({"images": [7]}, "field 'images' cannot hold int"),
    (CHOICE | {"choices": ["one", 2]}, "field 'choices' cannot hold int"),
    ({"answer": " "}, "field 'answer' is empty"),
    ({"id": ""}, "field 'id' is empty"),
    ({"answer_type": "letter"}, "field 'answer_type' is 'letter', not one of choice, number, math, text"),
    (CHOICE | {"choices": None}, "field 'choices' is missing, and answer_type is 'choice'"),
    (CHOICE | {"answer": "C"}, "field 'answer' must be a letter A-B, not 'C'"),
    (CHOICE | {"answer": "b"}, "field 'answer' must be a letter A-B, not 'b'"),
    (CHOICE | {"answer": "two"}, "field 'answer' must be a letter A-B, not 'two'"),
    ({"question": "<image> or <image>?"}, "field 'images' has 1 entries for 2 <image> placeholders"),
    ({"question": "<image>?", "images": []}, "field 'images' has 0 entries for 1 <image> placeholders"),
])
def test_a_bad_record_is_one_line_naming_row_id_and_field(fields, message):
    with pytest.raises(ValueError) as error:
        check_record(record(**fields), "f.jsonl row 9")
    assert str(error.value).startswith("f.jsonl row 9 (id ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_sft_needs_a_response_and_no_answer():
    check_record(record(answer=None, response="<answer>3</answer>"), "row", need=("response",))
    with pytest.raises(ValueError, match="'response' is missing"):
        check_record(record(), "row", need=("response",))
    with pytest.raises(ValueError, match="'response' is empty"):
        check_record(record(response="\n"), "row", need=("response",))


def test_lists_of_records():
    with pytest.raises(ValueError, match="^f.jsonl: no records$"):
        check_records([], "f.jsonl")
    with pytest.raises(ValueError, match="^f.jsonl row 3: id 'a' was already used in row 1$"):
        check_records([record(id="a"), record(id="b"), record(id="a")], "f.jsonl")


@pytest.mark.parametrize("question, images, expected", [
    ("Q?", 1, ["image", "Q?"]),
    ("Q?", 2, ["image", "image", "Q?"]),
    ("Q?", 0, ["Q?"]),
    ("<image>Q?", 1, ["image", "Q?"]),
    ("<image>\nQ <image> and <image>?", 3, ["image", "\nQ ", "image", " and ", "image", "?"]),
    ("<image><image>", 2, ["image", "image"]),
])
def test_images_stand_where_the_question_puts_them(monkeypatch, question, images, expected):
    monkeypatch.setattr(rewards, "build_prompt", lambda record: record["question"])
    [turn] = build_messages(record(question=question, images=["a.png"] * images))
    assert turn["role"] == "user"
    assert [part.get("text", part["type"]) for part in turn["content"]] == expected


def test_the_prompt_is_the_one_that_graders_promise():
    question = record(question="<image>How many?")
    image, text = build_messages(question)[0]["content"]
    assert image == {"type": "image"} and "<image>" + text["text"] == rewards.build_prompt(question)


# ----- images -----
def gray16():
    image = Image.new("I;16", (30, 30))
    image.putdata([257 * 200] * 900)
    return image


def palette_with_hole():
    image = Image.new("P", (30, 30), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.info["transparency"] = 1
    return image


@pytest.mark.parametrize("image, suffix, expected", [
    (Image.new("RGB", (30, 30), (10, 20, 30)), "png", (10, 20, 30)),
    (Image.new("RGBA", (30, 30), (0, 0, 0, 0)), "png", (255, 255, 255)),
    (Image.new("RGBA", (30, 30), (0, 0, 0, 128)), "png", (127, 127, 127)),
    (Image.new("LA", (30, 30), (0, 0)), "png", (255, 255, 255)),
    (palette_with_hole(), "png", (255, 255, 255)),
    (Image.new("CMYK", (30, 30), (0, 255, 255, 0)), "tiff", (255, 0, 0)),
    (Image.new("CMYK", (30, 30), (0, 255, 255, 0)), "jpg", (254, 0, 0)),
    (gray16(), "png", (200, 200, 200)),
    (Image.new("I", (30, 30), 65535), "tiff", (255, 255, 255)),
    (Image.new("L", (30, 30), 77), "png", (77, 77, 77)),
    (Image.new("1", (30, 30), 1), "png", (255, 255, 255)),
    (Image.new("YCbCr", (30, 30), (255, 128, 128)), "jpg", (255, 255, 255)),
])
def test_every_mode_becomes_rgb(tmp_path, image, suffix, expected):
    path = tmp_path / f"x.{suffix}"
    image.save(path, **({"transparency": 1} if image.mode == "P" else {}))
    embedded, listed = {"bytes": path.read_bytes(), "path": None}, {"bytes": None, "path": str(path)}
    for ref in path, str(path), embedded, listed:
        loaded = load_image(ref, 10**6)
        assert (loaded.mode, loaded.size) == ("RGB", (30, 30))
        assert all(abs(got - want) <= 1 for got, want in zip(loaded.getpixel((5, 5)), expected))
    assert load_image(image, 10**6).mode == "RGB"


def test_camera_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (60, 30), "white")
    image.paste("red", (0, 0, 30, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # shot upright on a sensor that lies on its side
    image.save(tmp_path / "x.png", exif=exif)
    loaded = load_image(tmp_path / "x.png", 10**6)
    assert loaded.size == (30, 60)
    assert loaded.getpixel((15, 5)) == (255, 0, 0) and loaded.getpixel((15, 55)) == (255, 255, 255)


@pytest.mark.parametrize("size, max_pixels, expected", [
    ((100, 50), 10**6, (100, 50)),
    ((100, 50), 5000, (100, 50)),
    ((1000, 500), 5000, (100, 50)),
    ((999, 501), 10_000, (141, 70)),
    ((1, 1), 10**6, (28, 28)),
    ((14, 30), 10**6, (28, 60)),
    ((5600, 28), 10_000, (5600, 28)),  # the shorter side wins over the pixel budget
    ((2, 400), 10**6, (28, 5600)),
])
def test_sizes(size, max_pixels, expected):
    assert load_image(Image.new("RGB", size), max_pixels).size == expected


def bomb():
    """A PNG whose header promises 50000 x 50000 pixels, without the pixels."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


@pytest.mark.parametrize("data, message", [
    (png()[:-30], "truncated"),
    (png()[:20], ""),
    (b"", "not an image"),
    (b"<html>404</html>", "not an image"),
    (bomb(), "pixels"),
    (png(size=(1, 500)), "aspect ratio of 1x500 is over 200"),
    (None, "No such file"),
    ("F", "float pixels have no agreed range"),
])
def test_bad_images_are_named(tmp_path, data, message):
    path = tmp_path / "bad.png"
    if data == "F":
        Image.new("F", (30, 30)).save(path, "TIFF")
    elif data is not None:
        path.write_bytes(data)
    with pytest.raises(BadImage) as error:
        load_image(str(path), 10**6)
    text = str(error.value)
    assert text.startswith(f"{path}: ") and message in text and "\n" not in text


def test_the_size_limit_is_ours_not_pillows(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(BadImage, match="2500000000 pixels, the limit is 100000000"):
        load_image({"bytes": bomb(), "path": "bomb.png"}, 10**6)


# ----- formats -----
@pytest.mark.parametrize("raw, clean, kind", [
    ("11 ", "11", "number"), ("1,234.5", "1,234.5", "number"), ("-.5", "-.5", "number"),
    (4.0, "4.0", "number"), (3, "3", "number"),
    (r"$\boxed{\frac{16}{7}}$", r"\frac{16}{7}", "math"), ("\x0crac{36}{13}", r"\frac{36}{13}", "math"),
    (r"\boxed{\frac{\sqrt{3}}{2}}", r"\frac{\sqrt{3}}{2}", "math"),
    ("<answer> 145° </answer>", "145°", "math"), ("1,23", "1,23", "math"),
    (r"\boxed{1}, \boxed{2}", r"\boxed{1}, \boxed{2}", "math"), ("$5$ and $6$", "$5$ and $6$", "math"),
    ("$$x+1$$", "x+1", "math"), ("1:2", "1:2", "math"), ("(3,-4)", "(3,-4)", "math"),
    ("55/2", "55/2", "math"), ("69{degrees}", "69{degrees}", "math"),
    ("nan", "nan", "text"), ("-", "-", "text"), ("3 red balls", "3 red balls", "text"), ("C", "C", "text"),
    ("yes/no", "yes/no", "text"), ("", "", "text"),
])
def test_answers_are_cleaned_and_typed(raw, clean, kind):
    assert data_prep.clean_answer(raw) == clean
    assert data_prep.infer_type(clean) == kind


MATHV = {"id": "9", "question": "<image1> or <image2>?", "options": [], "answer": "4", "solution": None,
         "image": "images/9.jpg", "level": 2, "subject": "counting"}
PAIR = {"question": "Which?", "image": "a.png", "choices": ["cat", "dog"]}


@pytest.mark.parametrize("row, expected", [
    (MATHV, {"id": "9", "question": "(image 1) or (image 2)?", "answer": "4", "answer_type": "number",
             "source": "mathvision", "meta": {"level": 2, "subject": "counting"}}),
    (MATHV | {"answer": "C"}, {"answer": "C", "answer_type": "text"}),
    (MATHV | {"answer": "B", "options": ["(A)", "(B)"]}, {"choices": ["A", "B"], "answer_type": "choice"}),
    (MATHV | {"answer": "B", "options": ["A)", "B)"]}, {"choices": ["A", "B"]}),
    (MATHV | {"answer": "B", "options": ["K", "E"]}, {"choices": ["K", "E"], "answer": "B"}),
    (MATHV | {"answer": "A", "options": ["<image2>", "<image3>"]}, {"choices": ["(image 2)", "(image 3)"]}),
    ({"images": ["a.png"], "problem": "<image>x?", "answer": "80", "choices": ["80", "9"],
      "ground_truth": "A", "id": 11}, {"id": "11", "answer": "80", "answer_type": "number"}),
    ({"images": ["a.png"], "problem": "<image>x?", "answer": "80"}, {"id": "0", "answer": "80"}),
    ({"problem": "[1, 2, 3, 4] holds it. Why?", "image": "a.png", "image_path": "b.png", "target": "dog",
      "answer": "[1, 2, 3, 4]"}, {"answer": "[[1, 2, 3, 4]]", "answer_type": "boxes", "source": "rise",
      "meta": {"target": "dog", "cot_prompt": "[1, 2, 3, 4] holds it. Why?"}}),
    ({"problem": "Why?", "image": None, "image_path": "a.png", "target": "dog",
      "solution": "<answer>[[1, 2, 3, 4]]</answer>"}, {"answer": "[[1, 2, 3, 4]]", "task": "detect"}),
    ({"question": "Q?", "image": "a.png", "answer": 3}, {"id": "0", "answer": "3", "answer_type": "number"}),
    ({"problem": "Q?", "image": ["a.png"], "solution": "<answer> 145° </answer>"}, {"answer": "145°"}),
    ({"question": "Q?", "image": "a.png", "answer": 0, "solution": "Count them."}, {"answer": "0"}),
    (PAIR | {"answer": "B"}, {"answer": "B", "answer_type": "choice", "choices": ["cat", "dog"]}),
    (PAIR | {"answer": "dog"}, {"answer": "B"}),
    (PAIR | {"answer": 1}, {"answer": "B"}),
    (PAIR | {"answer": r"\boxed{B}"}, {"answer": "B"}),
    ({"pid": "7", "question": "Q?", "image": "7.jpg", "choices": None, "precision": 1.0, "answer": "1.5"},
     {"id": "7", "precision": 1, "answer_type": "number"}),
    ({"question": "", "image": "a.png", "answer": "yes"}, {"question": ""}),
])
def test_formats(tmp_path, row, expected):
    [got] = read_records(jsonl(tmp_path / "x.jsonl", [row]))
    assert {field: got[field] for field in expected} == expected
    assert len(got["images"]) == 1 and ("choices" in got) == (got["answer_type"] == "choice")


@pytest.mark.parametrize("text, message", [
    ("", "no records"),
    ('{"id": "a"\n', "line 1: Expecting"),
    ("\n\n[1]\n", "line 3: a JSON list, not an object"),
    ('{"question": "Q?", "image": "a.png", "label": "3"}',
     "no answer column: expected answer or solution, found question, image, label"),
    ('{"question": "Q?", "picture": "a.png", "answer": "3"}', "no image column: expected images or"),
    ('{"text": "Q?", "image": "a.png", "answer": "3"}', "no question column: expected question or problem"),
    (json.dumps(MATHV) + '\n{"id": "10"}', "row 2: no column 'question'"),
    (json.dumps(PAIR | {"answer": "owl"}), "row 1 (id '0'): field 'answer' must be a letter A-B, not 'owl'"),
    (json.dumps(PAIR | {"answer": 5}), "must be a letter A-B, not '5'"),
    ('{"id": "a", "question": "Q?", "images": [], "answer_type": "math", "anwser": "3"}',
     "did you mean 'answer'?"),
])
def test_unreadable_files_are_one_line(tmp_path, text, message):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_records(path)
    assert str(error.value).startswith(str(path)) and message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, message", [
    ("none.jsonl", "no such file or folder"), ("none.parquet", "no such file or folder"),
    ("no/such/folder", "no such file or folder"),
    ("x.txt", "not a .jsonl, .json, .parquet, .arrow, .tsv, .csv file"),
    ("x.parquet", "Parquet"), ("x.arrow", ""), ("x.json", "Expecting"),
    ("data.json", "expected a list of rows"), ("empty", "The directory"),
])
def test_missing_and_foreign_files(tmp_path, name, message):
    (tmp_path / "x.txt").write_text("index\tquestion\n")
    (tmp_path / "data.json").write_text('{"version": 1, "data": []}')
    (tmp_path / "empty").mkdir()
    for junk in "x.parquet", "x.arrow", "x.json":
        (tmp_path / junk).write_bytes(b"junk")
    with pytest.raises(ValueError) as error:
        read_records(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}: {message}") and "\n" not in str(error.value)


def test_a_hub_id_out_of_reach(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def offline(source, split):
        raise ConnectionError("Couldn't reach it\non the Hub")
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match="^owner/name: Couldn't reach it on the Hub$"):
        read_records("owner/name")


def test_json_forms(tmp_path):
    row = {"question": "Q?", "image": "images/1.jpg", "answer": "3"}
    (tmp_path / "list.json").write_text(json.dumps([row]))
    (tmp_path / "table.json").write_text(json.dumps({"m7": row}))
    assert read_records(tmp_path / "list.json")[0]["id"] == "0"
    [from_table] = read_records(tmp_path / "table.json")
    assert from_table["id"] == "m7" and from_table["images"] == [str(tmp_path / "images/1.jpg")]


@pytest.fixture(scope="module")
def geometry_like():
    datasets = pytest.importorskip("datasets")
    rows = {"images": [[{"bytes": png(color), "path": None}] for color in ("red", "green", "blue")],
            "problem": ["<image>Find x."] * 3,
            "answer": ["80", r"5 \sqrt { 3 }", "9"],
            "ground_truth": ["D", "A", "B"]}
    return datasets.Dataset.from_dict(rows).cast_column("images", datasets.List(datasets.Image()))


@pytest.mark.parametrize("form", ["parquet", "arrow", "folder", "splits", "hub"])
def test_datasets_in_every_container(tmp_path, monkeypatch, geometry_like, form):
    import datasets
    source, split = tmp_path / f"data.{form}", "train"
    if form == "parquet":
        geometry_like.to_parquet(source)
    elif form == "splits":
        datasets.DatasetDict({"val": geometry_like}).save_to_disk(source)
        with pytest.raises(ValueError, match="no split 'train', only val"):
            read_records(source)
        split = "val"
    elif form == "hub":
        source = "owner/name"
        monkeypatch.setattr(datasets, "load_dataset", lambda source, split: geometry_like)
    else:
        geometry_like.save_to_disk(tmp_path / "saved")
        source = tmp_path / "saved"
        source = next(source.glob("*.arrow")) if form == "arrow" else source
    records = read_records(source, split)
    assert [r["answer"] for r in records] == ["80", r"5 \sqrt { 3 }", "9"]
    assert [r["answer_type"] for r in records] == ["number", "math", "number"]
    assert records[0]["images"][0]["bytes"] == png("red")  # still compressed
    assert load_image(records[2]["images"][0], 10**6).getpixel((0, 0)) == (0, 0, 255)
    assert read_records(source, split, limit=2) == records[:2]


def test_sft_records_without_an_answer(tmp_path):
    row = {"id": "a", "question": "Q?", "images": [], "response": "So 3."}
    path = jsonl(tmp_path / "x.jsonl", [row])
    assert read_records(path, need=("response",)) == [row | {"answer_type": "text"}]
    with pytest.raises(ValueError, match="'answer' is missing"):
        read_records(path)


# ----- ViRL39K -----
VIRL = {"question": "<image>How long is x?", "answer": r"\boxed{17^\circ}", "PassRate_32BTrained": 1.0,
        "PassRate_7BBase": 0.5, "category": "geometry", "source": "web", "qid": "g-1",
        "image": ["images/0.png"]}
PICK = {"question": "<image>Which?\n(A) a cat\n(B) a dog", "answer": r"\boxed{B}"}


@pytest.mark.parametrize("fields, expected, parts", [
    ({}, {"id": "g-1", "answer": r"17^\circ", "answer_type": "math", "source": "virl39k",
          "meta": {"category": "geometry", "source": "web", "pass_rate_7b": 0.5,
                   "pass_rate_32b": 1.0}}, "it"),
    ({"PassRate_7BBase": -1.0}, {"meta": {"category": "geometry", "source": "web", "pass_rate_7b": None,
                                          "pass_rate_32b": 1.0}}, "it"),
    ({"answer": r"\boxed{1,000}"}, {"answer": "1,000", "answer_type": "number"}, "it"),
    ({"answer": r"\boxed{\frac{1}{2}}"}, {"answer": r"\frac{1}{2}", "answer_type": "math"}, "it"),
    ({"answer": r"\boxed{Monday}"}, {"answer": "Monday", "answer_type": "text"}, "it"),
    ({"answer": r"\boxed{A}"}, {"answer": "A", "answer_type": "text"}, "it"),  # no options to choose from
    (PICK, {"answer": "B", "answer_type": "choice", "choices": ["a cat", "a dog"]}, "it"),
    (PICK | {"answer": r"\boxed{\text{B}}"}, {"answer": "B", "answer_type": "choice"}, "it"),
    (PICK | {"answer": r"\boxed{(B)}"}, {"answer": "B", "answer_type": "choice"}, "it"),
    (PICK | {"answer": r"\boxed{AB}"}, {"answer": "AB", "answer_type": "text"}, "it"),
    (PICK | {"answer": r"\boxed{7}"}, {"answer": "7", "answer_type": "number"}, "it"),
    (PICK | {"answer": r"\boxed{D}"}, {"answer": "D", "answer_type": "text"}, "it"),
    ({"question": "How long is x?"}, {"question": "How long is x?"}, "it"),  # its <image> was lost
    ({"question": "x?", "image": ["images/0.png", "images/1.png"]}, {}, "iit"),
    ({"question": "<image> or <image>?", "image": ["images/0.png", "images/1.png"]}, {}, "itit"),
    ({"question": "<image>x?", "image": ["images/0.png", "images/1.png"]}, {"question": "x?"}, "iit"),
    ({"question": "<image><image>x?"}, {"question": "x?"}, "it"),
    ({"question": "What is 2 + 2?", "image": None}, {"images": []}, "t"),
    ({"question": "What is 2 + 2?", "image": ""}, {"images": []}, "t"),
    ({"question": "What is 2 + 2?", "image": []}, {"images": []}, "t"),
    ({"question": "What is 2 + 2?", "image": [""]}, {"images": []}, "t"),
    ({"question": "<image>What is 2 + 2?", "image": [None]}, {"question": "What is 2 + 2?"}, "t"),
    ({"image": "images/0.png"}, {}, "it"), ({"image": "['images/0.png']"}, {}, "it"),
    ({"question": "Which?\n(A) <image>\n(B) <image>", "image": ["images/0.png", "images/1.png"],
      "answer": r"\boxed{A}"}, {"choices": ["A", "B"]}, "titit"),
])
def test_virl39k(tmp_path, fields, expected, parts):
    [got] = read_records(jsonl(tmp_path / "x.jsonl", [VIRL | fields]))
    assert {field: got[field] for field in expected} == expected
    assert got["images"] == [str(tmp_path / f"images/{k}.png") for k in range(parts.count("i"))]
    [turn] = build_messages(got)
    assert "".join(part["type"][0] for part in turn["content"]) == parts
    assert "<image>" not in str(turn["content"]) and rewards.build_prompt(got).count("cat") <= 1


@pytest.mark.parametrize("question, options", [
    ("Which?\n(A) 3 cm\n(B) 4 cm", ["3 cm", "4 cm"]), ("Which? (A) 3; (B) 4; (C) 5", ["3", "4", "5"]),
    ("Which?\nA. red\nB. blue\nAnswer at once.", ["red", "blue"]),
    ("Which?\nA: red\nB: blue", ["red", "blue"]),
    ("Which? Options: A. red B. blue", ["red", "blue"]), ("Choices:\nA) 1\nB) 2", ["1", "2"]),
    ("Point (A) or (B)?\n(A) first\n(B) second", ["first", "second"]),
    ("(A) vitamin A. (B) vitamin B. ", ["vitamin A.", "vitamin B."]), ("(A)\n(B)\n(C)", ["A", "B", "C"]),
    ("(A) one\n(B) two, not (A)\n(C) three", ["one", "two, not (A)", "three"]),
    ("How far is A from B?", []), ("Choices: none", []), ("A. Smith wrote it. When?", []), ("", []),
])
def test_options_are_found_in_the_question(question, options):
    assert data_prep.listed_options(question) == options


@pytest.fixture
def virl39k(tmp_path):
    """The published layout: one parquet, in 32 bits here, with images/ beside it."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "hub/images").mkdir(parents=True)
    rates = [(0.0, 1.0), (0.3, 1.0), (0.7, 0.9), (0.9, 0.3), (1.0, 1.0), (-1.0, 0.3), (None, 0.7)]
    rows = []
    for k, (base, trained) in enumerate(rates):
        (tmp_path / f"hub/images/{k}.png").write_bytes(png(size=(30 + k, 40)))
        rows.append(VIRL | {"qid": f"q{k}", "image": [f"images/{k}.png"] if k != 1 else [],
                            "question": "<image>x?" if k else "x?", "PassRate_7BBase": base,
                            "PassRate_32BTrained": trained})
    table = pyarrow.Table.from_pylist(rows)
    for column in "PassRate_7BBase", "PassRate_32BTrained":
        place = table.column_names.index(column)
        table = table.set_column(place, column, table[column].cast(pyarrow.float32()))
    parquet.write_table(table, tmp_path / "hub/39Krelease.parquet")
    return tmp_path / "hub"


def test_virl39k_as_published(virl39k):
    records = read_records(virl39k / "39Krelease.parquet")
    assert records == read_records(virl39k) and [r["id"] for r in records] == [f"q{k}" for k in range(7)]
    assert [len(r["images"]) for r in records] == [1, 0, 1, 1, 1, 1, 1]
    assert [r["meta"]["pass_rate_7b"] for r in records][-2:] == [None, None]
    assert load_image(records[2]["images"][0], 10**6).size == (32, 40)
    with pytest.raises(ValueError, match="row 1 .*'answer' is empty"):
        read_records(jsonl(virl39k / "x.jsonl", [VIRL | {"answer": r"\boxed{}"}]))


@pytest.mark.parametrize("flags, kept, lines", [
    ({}, "0123456", []),
    ({"pass_rate": ("0.3", "0.9")}, "123",
     ["left out 2 with pass_rate_7b outside 0.3 .. 0.9", "left out 2 with pass_rate_7b unknown"]),
    ({"pass_rate": ("0.3", "0.9"), "keep_unmeasured": True}, "12356",
     ["left out 2 with pass_rate_7b outside 0.3 .. 0.9"]),
    ({"pass_rate": ("0.7", "1"), "pass_rate_of": "32b"}, "01246",
     ["left out 2 with pass_rate_32b outside 0.7 .. 1.0"]),
    ({"pass_rate": ("0", "0")}, "0",
     ["left out 4 with pass_rate_7b outside 0.0 .. 0.0", "left out 2 with pass_rate_7b unknown"]),
])
def test_rows_are_chosen_by_pass_rate(virl39k, tmp_path, capsys, flags, kept, lines):
    (virl39k / "images/2.png").write_bytes(png()[:-30])
    cfg = data_prep.Config(source="records", input=str(virl39k), out=str(tmp_path / "out"), **flags)
    data_prep.main(cfg)
    skipped = [f"skipped id 'q2': {virl39k}/images/2.png"] if "2" in kept else []
    *others, total = capsys.readouterr().out.splitlines()
    kept = kept.replace("2", "")
    assert [line.split(": image file")[0] for line in others] == skipped + lines
    assert total == (f"{tmp_path / 'out/train.jsonl'}: {len(kept)} records ({len(kept)} math), "
                     f"{len(skipped)} skipped")
    again = read_records(tmp_path / "out/train.jsonl")
    assert [r["id"] for r in again] == [f"q{k}" for k in kept]
    data_prep.main(dataclasses.replace(cfg, task="rethink", out=str(tmp_path / "hinted")))
    hinted = read_records(tmp_path / "hinted/train.jsonl")
    assert {r["task"] for r in hinted} == {"rethink"} and "task" not in again[0]
    assert all("Guidelines" in rewards.build_prompt(r) for r in hinted)


@pytest.mark.parametrize("flags, message", [
    ({"pass_rate": ("0.5",)}, "--pass_rate 0.5: give LOW HIGH"),
    ({"pass_rate": ("0.9", "0.3")}, "--pass_rate 0.9 0.3: give LOW HIGH"),
    ({"pass_rate": ("0", "x")}, "--pass_rate 0 x: give LOW HIGH"),
    ({"pass_rate": ("nan", "1")}, "--pass_rate nan 1"), ({"pass_rate": ("30", "90")}, "--pass_rate 30 90"),
    ({"task": "box"}, "--task box: use plain | "),
    ({"pass_rate": ("0.1", "0.2")}, "hub without its rows left out (5 with pass_rate_7b outside 0.1 .. 0.2, "
                                    "2 with pass_rate_7b unknown, 0 unreadable): no records"),
])
def test_bad_pass_rates_are_one_line(virl39k, tmp_path, flags, message):
    cfg = data_prep.Config(source="records", input=str(virl39k), out=str(tmp_path / "out"), **flags)
    with pytest.raises(ValueError) as error:
        data_prep.main(cfg)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_whose_pass_rate_is_one_of_two():
    with pytest.raises(SystemExit) as stop:
        data_prep.parse_config(data_prep.Config, ["--pass_rate_of", "72b"])
    assert "--pass_rate_of: 72b: use 7b | 32b" in str(stop.value.code)


# ----- real rows -----
def test_mathvision_reads_the_same_from_jsonl_and_parquet():
    from_jsonl = read_records(real("mathvision/sample100.jsonl"))
    from_parquet = read_records(real("format_samples/mathvision_hf_form_100.parquet"))
    assert len(from_jsonl) == 100
    for a, b in zip(from_jsonl, from_parquet, strict=True):
        [file], [embedded] = a.pop("images"), b.pop("images")
        assert a == b and "<image" not in a["question"]
        assert Path(file).read_bytes() == embedded["bytes"]
        assert load_image(file, 4096).mode == "RGB"
    rows = {r["id"]: r for r in from_jsonl}
    assert rows["2828"]["answer"] == r"\frac{16}{7}" and rows["59"]["answer_type"] == "text"
    assert sum(r["answer_type"] == "choice" for r in from_jsonl) == 50


def test_geometry3k_answers_are_never_the_letter_column():
    records = read_records(real("format_samples/geometry3k_hiyouga_form_10.parquet"))
    assert len(records) == 10 and not any(r["answer"] in data_prep.LETTERS for r in records)
    assert records[0]["id"] == "11" and records[0]["answer"] == "80"
    for r in records:
        assert load_image(r["images"][0], 10**6).mode == "RGB"
        assert [part["type"] for part in build_messages(r)[0]["content"]] == ["image", "text"]


def test_mathvista_answers_become_letters():
    records = {r["id"]: r for r in read_records(real("format_samples/mathvista_testmini_sample.json"))}
    assert records["383"]["answer"] == "131253.5" and records["383"]["precision"] == 1
    assert any(r["answer_type"] == "choice" for r in records.values())


# ----- writing -----
def test_round_trip(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.png").write_bytes(png("red"))
    (tmp_path / "elsewhere.png").write_bytes(png("green"))
    refs = [str(tmp_path / "out/mine.png"), str(tmp_path / "elsewhere.png"),
            {"bytes": png("blue"), "path": None}, Image.new("RGB", (30, 40), "white")]
    records = [record(id=f"{k}", images=[ref], question="π?") for k, ref in enumerate(refs)]
    records += [record(id="again", images=[refs[2]])]
    write_records(tmp_path / "out/x.jsonl", records)
    assert not list(tmp_path.glob("**/*.tmp"))
    assert "π" in (tmp_path / "out/x.jsonl").read_text(encoding="utf-8")
    (tmp_path / "out").rename(tmp_path / "moved")  # nothing in it knows where it was
    back = read_records(tmp_path / "moved/x.jsonl")
    assert [r | {"images": []} for r in back] == [r | {"images": []} for r in records]
    colors = [load_image(r["images"][0], 10**6).getpixel((0, 0)) for r in back]
    assert colors == [(255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255), (0, 0, 255)]
    assert Path(back[0]["images"][0]).name == "mine.png" and back[2]["images"] == back[4]["images"]
    assert len(list((tmp_path / "moved/images").iterdir())) == 3


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.jsonl"
    write_records(path, [record(images=[])])
    before = path.read_bytes()
    with pytest.raises(OSError):
        write_records(path, [record(images=[]), record(images=[str(tmp_path.parent / "gone.png")])])
    assert path.read_bytes() == before


# ----- command line -----
def run(*args):
    folder = Path(data_prep.__file__).parent
    return subprocess.run([sys.executable, *map(str, args)], cwd=folder, capture_output=True, text=True)


def test_command_line_skips_bad_images_and_says_so(tmp_path):
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "bad.png").write_bytes(png()[:-30])
    rows = [{"id": k, "question": "Q?", "image": f"{k}.png", "answer": "3"} for k in ("good", "bad")]
    source = jsonl(tmp_path / "in.jsonl", rows)
    command = ["data_prep.py", "--source", "records", "--input", source]
    done = run(*command, "--split", "test", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    skipped, total = done.stdout.splitlines()
    assert skipped.startswith(f"skipped id 'bad': {tmp_path / 'bad.png'}: ")
    assert total == f"{tmp_path / 'out/test.jsonl'}: 1 records (1 number), 1 skipped"
    [kept] = read_records(tmp_path / "out/test.jsonl")
    assert Path(kept["images"][0]).parent == tmp_path / "out/images"

    strict = run(*command, "--strict", "--out", tmp_path / "strict")
    assert strict.returncode == 1 and "(id 'bad')" in strict.stderr.splitlines()[-1]
    assert not (tmp_path / "strict").exists()


def test_nothing_heavy_is_imported():
    heavy = ("torch", "transformers", "datasets", "vllm")
    done = run("-c", f"import data_prep, sys; print([name for name in {heavy} if name in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr
