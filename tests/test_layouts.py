"""Rows as other frameworks write them: the record each must give, or the line it must say.
Offline, without torch.

python -m pytest tests/test_layouts.py
"""
import base64
import json
import os
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import data_prep
import rewards
from data_prep import BadImage, image_bytes, load_image, read_records
from test_data_prep import jsonl, png

CASES = Path(__file__).parents[2] / "shared" / "cases" / "layouts"
RED = png("red")
INLINE = base64.b64encode(RED).decode()
CHOICE = {"answer": "B", "answer_type": "choice", "choices": ["cat", "dog"]}
ASKED = {"question": "q", "answer": "3", "answer_type": "number"}


def write(path, rows):
    """The rows as a file of the kind that its name says."""
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow.parquet import write_table
        write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix in (".tsv", ".csv"):
        tab = "," if path.suffix == ".csv" else "\t"
        lines = [[*rows[0]], *([str(cell) for cell in row.values()] for row in rows)]
        path.write_text("\n".join(map(tab.join, lines)))
    else:
        jsonl(path, rows)
    return path


def read(tmp_path, *rows, name="x.jsonl", need=("answer",)):
    return read_records(write(tmp_path / name, rows), need=need)


def parts(record, expected):
    return {field: record.get(field) for field in expected}


# ----- files that were handed over
@pytest.mark.parametrize("name, expected", [
    ("bom.jsonl", [ASKED]),
    ("bytes_only.parquet", [{"question": "How many <image>?", "answer": "5"}]),
    ("choices_dict.jsonl", [CHOICE]), ("choices_lower.jsonl", [CHOICE]), ("choices_paren.jsonl", [CHOICE]),
    ("options_struct.parquet", [CHOICE]),
    ("choices_int_gold.jsonl", [CHOICE | {"choices": ["3", "4"]}]),
    ("choices_multi.jsonl", [{"answer": "A, C", "answer_type": "choice", "choices": ["a1", "b1", "c1"]}] * 3),
    ("image_bytes_dict.jsonl", [ASKED]), ("img_col.jsonl", [ASKED]), ("jsonl_in_json.json", [ASKED] * 2),
    ("nonstring_answer.jsonl", [{"answer": "3", "answer_type": "number"}, {"answer": "3.5"},
                                {"answer": "True"}, {"answer": "3", "meta": None},
                                {"answer": "3", "meta": {"accepted": ["three"]}}]),
    ("openai_messages.jsonl", [{"question": "<image>Find x", "answer": "5", "response": None}]),
    ("qwen_messages.jsonl", [{"question": "<image>Find x", "answer": "5", "response": None}]),
])
def test_files_of_others(name, expected):
    if not (CASES / name).exists():
        pytest.skip(f"{name} is not here")
    records = read_records(CASES / name)
    assert [parts(record, fields) for record, fields in zip(records, expected, strict=True)] == expected
    for record in records:
        [ref] = record["images"]
        assert load_image(ref, 10**6).size == Image.open(CASES / "a.png").size
        assert ref == str(CASES / "a.png") or name.endswith(".parquet")
        assert rewards.accuracy(f"<answer>{record['answer']}</answer>", record) == 1


@pytest.mark.parametrize("name, images", [
    ("b64_image.jsonl", [{"bytes": b"\x89PNG\r\n\x1a\n", "path": None}]),
    ("file_uri.jsonl", ["/data/pictures/a.png"])])
def test_files_whose_image_is_not_here(name, images):
    if not (CASES / name).exists():
        pytest.skip(f"{name} is not here")
    [record] = read_records(CASES / name)
    assert record["images"] == images and parts(record, ASKED) == ASKED


@pytest.mark.parametrize("name, reason", [
    ("nan_answer.jsonl", "1 of 1 rows: its answer is nan"),
    ("r1v_dict_solution.jsonl", "1 of 1 rows: its answer is an object")])
def test_files_without_a_usable_row(name, reason):
    if not (CASES / name).exists():
        pytest.skip(f"{name} is not here")
    with pytest.raises(ValueError) as error:
        read_records(CASES / name)
    assert str(error.value) == f"{CASES / name}: no records: left out {reason}"


