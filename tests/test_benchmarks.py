"""Published benchmarks: each on-disk format becomes records, prompts and golds that grade as right. Offline.

Rows are real where ../shared/real has them, else made up in the documented columns.
"""
import base64
import collections
import csv
import io
import json
from pathlib import Path

import pytest
from PIL import Image

import data_prep
import eval as stage
import rewards
from data_prep import build_messages, load_image, read_records
from test_api import FOLDER, KEY, MODEL, chat, evaluate, make_rows, refusal, right, serve, waits  # noqa: F401

REAL = Path(__file__).parents[2] / "shared" / "real"
ASK = "\nWork it out step by step between <think> and </think>. Then write only "
END = " between <answer> and </answer>."
LETTER = ASK + "the letter of the option you choose" + END
NUMBER = ASK + "the resulting number" + END
WORDS = ASK + "the answer, in a few words," + END
MATH = ASK + "the result, as a number or in LaTeX," + END
PICTURED = ("The picture shows a question and its options. Work it out step by step between <think> and"
            " </think>. Then write only the letter of the option you choose between <answer> and </answer>.")


def png(color="red"):
    Image.new("RGB", (30, 40), color).save(out := io.BytesIO(), "PNG")
    return out.getvalue()


def embedded(color="red"):
    """An image as `datasets` stores it."""
    return {"bytes": png(color), "path": None}


def colors(record):
    """What a record's images show, in the order in which the prompt shows them."""
    names = {(255, 0, 0): "red", (0, 0, 255): "blue", (0, 128, 0): "green"}
    return [names[load_image(ref, 10**6).getpixel((0, 0))] for ref in record["images"]]


def real(name):
    if not (REAL / name).exists():
        pytest.skip(f"{name} is not here")
    return REAL / name


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def parquet(path, *rows):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def tsv(path, *rows):
    with path.open("w", newline="", encoding="utf-8") as out:
        table = csv.DictWriter(out, list(dict.fromkeys(c for row in rows for c in row)), delimiter="\t")
        table.writeheader()
        table.writerows(rows)
    return path


def graded_right(record):
    """Whether every gold of a record, given as an answer, is right."""
    golds = [record["answer"], *record.get("meta", {}).get("accepted", [])]
    return all(rewards.accuracy(f"<think> so </think> <answer> {gold} </answer>", record | {"answer": gold})
               for gold in golds)


# ----- one row in each format: its fields, its prompt, its images
MATHVISTA = {"pid": "7", "question": "How heavy is it?", "image": "images/7.jpg", "decoded_image": embedded(),
             "choices": None, "unit": "g", "precision": 1.0, "answer": "1.5", "question_type": "free_form",
             "answer_type": "float", "query": "Hint: ..",
             "metadata": {"task": "geometry problem solving", "skills": ["algebraic reasoning"]}}
BARE = MATHVISTA | {"unit": None, "precision": None, "answer_type": "text"}
MATHVERSE = {"sample_index": "3421", "problem_index": "685", "problem_version": "Text Lite",
             "question": "How large is x?\nChoices:\nA:40°\nB:60°", "image": embedded(), "answer": "B",
             "question_type": "multi-choice", "query_wo": "..", "query_cot": "..",
             "metadata": {"split": "testmini", "subject": "Plane Geometry", "subfield": "Angle"}}
MMMU = {"id": "validation_Art_Theory_3", "question": "<image 2> or <image 1>?",
        "options": "['$6', 'It\\'s 7']", "explanation": "",
        **{f"image_{k}": None for k in range(1, 8)}, "image_1": embedded("red"),
        "image_2": embedded("blue"), "img_type": "['Diagrams']", "answer": "B", "topic_difficulty": "Easy",
        "question_type": "multiple-choice", "subfield": "Theory"}
PRO = {"id": "test_History_3", "image": embedded(), "options": "['1', '<image 2>', '3', '4', '5']",
       "answer": "E", "subject": "History"}
EMMA = {"pid": "math_1", "question": "<image_1> Which follows?", "options": ["<image_2>", "<image_3>"],
        "answer": "A", "image_1": embedded("green"), "image_2": embedded("red"), "image_3": embedded("blue"),
        "image_4": None, "image_5": None, "solution": "", "subject": "Math", "task": "Pattern",
        "category": "2D", "source": "web", "type": "Multiple Choice", "context": "Rows go on."}
MEGA = {"id": "1", "task_name": "count_cars", "task_description": "Count the cars.", "global_media": "[]",
        "example_text": "<image> 3", "example_media": "['./data/e.png']", "query_text": "<image> How many?",
        "query_media": "['./data/q.png']", "answer": "{'count': '4', '##note': 'x'}", "eval_context": "{}",
        "metric_info": "{'field_score_function': {'count': 'general_single_numerical_match'},"
                       " 'aggregation': {}, 'response_parse_function': 'answer_string'}"}