# ----- golds and options
@pytest.mark.parametrize("gold, answer", [
    ("B", "B"), ("(B)", "B"), ("b", "B"), ("B.", "B"), ("b)", "B"), ("(b).", "B"), ("dog", "B"), ("Dog", "B"),
    ("B. dog", "B"), ("(B) dog", "B"), (1, "B"), (1.0, "B"), (["B"], "B"), ("<answer>B</answer>", "B"),
    (r"So it barks and is \boxed{B}", "B"), (r"\boxed{\text{B}}", "B"),
    ("<think>It barks.</think><answer> b </answer>", "B"),
    (["A", "B"], "A, B"), ("AB", "A, B"), ("B,A", "A, B"), ("(A) and (B)", "A, B"), (["dog", "cat"], "A, B"),
    ("A;B", "A, B"), ("['A', 'B']", "A, B")])
def test_a_gold_names_its_option_in_many_ways(tmp_path, gold, answer):
    row = {"question": "q", "image": "a.png", "answer": gold}
    [record] = read(tmp_path, row | {"options": ["cat", "dog"]})
    assert record["answer"] == answer and record["answer_type"] == "choice"


@pytest.mark.parametrize("options, gold, choices, answer", [
    ({"A": "cat", "B": "dog"}, "dog", ["cat", "dog"], "B"),
    ({"B": "dog", "A": "cat"}, "B", ["cat", "dog"], "B"),
    ({"A": "cat", "B": "dog", "C": None}, "B", ["cat", "dog"], "B"),
    ({"1": "cat", "2": "dog"}, "2", ["cat", "dog"], "B"), ({"1": "cat", "2": "dog"}, 1, ["cat", "dog"], "A"),
    ([{"letter": "A", "content": "cat"}, {"letter": "B", "content": "dog"}], "B", ["cat", "dog"], "B"),
    ([{"label": "1", "text": "cat"}, {"label": "2", "text": "dog"}], "2", ["cat", "dog"], "B"),
    ({"label": ["A", "B"], "text": ["cat", "dog"]}, "B", ["cat", "dog"], "B"),
    ("['cat', 'dog']", "b", ["cat", "dog"], "B"), ("{'A': 'cat', 'B': 'dog'}", "B", ["cat", "dog"], "B"),
    ("A. cat\nB. dog", "B", ["cat", "dog"], "B"), ("(A) cat (B) dog", "dog", ["cat", "dog"], "B"),
    (["A. cat", "B. dog"], "B. dog", ["cat", "dog"], "B"), (["(A) cat", "(B) dog"], "b", ["cat", "dog"], "B"),
    (["Yes", "No"], False, ["Yes", "No"], "B"), (["No", "Yes"], True, ["No", "Yes"], "B"),
    ([3, 4], 4, ["3", "4"], "B"), ([1, 2, 3], 1, ["1", "2", "3"], "A"),
    ([0.5, 1.5], 1.5, ["0.5", "1.5"], "B"),
    (["True", "False"], True, ["True", "False"], "A"), (["False", "true"], True, ["False", "true"], "B"),
    (["B", "A"], "B", ["B", "A"], "B"), (["b", "a"], "b", ["b", "a"], "A"),
    (["A", "AB"], "AB", ["A", "AB"], "B"),
])
def test_options_in_many_forms(tmp_path, options, gold, choices, answer):
    [record] = read(tmp_path, {"question": "q", "image": "a.png", "answer": gold, "options": options})
    assert (record["choices"], record["answer"], record["answer_type"]) == (choices, answer, "choice")


@pytest.mark.parametrize("question, gold, choices", [
    ("Which?\n(A) cat\n(B) dog", "B", ["cat", "dog"]), ("Which?\nA. cat\nB. dog", "(b)", ["cat", "dog"]),
    ("Which?\nA. cat\nB. dog", "dog", ["cat", "dog"]), ("Which?\nA. cat\nB. dog", "owl", None),
    ("Is A or B higher?", "B", None)])
def test_options_in_the_question(tmp_path, question, gold, choices):
    [record] = read(tmp_path, {"problem": question, "image": "a.png", "solution": gold})
    assert record.get("choices") == choices and record["answer"] == ("B" if choices else gold)


@pytest.mark.parametrize("gold, answer", [
    ("<answer> 5 </answer>", "5"), (r"\boxed{5}", "5"), (r"$5$", "5"), (["5"], "5"), (5, "5"),
    (2.5, "2.5"), (True, "True"),
    ("<think>2 + 3</think>\n<answer>5</answer>", "5"), ("Two and three make \\boxed{5}.", "5"),
    ("2 + 3 = <<2+3=5>>5\n#### 5", "5"), (r"\boxed{1}, \boxed{2}", r"\boxed{1}, \boxed{2}"),
    (r"\boxed{5} cm", r"\boxed{5} cm"), ("[1, 2]", "[1, 2]"), ("NaN bread", "NaN bread")])
def test_open_golds(tmp_path, gold, answer):
    [record] = read(tmp_path, {"problem": "q", "image": "a.png", "solution": gold})
    assert record["answer"] == answer and rewards.accuracy(f"<answer>{answer}</answer>", record) == 1


LONG = "We look at the picture and think about it for a while. " * 3


def test_a_worked_solution_must_state_its_answer(tmp_path, capsys):
    rows = [{"problem": "q", "image": "a.png", "solution": text} for text in (
        LONG + "So the answer is 5.", LONG + "\\boxed{5}", LONG, "5")]
    assert [record["answer"].strip(".") for record in read(tmp_path, *rows)] == ["5"] * 3
    assert "1 of 4 rows: its solution states no answer" in capsys.readouterr().err


@pytest.mark.parametrize("column, value, reason", [
    ("answer", {"value": 3}, "its answer is an object"),
    ("answer", "{'value': 3}", "its answer is an object"),
    ("answer", float("nan"), "its answer is nan"), ("answer", float("inf"), "its answer is inf"),
    ("answer", None, "it has no answer"),
    ("answer", [1, 2, 3, 4], "its answer is a list of numbers"),
    ("answer", [[1, 2]], "its answer holds lists"),
    ("answer", [{"value": 3}], "its answer is an object"), ("answer", [], "its answer is an empty list"),
    ("videos", ["a.mp4"], "it shows a video"), ("video", "a.mp4", "it shows a video"),
    ("audio", "a.wav", "it plays a sound"), ("question", "<video>q", "it shows a video"),
    ("image", "a.mp4", "it shows a video"),
    ("image", {"bytes": None, "path": None}, "its image has neither bytes nor a path"),
    ("options", [{"bytes": "", "path": "b.png"}], "its options are no texts"),
    ("options", [*range(27)], "it has more than 26 options"),
    ("image", "https://example.org/a.png", "its image is on the web, and nothing is downloaded"),
    ("image", {"url": "http://example.org/a.png"}, "its image is on the web, and nothing is downloaded"),
])
def test_what_cannot_be_used_is_left_out_and_counted(tmp_path, capsys, monkeypatch, column, value, reason):
    good = {"question": "q", "image": "a.png", "answer": "3"}
    records = read(tmp_path, good, good | {column: value}, good, good | {column: value})
    assert [record["id"] for record in records] == ["0", "2"]
    assert capsys.readouterr().err == f"{tmp_path}/x.jsonl: left out 2 of 4 rows: {reason}\n"
    monkeypatch.setenv("RANK", "1")
    # one rank says it
    assert len(read(tmp_path, good, good | {column: value})) == 1 and not capsys.readouterr().err
    with pytest.raises(ValueError, match="x.jsonl: no records: left out 1 of 1 rows: its|it "):
        read(tmp_path, good | {column: value})


def test_rows_of_only_null_and_missing_columns(tmp_path, capsys):
    """The first row lacks its image, and what is NaN to pandas is nothing, but as a gold."""
    good = {"question": "q", "answer": "3"}
    rows = [good, good | {"image": "a.png", "choices": float("nan"), "hint": float("nan")},
            good | {"image": None}, {"question": None, "answer": None, "image": None}]
    assert [len(record["images"]) for record in read(tmp_path, *rows)] == [0, 1, 0]
    assert "left out 1 of 4 rows: it is empty" in capsys.readouterr().err
    records = read(tmp_path, *(row | {"image": row.get("image")} for row in rows[:1] + rows[3:]),
                   name="x.parquet")
    assert len(records) == 1
    for name in ("x.parquet", "x.jsonl"):
        for empty in (rows[3], rows[3] | {"id": "7"}):
            with pytest.raises(ValueError, match="left out 1 of 1 rows: it is empty"):
                read(tmp_path, empty, name=name)


@pytest.mark.parametrize("name, text", [("x.jsonl", ""), ("x.jsonl", "\n\n"), ("x.json", "[]"), ("x.tsv", ""),
                                        ("x.tsv", "index\tquestion\tanswer\n"), ("x.csv", "")])
def test_empty_files(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}: no records$"):
        read_records(tmp_path / name)