SCIENCE = {"image": None, "question": "Which is a solid?", "choices": ["air", "rock"], "answer": 1,
           "hint": "Solids keep their shape.", "task": "closed choice", "grade": "grade3",
           "subject": "natural science", "topic": "physics", "category": "Matter", "skill": "Sort",
           "lecture": "", "solution": "Rock is."}
GEOMETRY = {"id": 11, "problem_text": "Find \\widehat A B.", "annotat_text": "Find $\\widehat{AB}$",
            "choices": ["30", "5 \\sqrt { 3 }"], "answer": "B", "compact_choices": ["30", "5 \\sqrt { 3 }"],
            "precise_value": [30.0, 8.66], "unit": "", "problem_type_goal": ["Angle"], "data_type": "test"}
MCQ = {"index": "4", "question": "Which animal?", "hint": "It barks.", "A": "Cat", "B": "Dog", "C": "",
       "D": "", "answer": "B", "category": "Animals", "image": base64.b64encode(png("blue")).decode()}
CASES = {
    "mathvista float": (MATHVISTA, {
        "id": "7", "answer": "1.5", "answer_type": "number", "precision": 1, "source": "mathvista",
        "meta": MATHVISTA["metadata"] | {"accepted": []}},
        "How heavy is it? (unit: g) Decimal places: 1." + NUMBER, ["red"]),
    "mathvista integer": (BARE | {"answer_type": "integer", "answer": "4"},
                          {"answer": "4", "answer_type": "number"},
                          "How heavy is it? Give a whole number." + NUMBER, ["red"]),
    "mathvista list": (BARE | {"answer_type": "list", "answer": "[2014, 2016]"},
                       {"answer": "[2014, 2016]", "answer_type": "math"},
                       "How heavy is it? Give a Python list." + MATH, ["red"]),
    "mathvista choice": (BARE | {"choices": ["B", "A"], "answer": "A"},  # the text A, so the letter B
                         {"answer": "B", "answer_type": "choice", "choices": ["B", "A"]},
                         "How heavy is it?\n(A) B\n(B) A" + LETTER, ["red"]),
    "mathvista twice the same text": (
        BARE | {"choices": ["3", "4", "3"], "answer": "3"},
        {"answer": "A", "meta": MATHVISTA["metadata"] | {"accepted": ["C"]}},
        "How heavy is it?\n(A) 3\n(B) 4\n(C) 3" + LETTER, ["red"]),
    "mathverse": (MATHVERSE, {
        "id": "3421", "answer": "B", "answer_type": "choice", "choices": ["40°", "60°"],
        "source": "mathverse", "meta": {"version": "Text Lite", **MATHVERSE["metadata"]}},
        MATHVERSE["question"] + LETTER, ["red"]),
    "mathverse vision only": (MATHVERSE | {"question": "", "problem_version": "Vision Only"},
                              {"answer": "B", "choices": list("ABCDEF")}, PICTURED, ["red"]),
    "mathverse vision only, newer": (
        MATHVERSE | {"question": "", "question_for_eval": MATHVERSE["question"]},
        {"answer": "B", "choices": ["40°", "60°"]}, PICTURED, ["red"]),
    "mathverse several": (MATHVERSE | {"answer": "A\nB"}, {"answer": "A, B", "answer_type": "choice"},
                          MATHVERSE["question"] + LETTER, ["red"]),
    "mathverse in parentheses": (MATHVERSE | {"answer": "(B)"}, {"answer": "B"},
                                 MATHVERSE["question"] + LETTER, ["red"]),
    "mathverse text of an option": (MATHVERSE | {"answer": "60掳"}, {"answer": "B"},
                                    MATHVERSE["question"] + LETTER, ["red"]),
    "mathverse open": (MATHVERSE | {"question": "How large is 2掳 + x?", "question_type": "free-form",
                                    "answer": "118掳T", "image": ""},
                       {"answer": "118°T", "answer_type": "math"},
                       "How large is 2° + x?" + MATH, []),
    "mathverse open vision only": (
        MATHVERSE | {"question": "", "question_type": "free-form", "answer": "14"},
        {"answer": "14", "answer_type": "number"},
        "The picture shows a question. Work it out step by step between <think> and </think>."
        " Then write only its answer between <answer> and </answer>.", ["red"]),
    "mmmu": (MMMU, {
        "id": "validation_Art_Theory_3", "answer": "B", "choices": ["$6", "It's 7"], "source": "mmmu",
        "meta": {"subfield": "Theory", "topic_difficulty": "Easy", "subject": "Art_Theory",
                 "discipline": "Art and Design"}},
        "<image> or <image>?\n(A) $6\n(B) It's 7" + LETTER, ["blue", "red"]),
    "mmmu open": (MMMU | {"question": "See <image 1>, <image 1>, <image 5>.", "options": "[]",
                          "answer": "['2.5', '5/2']", "question_type": "open"},
                  {"answer": "2.5", "answer_type": "number"},
                  "<image>See <image>, (image 1), (image 5)." + NUMBER, ["blue", "red"]),
    "mmmu-pro standard": (MMMU | {"id": "test_History_2", "subject": "History", "question": "Which?",
                                  "options": str([*"pqrstuvwxy"]), "answer": "J"},
                          {"answer": "J", "choices": [*"pqrstuvwxy"],
                           "meta": {"subject": "History", "discipline": "Humanities and Social Science",
                                    "subfield": "Theory", "topic_difficulty": "Easy"}},
                          "Which?\n(A) p\n(B) q\n(C) r\n(D) s\n(E) t\n(F) u\n(G) v\n(H) w\n(I) x\n(J) y"
                          + LETTER, ["red", "blue"]),
    "mmmu-pro vision": (
        PRO, {"answer": "E", "choices": ["1", "(image 2)", "3", "4", "5"], "task": "pictured"},
        PICTURED, ["red"]),
    "mmmu-pro vision, options as a list": (PRO | {"options": ["1", "2", "3", "4", "5"]}, {"answer": "E"},
                                           PICTURED, ["red"]),
    "emma": (EMMA, {
        "id": "math_1", "answer": "A", "choices": ["<image>", "<image>"],
        "meta": {"subject": "Math", "task": "Pattern", "category": "2D", "type": "Multiple Choice"}},
        "Rows go on.\n<image> Which follows?\n(A) <image>\n(B) <image>" + LETTER, ["green", "red", "blue"]),
    "emma open": (EMMA | {"options": [], "answer": "12", "context": "", "question": "<image_1>?",
                          "image_2": None, "image_3": None, "type": "Open-ended"},
                  {"answer": "12", "answer_type": "number"}, "<image>?" + NUMBER, ["green"]),
    "mega-bench": (MEGA, {"answer": "4", "answer_type": "number",
                          "meta": {"task": "count_cars", "accepted": []}},
                   "Count the cars.\n<image> 3\n<image> How many?" + NUMBER, ["green", "blue"]),
    "mega-bench phrases": (MEGA | {"answer": "{'a': ['a big dog', 'dog']}", "metric_info": str(
        {"field_score_function": {"a": "multi_ref_phrase"}})},
        {"answer": "a big dog", "answer_type": "text", "meta": {"task": "count_cars", "accepted": ["dog"]}},
        "Count the cars.\n<image> 3\n<image> How many?" + WORDS, ["green", "blue"]),
    "scienceqa": (SCIENCE, {
        "id": "0", "answer": "B", "answer_type": "choice",
        "meta": {"subject": "natural science", "topic": "physics", "category": "Matter", "skill": "Sort",
                 "task": "closed choice", "grade": "grade3"}},
        "Solids keep their shape.\nWhich is a solid?\n(A) air\n(B) rock" + LETTER, []),
    "scienceqa with an image": (SCIENCE | {"image": embedded(), "hint": "", "answer": 0}, {"answer": "A"},
                                "Which is a solid?\n(A) air\n(B) rock" + LETTER, ["red"]),
    "geometry3k": (GEOMETRY, {"id": "11", "answer": "B", "source": "geometry3k",
                              "meta": {"problem_type_goal": ["Angle"]}},
                   "Find $\\widehat{AB}$\n(A) 30\n(B) 5 \\sqrt { 3 }" + LETTER, ["blue"]),
}


def encoded(value):
    """A cell of a JSON file: images are files there."""
    if isinstance(value, dict) and "bytes" in value:
        color = {png(name): name for name in ("red", "blue", "green")}[value["bytes"]]
        return f"{color}.png"
    return value


@pytest.mark.parametrize("name", CASES)
def test_a_row_becomes_a_record_and_a_prompt(tmp_path, name):
    """The same from parquet, with images inside, and from jsonl, with images beside it."""
    row, expected, prompt, shown = CASES[name]
    for color in ("red", "green", "blue"):
        (tmp_path / f"{color}.png").write_bytes(png(color))
    for path, color in (("data/e.png", "green"), ("data/q.png", "blue"), ("11/img_diagram.png", "blue")):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(png(color))
    lines = {column: encoded(value) for column, value in row.items() if column != "decoded_image"}
    if "decoded_image" in row:
        lines["image"] = "red.png"
    [one] = read_records(parquet(tmp_path / "x.parquet", row))
    [two] = read_records(jsonl(tmp_path / "x.jsonl", lines))
    for record in (one, two):
        assert {field: record.get(field) for field in expected} == expected
        assert rewards.build_prompt(record) == prompt
        assert colors(record) == shown and graded_right(record)
        [turn] = build_messages(record)
        assert sum(part["type"] == "image" for part in turn["content"]) == len(shown)
    assert one | {"images": []} == two | {"images": []}