def test_what_a_generic_row_says_of_itself_is_kept(tmp_path):
    row = {"question": "q", "image": "a.png", "answer": "3", "answer_type": "text", "system": "Be brief."}
    as_easyr1 = {"problem": "q", "images": ["a.png"], "answer": "3", "answer_type": "text",
                 "system": "Be brief."}
    for each in row, as_easyr1:
        [record] = read(tmp_path, each)
        assert (record["answer_type"], record["system"]) == ("text", "Be brief.")
    [record] = read(tmp_path, row | {"answer_type": "integer"})
    assert record["answer_type"] == "number"
    for kind, gold in (("boxes", [[1, 2, 3, 4]]), ("distribution", {"joy": 1.0})):
        for answer in (gold, json.dumps(gold)):
            [record] = read(tmp_path, row | {"answer_type": kind, "answer": answer})
            assert (record["answer_type"], record["answer"]) == (kind, json.dumps(gold))


def test_names_in_capitals_and_values_of_mixed_types(tmp_path):
    row = {"Question": "Which?", "Image": "a.png", "A": "cat", "B": 0, "Answer": "B"}
    [record] = read(tmp_path, row)
    assert record["choices"] == ["cat", "0"] and record["answer"] == "B"
    rows = [{"question": "q", "image": image, "answer": gold} for image, gold in [
        ("a.png", 3), (["a.png"], "3"), ({"path": "a.png"}, 3.0), ([{"url": "a.png"}], ["3"]),
        ("['a.png']", "$3$")]]
    for record in read(tmp_path, *rows):
        assert record["images"] == [str(tmp_path / "a.png")] and float(record["answer"]) == 3


# ----- turns
def chat(content, said="5", **columns):
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": said}],
            **columns}


TEXT = {"type": "text", "text": "Find x"}


@pytest.mark.parametrize("row", [
    chat([{"type": "image_url", "image_url": {"url": "a.png"}}, TEXT], [{"type": "text", "text": "5"}]),
    chat([{"type": "image", "image": "a.png"}, TEXT]), chat([{"image": "a.png"}, {"text": "Find x"}]),
    chat([{"type": "input_image", "image_url": "a.png"}, {"type": "input_text", "text": "Find x"}]),
    chat([{"type": "image"}, TEXT], images=["a.png"]),
    chat([{"type": "image", "text": None, "image": "a.png"}, "Find x"]),
    chat([{"type": "image", "path": "a.png"}, TEXT]), chat("<image>Find x", images="a.png"),
    {"image": "a.png", "conversations": [{"from": "human", "value": "<image>Find x"},
                                         {"from": "gpt", "value": "5"}]},
    {"image": "a.png", "conversations": chat("<image>Find x")["messages"]},
    {"image": "a.png", "conversations": [{"from": "human", "value": "<image>Find x"},
                                         {"from": "gpt", "value": "<answer>5</answer>"}]},
    {"prompt": [{"role": "user", "content": [{"type": "image"}, TEXT]}], "images": ["a.png"],
     "solution": "$5$"},
    {"prompt": [{"role": "user", "content": "<image>Find x"}], "images": ["a.png"],
     "reward_model": {"ground_truth": "5"}},
    {"messages": [{"role": "user", "content": "<image>Find x"}], "images": ["a.png"], "answer": 5},
    {"messages": json.dumps(chat("<image>Find x")["messages"]), "image": "a.png"},
    {"prompt": "<image>Find x", "images": ["a.png"], "reward_model": {"ground_truth": "5", "style": "rule"}},
])
def test_turns_become_a_question_an_image_and_a_gold(tmp_path, row):
    [record] = read(tmp_path, row)
    assert parts(record, ("question", "answer", "answer_type")) == {
        "question": "<image>Find x", "answer": "5", "answer_type": "number"}
    assert record["images"] == [str(tmp_path / "a.png")]
    assert record.get("response") in (None, "<answer>5</answer>")


def test_a_turn_is_a_response_where_one_is_needed(tmp_path):
    row = chat([{"type": "image", "image": "a.png"}, TEXT], "Two and three make five.", answer="5")
    [record] = read(tmp_path, row, need=("response",))
    assert (record["response"], record["answer"], record["task"]) == (
        "Two and three make five.", "5", "plain")
    [record] = read(tmp_path, chat("Find x"), need=())  # the bridge, which does without a gold
    assert "answer" not in record and record["response"] == "5"
    [record] = read(tmp_path, chat("Find x"), need=("answer", "response"))
    assert (record["response"], record["answer"]) == ("5", "5")
    [record] = read(tmp_path, chat("Which?\n(A) cat\n(B) dog", "B", image="a.png"))
    assert record["choices"] == ["cat", "dog"] and record["answer"] == "B" and "task" not in record


@pytest.mark.parametrize("row, message", [
    ({"messages": None}, "row 2: 'NoneType' object is not iterable"),
    ({"question": "q"}, "row 2: no column 'messages'"),
    ({"messages": "Find x"}, "row 2: Expecting value"), ({"messages": ["Find x"]}, "row 2: "),
    ({"messages": [{"role": "user", "content": None}]}, "row 2: "),
    (chat([{"type": "tool"}]), "row 2: no column 'text'"),
    (chat("<image>Find x"), "row 2 (id '1'): field 'images' has 0")])
def test_turns_that_cannot_be_read_name_their_row(tmp_path, row, message):
    with pytest.raises(ValueError) as error:
        read(tmp_path, chat("Find x"), {"answer": "5"} | row)
    assert str(error.value).startswith(f"{tmp_path}/x.jsonl {message}") and "\n" not in str(error.value)


def test_a_long_turn_is_no_gold(tmp_path, capsys):
    [record] = read(tmp_path, chat("Find x"), chat("Find x", "It is a long story.\nNobody knows the end."))
    assert record["answer"] == "5" and "1 of 2 rows: its response names no answer" in capsys.readouterr().err


@pytest.mark.parametrize("part", [
    {"type": "video", "video": "a.mp4"}, {"type": "video_url", "video_url": {"url": "a"}},
    {"type": "image", "image": "a.mp4"}, {"type": "text", "text": "<video>"}])
def test_turns_that_show_a_video(tmp_path, part):
    with pytest.raises(ValueError, match="no records: left out 1 of 1 rows: it shows a video"):
        read(tmp_path, chat([part, TEXT]))


def test_later_questions_about_an_image_that_a_part_holds(tmp_path):
    turns = chat([{"type": "image", "image": "a.png"}, TEXT])["messages"] + chat("And y?", "6")["messages"]
    first, second = read(tmp_path, {"conversations": turns})
    assert first["images"] == second["images"] == [str(tmp_path / "a.png")]
    assert (second["question"], second["answer"]) == ("And y?", "6")


def test_verls_parquet(tmp_path):
    """The prompt as its owner wrote it; the gold of the reward model, not extra_info's worked solution."""
    row = {"data_source": "geo", "prompt": [{"role": "system", "content": "Be brief."},
                                            {"role": "user", "content": "<image>Find x. Box it."}],
           "images": [{"bytes": RED, "path": None}], "ability": "math",
           "reward_model": {"style": "rule", "ground_truth": "5"},
           "extra_info": {"index": 7, "question": "Find x", "answer": "2 + 3\n#### 5", "split": "train"}}
    [record] = read(tmp_path, row, name="x.parquet")
    assert parts(record, ("question", "answer", "system", "task")) == {
        "question": "<image>Find x. Box it.", "answer": "5", "system": "Be brief.", "task": "plain"}
    assert image_bytes(record["images"][0]) == RED
    [record] = read(tmp_path, {"problem": "q", "image": "a.png", "extra_info": {"answer": "2 + 3\n#### 5"}})
    assert record["answer"] == "5"


# ----- images
@pytest.mark.parametrize("image", [
    "a.png", ["a.png"], {"path": "a.png"}, {"url": "a.png"}, {"image_url": {"url": "a.png"}},
    {"bytes": None, "path": "a.png"},
    f"data:image/png;base64,{INLINE}", {"url": f"data:image/png;base64,{INLINE}"}, {"bytes": INLINE},
    INLINE, [INLINE], "FILE"])
@pytest.mark.parametrize("column", ["image", "images", "img", "image_url"])
def test_images_in_many_forms(tmp_path, image, column):
    (tmp_path / "a.png").write_bytes(RED)
    image = f"file://{tmp_path}/a.png" if image == "FILE" else image
    [record] = read(tmp_path, {"question": "q", column: image, "answer": "3"})
    [ref] = record["images"]
    assert image_bytes(ref) == RED and load_image(ref, 10**6).getpixel((5, 5)) == (255, 0, 0)
    data_prep.write_records(tmp_path / "out" / "x.jsonl", [record])
    assert load_image(read_records(tmp_path / "out/x.jsonl")[0]["images"][0], 10**6).size == (30, 40)