def test_mega_bench_counts_what_it_leaves_out(tmp_path, capsys):
    rows = [MEGA, MEGA | {"id": "2", "query_media": "['./data/q.mp4']", "query_text": "<video>"},
            MEGA | {"id": "3", "answer": "{'x': '1', 'y': '2'}"},
            MEGA | {"id": "4", "metric_info": "{'field_score_function': {'count': 'gpt_4o_as_judge'}}"}]
    assert [r["id"] for r in read_records(jsonl(tmp_path / "x.jsonl", *rows))] == ["1"]
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path}/x.jsonl: left out 1 of 4 rows: it shows a video",
        f"{tmp_path}/x.jsonl: left out 2 of 4 rows: its metric is not covered"]


@pytest.mark.parametrize("row", [
    MMMU | {"answer": None}, MMMU | {"options": 3}, MMMU | {"question": 7}, MEGA | {"answer": "{'a': "},
    MEGA | {"metric_info": None}, MATHVERSE | {"metadata": None}, MATHVISTA | {"precision": "one"},
    MATHVERSE | {"answer": 3}, GEOMETRY | {"annotat_text": None, "choices": {}}])
def test_broken_rows_are_one_line_naming_file_and_row(tmp_path, row):
    path = jsonl(tmp_path / "x.jsonl", {column: encoded(value) for column, value in row.items()
                                        if column != "decoded_image"})
    try:
        read_records(path)
    except ValueError as error:
        assert str(error).startswith(f"{path} row 1") and "\n" not in str(error)


# ----- VLMEvalKit's TSV
def test_tsv_images_are_base64_lists_of_it_or_another_row(tmp_path):
    both = str([base64.b64encode(png(color)).decode() for color in ("red", "green")])
    path = tsv(tmp_path / "x.tsv", MCQ | {"index": "5", "image": "4"}, MCQ,
               MCQ | {"index": "6", "image": both, "question": "<image 2> after <image 1>?"},
               MCQ | {"index": "7", "image": "", "C": "Cow", "hint": "", "answer": "C"})
    records = {r["id"]: r for r in read_records(path)}
    assert [colors(r) for r in records.values()] == [["blue"], ["blue"], ["green", "red"], []]
    assert rewards.build_prompt(records["4"]) == "It barks.\nWhich animal?\n(A) Cat\n(B) Dog" + LETTER
    assert records["6"]["question"] == "It barks.\n<image> after <image>?"
    assert records["7"]["choices"] == ["Cat", "Dog", "Cow"]
    assert records["7"]["meta"] == {"category": "Animals"}
    assert all(map(graded_right, records.values()))


def test_benchmarks_as_tsv(tmp_path):
    """Structures are spelled out there, and several images are one cell."""
    both = str([base64.b64encode(png(color)).decode() for color in ("red", "blue")])
    cells = {column: MATHVERSE[column] for column in MATHVERSE if column not in ("sample_index", "image")}
    row = cells | {"index": "3", "image": MCQ["image"], "metadata": str(MATHVERSE["metadata"])}
    [record] = read_records(tsv(tmp_path / "mathverse.tsv", row | {"problem_version": "Vision Only"}))
    assert record["id"] == "3" and record["choices"] == ["40°", "60°"] and colors(record) == ["blue"]
    assert record["meta"] == {"version": "Vision Only", **MATHVERSE["metadata"]}
    row = {"index": "1", "id": "validation_Art_1", "question": MMMU["question"], "A": "$6", "B": "It's 7",
           "answer": "B", "category": "Art", "l2-category": "Art & Design", "image": both}
    [record] = read_records(tsv(tmp_path / "mmmu.tsv", row))
    assert rewards.build_prompt(record) == CASES["mmmu"][2] and colors(record) == ["blue", "red"]
    assert record["meta"] == {"category": "Art", "l2-category": "Art & Design"}


@pytest.mark.parametrize("image", ["9", "A" * 121])
def test_a_bad_tsv_image_names_its_row(tmp_path, image):
    with pytest.raises(ValueError, match="x.tsv: index 4: image is neither base64 nor a row's index"):
        read_records(tsv(tmp_path / "x.tsv", MCQ | {"image": image}))


@pytest.mark.parametrize("name, answers", [
    ("evalscope_mcq_example.tsv", {"1": "A", "2": "D", "3": "B", "4": "C", "5": "A"}),
    ("evalscope_vqa_example.tsv", {"1": "Dog", "2": "Museum", "3": "Tokyo", "4": "Tesla", "5": "Running"})])
def test_real_tsv_files_with_image_paths(name, answers):
    path = real(f"format_samples/{name}")
    records = read_records(path)
    assert {r["id"]: r["answer"] for r in records} == answers and all(map(graded_right, records))
    assert records[0]["images"] == [str(path.parent / "custom_eval/multimodal/images/dog.jpg")]


def test_mathvision_reads_the_same_from_tsv():
    from_tsv = read_records(real("format_samples/mathvision_vlmevalkit_form_10.tsv"))
    whole = {r["id"]: r for r in read_records(real("mathvision/sample100.jsonl"))}
    assert len(from_tsv) == 10
    for record in from_tsv:
        other = whole[record["id"]]
        assert record["meta"] == other["meta"] and record.get("choices") == other.get("choices")
        assert record["answer"] == other["answer"] and load_image(record["images"][0], 10**6)


# ----- other real rows
def test_every_real_row_grades_its_own_gold_as_right():
    """MATH-Vision, MathVista, MathVerse and Geometry3K, without exception."""
    counts = {}
    for name in ("mathvision/sample100.jsonl", "format_samples/mathvista_testmini_sample.json",
                 "format_samples/mathverse_testmini_text_only.json",
                 "format_samples/mathverse_output_template.json",
                 "format_samples/geometry3k_original_10.json",
                 "format_samples/geometry3k_hiyouga_form_10.parquet"):
        records = read_records(real(name))
        counts[name] = len(records)
        assert [r["id"] for r in records if not graded_right(r)] == []
    assert [*counts.values()] == [100, 22, 788, 5, 10, 10]


def test_real_mathverse_golds():
    records = read_records(real("format_samples/mathverse_testmini_text_only.json"))
    kinds = collections.Counter(r["answer_type"] for r in records)
    assert kinds["choice"] == 436 and sum(kinds.values()) == 788
    assert sorted(r["answer"] for r in records if len(r["answer"]) > 1 and "choices" in r) == ["A, C", "C, D"]
    assert not any("掳" in r["answer"] + r["question"] for r in records)
    assert all(rewards.build_prompt(r) == r["question"] + LETTER for r in records if "choices" in r)
    five = read_records(real("format_samples/mathverse_output_template.json"))
    assert [r["meta"]["version"] for r in five] == [
        "Text Dominant", "Text Lite", "Vision Intensive", "Vision Dominant", "Vision Only"]


def test_several_letters_are_right_only_together():
    record = {"question": "?", "answer": "C, D", "answer_type": "choice", "choices": list("wxyz")}
    data_prep.check_record(record | {"id": "1", "images": []}, "row")
    assert [rewards.accuracy(f"\\boxed{{{text}}}", record) for text in ("C, D", "D and C", "C", "A, C")] == [
        1, 1, 0, 0]
    with pytest.raises(ValueError, match="must be a letter A-D, not 'C, E'"):
        data_prep.check_record(record | {"id": "1", "images": [], "answer": "C, E"}, "row")


# ----- where the rows lie
def test_a_folder_is_read_by_split(tmp_path):
    for subject, answer in (("Art", "A"), ("Math", "B")):
        (tmp_path / subject).mkdir()
        for split in ("dev", "validation"):
            row = MMMU | {"id": f"{split}_{subject}_1", "answer": answer}
            parquet(tmp_path / subject / f"{split}-00000-of-00001.parquet", row)
    records = read_records(tmp_path, "validation")
    assert [(r["id"], r["answer"]) for r in records] == [("validation_Art_1", "A"),
                                                         ("validation_Math_1", "B")]
    jsonl(tmp_path / "testmini.jsonl", SCIENCE)
    jsonl(tmp_path / "testmini_text_only.jsonl", SCIENCE)
    assert len(read_records(tmp_path, "testmini")) == 1
    with pytest.raises(ValueError):
        read_records(tmp_path, "test")


def test_geometry3k_as_published(tmp_path):
    for name, answer in ((11, "B"), (12, "A")):
        (tmp_path / f"{name}").mkdir()
        (tmp_path / f"{name}/data.json").write_text(json.dumps(GEOMETRY | {"id": name, "answer": answer}))
        (tmp_path / f"{name}/img_diagram.png").write_bytes(png("green"))
    records = read_records(tmp_path, "test")
    assert [(r["id"], r["answer"], *colors(r)) for r in records] == [("11", "B", "green"),
                                                                     ("12", "A", "green")]


@pytest.mark.parametrize("source, asked", [
    ("luckychao/EMMA:*", [("luckychao/EMMA", "Math"), ("luckychao/EMMA", "Physics")]),
    ("MMMU/MMMU_Pro:standard (10 options)", [("MMMU/MMMU_Pro", "standard (10 options)")]),
    ("hiyouga/geometry3k", [("hiyouga/geometry3k",)])])