def test_broken_base64_names_its_row(tmp_path):
    with pytest.raises(ValueError, match="x.jsonl row 1: .*base64"):
        read(tmp_path, {"question": "q", "image": "data:image/png;base64,iVBOR", "answer": "3"})


@pytest.mark.parametrize("name", ["x.tsv", "x.csv"])
def test_vlmevalkits_files(tmp_path, name):
    long = base64.b64encode(png("blue", (90, 90))).decode()
    row = {"index": 1, "image": long, "question": "Which?", "A": "cat", "B": "dog", "answer": "B"}
    first, second = read(tmp_path, row, row | {"index": 2, "image": 1, "answer": "A"}, name=name)
    assert first["images"] == second["images"] and first["choices"] == ["cat", "dog"]
    assert [first["answer"], second["answer"]] == ["B", "A"]


@pytest.mark.parametrize("name, tab", [("x.tsv", "\t"), ("x.csv", ",")])
def test_tables_of_text_with_paths(tmp_path, name, tab):
    lines = [["question", "image", "answer"], ["q", "a.png", "3"], ["q", "", "4"], ["q", "a.png"]]
    (tmp_path / name).write_text("\ufeff" + "\n".join(map(tab.join, lines[:3])), encoding="utf-8")
    first, second = read_records(tmp_path / name)
    assert first["images"] == [str(tmp_path / "a.png")] and (second["images"], second["answer"]) == ([], "4")
    (tmp_path / name).write_text("\n".join(map(tab.join, [*lines[:2], [*lines[1], "5"]])))
    with pytest.raises(ValueError, match=f"{name}: row 2 has more cells than there are columns"):
        read_records(tmp_path / name)


def test_json_of_one_line_and_of_rows_among_facts(tmp_path):
    row = {"question": "q", "image": "a.png", "answer": "3"}
    for table in (row, {"info": "v1", "data": [row]}, {"0": row}, [row]):
        (tmp_path / "x.json").write_text("\ufeff" + json.dumps(table), encoding="utf-8")
        [record] = read_records(tmp_path / "x.json")
        assert record["question"] == "q" and record["id"] == "0"
    (tmp_path / "x.json").write_text(json.dumps(row) + "\n[1]\n")
    with pytest.raises(ValueError, match="x.json: line 2: a JSON list, not an object"):
        read_records(tmp_path / "x.json")


@pytest.mark.parametrize("kind", ["device", "pipe", "folder", "large"])
def test_only_regular_files_of_bearable_size_are_images(tmp_path, monkeypatch, kind):
    path = Path("/dev/zero") if kind == "device" else tmp_path / "x.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "large":
        path.write_bytes(RED)
        monkeypatch.setattr(data_prep, "MAX_ENCODED", len(RED) - 1)
    message = f"{len(RED)} bytes, the limit is {len(RED) - 1}" if kind == "large" else "not a regular file"
    with pytest.raises(BadImage) as error:
        load_image(str(path), 10**6)
    assert str(error.value) == f"{path}: {message}"
    data_prep.header_fault.cache_clear()
    assert data_prep.header_fault(str(path)) == message
    with pytest.raises(OSError, match=message):
        image_bytes({"bytes": None, "path": str(path)})


@pytest.mark.parametrize("levels, mode, suffix, expected", [
    ((0, 2048, 4095), "I;16", "png", (0, 128, 255)), ((0, 257 * 100, 65535), "I;16", "png", (0, 100, 255)),
    ((0, 5000, 10_000), "I", "tiff", (0, 19, 39)), ((0, 100, 255), "I;16", "png", (0, 100, 255)),
    ((0, 10**9, 2 * 10**9), "I", "tiff", (0, 128, 255)), ((0, 50_000, 100_000), "I", "tiff", (0, 128, 255)),
    ((-1000, 500, 3095), "I", "tiff", (0, 75, 204)), ((0, 2048, 4095), "I;16", "tiff", (0, 128, 255))])
def test_wide_levels_are_scaled_by_their_own_range(tmp_path, levels, mode, suffix, expected):
    image = Image.new(mode, (30, 30))
    image.putdata([level for level in levels for _ in range(300)])
    image.save(tmp_path / f"x.{suffix}")
    loaded = load_image(tmp_path / f"x.{suffix}", 10**6)
    seen = [loaded.getpixel((5, row))[0] for row in (5, 15, 25)]
    assert all(abs(got - want) <= 1 for got, want in zip(seen, expected)), seen