def test_hub_configurations(monkeypatch, source, asked):
    datasets, calls = pytest.importorskip("datasets"), []

    def load(*args, split):
        calls.append(args)
        assert split == "test"
        return datasets.Dataset.from_list([EMMA | {"pid": f"{args[-1]}_1"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["Math", "Physics"])
    records = read_records(source, "test")
    assert calls == asked and [r["id"] for r in records] == [f"{call[-1]}_1" for call in asked]


# ----- eval.py: which benchmarks, and their scores
OFFICIAL = {"mathvista": 1000, "mathverse": 3940, "mathverse-text-only": 788, "mathvision": 3040,
            "mathvision-mini": 304, "mmmu": 900, "mmmu-pro-standard-4": 1730, "mmmu-pro-standard-10": 1730,
            "mmmu-pro-vision": 1730, "emma": 892 + 156 + 1176 + 564, "scienceqa": 4241, "scienceqa-img": 2017,
            "geometry3k": 601}


def test_official_sizes_and_sources():
    assert {name: bench.size for name, bench in stage.BENCHES.items() if bench.size} == OFFICIAL
    assert all(data_prep.HUB_ID.fullmatch(bench.hub) for bench in stage.BENCHES.values() if bench.hub)
    assert len(data_prep.DISCIPLINES) == 30 and len(set(data_prep.DISCIPLINES.values())) == 6


def test_a_benchmark_is_read_from_data_or_else_the_hub(monkeypatch, capsys, serve):  # noqa: F811
    """Named, it is downloaded if it is not here."""
    datasets, calls = pytest.importorskip("datasets"), []

    def load(name, config, split):
        calls.append((name, config, split))
        return datasets.Dataset.from_list([PRO | {"id": f"test_History_{config[0]}"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    server = serve(lambda row, n, s: chat("<answer> E </answer>"))
    argv = ["--engine", "api", "--base_url", server.url, "--bench"]
    stage.main(stage.parse_config(stage.Config, [*argv, "mmmu-pro-standard-10", "mmmu-pro-vision"]))
    assert calls == [("MMMU/MMMU_Pro", "standard (10 options)", "test"), ("MMMU/MMMU_Pro", "vision", "test")]
    shown = capsys.readouterr().out
    assert "mmmu-pro-vision: 1 rows, the official split has 1730: not comparable" in shown
    assert "| mmmu-pro average | 2 | 100.0 |" in shown
    assert "| mmmu-pro-vision, discipline Humanities and Social Science | 1 | 100.0 |" in shown
    Path("data/mmmu-pro-vision").mkdir(parents=True)
    jsonl(Path("data/mmmu-pro-vision/test.jsonl"), PRO | {"image": "x.png"})
    assert [(name, bench.path) for name, bench in stage.find_benches(["mmmu-pro-vision"])] == [
        ("mmmu-pro-vision", "data/mmmu-pro-vision/test.jsonl")]
    assert "mega-bench/test.jsonl: no such file" in refusal("--base_url", server.url, "--bench", "mega-bench")


def scored(name, *rows):
    """Summary entry of (meta, correct) rows."""
    records = [{"id": str(i), "question": "?", "answer": "1", "answer_type": "number", "meta": meta}
               for i, (meta, _) in enumerate(rows)]
    lines = [stage.graded(record, [{"response": str(int(correct)), "tokens": 1, "truncated": False}],
                          {"n": 1}) for record, (_, correct) in zip(records, rows)]
    return stage.summarise(name, stage.BENCHES[name], records, lines, 1.0)


def test_scores_by_skill_version_and_task():
    entry = scored("mathvista", ({"task": "a", "skills": ["x", "y"]}, True),
                   ({"task": "a", "skills": ["x"]}, False), ({"task": "b", "skills": ["y"]}, False))
    by = {field: {value: (group["n"], group["accuracy"]) for value, group in groups.items()}
          for field, groups in entry["by"].items()}
    assert by == {"task": {"a": (2, 0.5), "b": (1, 0.0)}, "skills": {"x": (2, 0.5), "y": (2, 0.5)}}
    entry = scored("mathverse", ({"version": "Text Lite"}, True), ({"version": "Vision Only"}, False))
    assert entry["by"]["version"]["Text Lite"]["accuracy"] == 1 and entry["accuracy"] == 0.5
    entry = scored("mega-bench", *[({"task": "long"}, False)] * 3, ({"task": "short"}, True))
    assert (entry["accuracy"], entry["n"], entry["by"]) == (0.5, 4, {})  # each task alike


def test_any_accepted_answer_is_right():
    record = {"question": "?", "answer": "big dog", "answer_type": "text", "meta": {"accepted": ["hound"]}}
    texts = ("hound", "big dog", "cat")
    assert [stage.grade(f"<answer>{text}</answer>", record) for text in texts] == [1, 1, 0]


# ----- several samples
@pytest.mark.parametrize("record, answers, extracted, correct", [
    ({"answer": "3", "answer_type": "number"}, ["4", "3", "3.0", "4 ", "5", "three", "3 cm"], "3", 1),
    ({"answer": "4", "answer_type": "number"}, ["3", "4", "4", "3"], "3", 0),  # a tie: the first seen
    ({"answer": "\\frac{1}{2}", "answer_type": "math"}, ["2", "0.5", "\\frac12", "2", "50\\%"], "0.5", 1),
    ({"answer": "B", "answer_type": "choice", "choices": ["red", "blue"]},
     ["A", "(B)", "blue", "A", "b"], "(B)", 1),
    ({"answer": "3", "answer_type": "number", "meta": {"accepted": ["7"]}}, ["5", "6", "7", "7"], "7", 1),
    ({"answer": "3", "answer_type": "number"}, ["", "", "3"], "3", 1),  # silence is no answer
    ({"answer": "3", "answer_type": "number"}, ["", ""], None, 0),
])
def test_the_majority_counts_equal_answers_however_written(record, answers, extracted, correct):
    record = {"id": "1", "question": "?", **record}
    replies = [{"response": f"<answer>{a}</answer>" if a else "", "tokens": i, "truncated": i == 0}
               for i, a in enumerate(answers)]
    n = len(replies)
    row = stage.graded(record, replies, {"n": n})
    assert (row["extracted"], row["scores"][f"maj@{n}"]) == (extracted, correct)
    each = [stage.grade(reply["response"], record) for reply in replies]
    assert row["correct"] == pytest.approx(sum(each) / n) and [s["correct"] for s in row["samples"]] == each
    assert row["tokens"] == pytest.approx((n - 1) / 2) and row["truncated"] == pytest.approx(1 / n)


def test_samples_from_a_server(serve, capsys):  # noqa: F811
    """Four samples a row with seeds of their own; a second run asks nothing, another n everything."""
    make_rows(3)
    server = serve(lambda row, n, s: right(row) if n % 4 else chat("<answer> 9 </answer>"))
    flags = ["--n", "4", "--temperature", "0.6"]
    rows = evaluate(server, *flags)
    assert len(server.asked) == 12 and len({body["seed"] for body in server.bodies}) == 12
    assert {row["correct"] for row in rows.values()} == {0.75} and len(rows["row-1"]["samples"]) == 4
    assert "| rows | 3 | 75.0 (maj@4 100.0) |" in capsys.readouterr().out
    assert evaluate(server, *flags) == rows and len(server.asked) == 12
    evaluate(server, "--n", "2", "--temperature", "0.6")
    assert len(server.asked) == 18


def test_a_failed_sample_fails_its_row(serve):  # noqa: F811
    make_rows(2)
    server = serve(lambda row, n, s: (400, {}, b"no") if (row, n) == ("row-1", 2) else right(row))
    rows = evaluate(server, "--n", "3", "--temperature", "1")
    assert rows["row-1"]["error"] == "HTTP 400: no" and rows["row-1"]["correct"] == 0
    assert rows["row-1"]["scores"] == {"maj@3": 0} and rows["row-0"]["scores"] == {"maj@3": 1}
    assert len(server.asked) == 5
    rows = evaluate(server, "--n", "3", "--temperature", "1")
    assert len(server.asked) == 8 and rows["row-1"]["correct"] == 1


def test_samples_from_transformers(tiny, monkeypatch):
    """As many as asked, different, the same again; a single greedy answer is what it was."""
    data_prep.write_records("rows.jsonl", tiny.records[:3])
    argv = ["--model", tiny.model, "--bench", "rows.jsonl", "--max_new_tokens", "6"]

    def run(*flags):
        stage.main(stage.parse_config(stage.Config, [*argv, *flags]))
        path = Path(tiny.model, "eval/rows.jsonl")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.unlink()
        return rows

    sampled = ["--n", "3", "--temperature", "1.0"]
    rows = run(*sampled)
    assert [len({s["response"] for s in row["samples"]}) for row in rows] == [3, 3, 3]
    assert run(*sampled, "--batch_rows", "1") == rows
    assert "samples" not in run()[0]


# ----- a judge model
def test_a_judge_reads_what_the_rules_could_not(serve, capsys):  # noqa: F811
    """Only wrong rows go to it, it sees no gold and no image, the rules grade what it read."""
    make_rows(4, images=1)
    words = {"row-0": "<answer> 0 </answer>", "row-1": "Either 1 or 7, I would settle for the former.",
             "row-2": "Who knows?", "row-3": ""}

    server = serve(lambda row, n, s: chat(words[row]))
    judge = serve(lambda row, n, s: chat({"row-1": "<think>\\boxed{7}?</think>1", "row-2": "none"}[row]))
    flags = ["--judge", "api", "--judge_url", judge.url, "--judge_model", "reader"]
    rows = evaluate(server, *flags)
    assert sorted(judge.asked) == ["row-1", "row-2"] and sorted(server.asked) == [*words]
    [[part]] = [b["messages"][0]["content"] for b in judge.bodies if "row-1 ?" in str(b)]
    assert words["row-1"] in part["text"] and "Work it out" not in part["text"]
    assert judge.bodies[0]["model"] == "reader"
    assert rows["row-1"]["judge"] == {"model": "reader", "extracted": "1", "correct": 1.0}
    assert rows["row-2"]["judge"]["correct"] == 0 and "judge" not in rows["row-0"]
    assert [row["correct"] for row in rows.values()] == [1, 0, 0, 0]  # the rules' verdicts stay
    assert "| rows | 4 | 50.0 (by the rules 25.0) |" in capsys.readouterr().out
    assert evaluate(server, *flags) == rows and len(judge.asked) == 2 and len(server.asked) == 4
    evaluate(server)
    assert "| rows | 4 | 25.0 |" in capsys.readouterr().out and len(server.asked) == 4


@pytest.mark.parametrize("said, letter", [
    ("B", "B"), ("5.5", "C"), ("", "A"), ("none", "A"), ("6.5", "C"), ("16 cm", "D"), ("(B) 5", "B")])
def test_mathvista_takes_what_is_no_option_for_the_one_spelled_most_alike(said, letter):
    choices = ["4", "5", "5.5", "6 cm"]
    record = {"question": "?", "answer": "A", "answer_type": "choice", "choices": choices}
    read = stage.nearest_option(said, record)
    assert rewards.accuracy(f"<answer>{read}</answer>", record | {"answer": letter}) == 1


def test_edit_distance():
    for a, b, steps in (("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2),
                        ("6.5", "5.5", 1), ("Yes", "no", 3)):
        assert stage.edit_distance(a, b) == stage.edit_distance(b, a) == steps


def test_a_judge_of_mathvista_never_reads_a_refusal_as_none(serve):  # noqa: F811
    """The published protocol, for the leaderboard alone: the rules still call it wrong."""
    data_prep.write_records("rows.jsonl", [
        {"id": f"row-{i}", "question": f"row-{i} ?", "images": [], "answer": "B", "answer_type": "choice",
         "choices": ["Maybe", "No"], "source": source}
        for i, source in enumerate(("mathvista", "mathverse"))])
    server, judge = serve(lambda row, n, s: chat("I cannot see it.")), serve(lambda row, n, s: chat("none"))
    rows = evaluate(server, "--judge", "api", "--judge_url", judge.url, "--judge_model", "reader")
    assert [row["judge"]["correct"] for row in rows.values()] == [1, 0]
    assert [row["correct"] for row in rows.values()] == [0, 0]


def test_a_judge_that_fails_is_asked_again(serve, monkeypatch, capsys):  # noqa: F811
    """Its key is its own; the model's name comes from its list; a failure is named and costs no answer."""
    make_rows(2)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("JUDGE_API_KEY", "judge-key")
    server = serve(lambda row, n, s: chat("No idea."))
    judge = serve(lambda row, n, s: (400, {}, b"judge-key?") if n == 1 else right(row))
    rows = evaluate(server, "--judge", "api", "--judge_url", judge.url)
    assert rows["row-0"]["judge"] == {"error": "HTTP 400: [key]?"}
    assert "rows row-1: HTTP 400: [key]?" in capsys.readouterr().out
    rows = evaluate(server, "--judge", "api", "--judge_url", judge.url)
    assert [row["judge"]["correct"] for row in rows.values()] == [1, 1] and len(server.asked) == 2
    assert {h["Authorization"] for h in judge.headers} == {"Bearer judge-key"}
    assert {h["Authorization"] for h in server.headers} == {f"Bearer {KEY}"}
    assert judge.bodies[0]["model"] == MODEL and judge.bodies[0]["temperature"] == 0
    evaluate(server, "--judge", "api", "--judge_model", "same server")
    assert server.headers[-1]["Authorization"] == f"Bearer {KEY}" and len(server.asked) == 4


@pytest.mark.parametrize("flags, named", [
    (["--n", "0"], "--n 0: must be at least 1"), (["--judge", "gpt"], "--judge: gpt: use off | api"),
    (["--n", "8"], "--n 8: at temperature 0 all samples are the same"),
    (["--judge_url", "x"], "--judge_url x: must begin with"),
    (["--judge", "api", "--n", "2", "--temperature", "1"], "leave --n at 1")])
def test_bad_flags(flags, named):
    assert named in refusal("--bench", "rows.jsonl", *flags)


def test_a_judge_that_is_not_there_stops_the_run_before_it_begins(serve):  # noqa: F811
    make_rows(1)
    server, judge = serve(), serve()
    judge.stop()
    message = refusal("--base_url", server.url, "--bench", "rows.jsonl", "--judge", "api",
                      "--judge_url", judge.url)
    assert judge.url in message and not server.asked


# ----- questions without an answer
def test_questions_without_gold_are_answered_not_graded(serve, capsys):  # noqa: F811
    rows = [{"question": f"row-{i} ?", "images": []} for i in range(3)]
    jsonl(Path("rows.jsonl"), *rows)
    server = serve(lambda row, n, s: chat(f"<answer> {row} </answer>"))
    written = evaluate(server)
    assert [(row["id"], row["answer"], row["correct"], row["response"]) for row in written.values()] == [
        (str(i), None, None, f"<answer> row-{i} </answer>") for i in range(3)]
    shown = capsys.readouterr().out
    assert f"rows: 3 rows without a gold answer are answered in {FOLDER}/rows.jsonl" in shown
    assert "|" not in shown
    jsonl(Path("rows.jsonl"), *rows, {"question": "row-3 ?", "images": [], "answer": "row-3"})
    evaluate(server, "--n", "2", "--temperature", "1")
    assert "| rows | 1 | 100.0 (maj@2 100.0) |" in capsys.readouterr().out
