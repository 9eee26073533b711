"""Reason-RFT's training sets and ShareGPT files. Offline; python -m pytest tests/test_reason_rft.py"""
import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import data_prep
import rewards
from data_prep import Config, build_messages, read_records

COUNT = {"id": "clevr-1", "image": "a.png", "problem": "Take away all cubes. How many remain?", "answer": "3",
         "cot": "There were five objects and two are cubes, so three stay."}
CHOICE = {"id": "geomath-1", "image": "a.png", "problem": "How long is x?\nChoices:\nA. 3\nB. 4\nC. 5",
          "answer": "B", "cot": "<think>\nBy Pythagoras x is 4.\n</think>\n<answer>\nB\n</answer>"}
NUMBER = {"id": "geomath-2", "image": ["a.png"], "problem": "How wide is the angle?", "answer": "30.5",
          "cot": "<think>Half of 61.</think><answer>30.5</answer>"}
CALLS = {"id": "trance-1", "image": ["a.png", "b.png"],
         "problem": "('object_id','shape','size','color','material'): [(0,'cube','large','red','metal')]",
         "answer": "change_color(0, 'blue'), change_size(0, 'small')",
         "cot": "<think>It is blue and small now.</think>\n"
                "<answer>change_color(0, 'blue'), change_size(0, 'small')</answer>"}
ROWS = [COUNT, CHOICE, NUMBER, CALLS]


@pytest.fixture(autouse=True)
def fresh():
    """Tests reuse the names of images."""
    data_prep.header_fault.cache_clear()


def build(folder, rows, form, **flags):
    """Convert `rows`; (records or None where the file is missing, manifest) of the last set written."""
    meta = folder / "meta.json"
    meta.write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
    for name in "a.png", "b.png":
        Image.new("RGB", (30, 40)).save(folder / name)
    out = folder / "out"
    data_prep.main(Config(source="reason_rft", input=str(meta), form=form, out=str(out), **flags))
    if form == "sharegpt":
        return None
    manifest = json.loads((out / f"meta_{form}_manifest.json").read_text())
    need = ("answer", "response") if form in data_prep.SHAREGPT_FORMS else ("answer",)
    return read_records(out / f"meta_{form}.jsonl", need=need), manifest


def refusal(folder, rows, form="rl", **flags):
    with pytest.raises(ValueError) as error:
        build(folder, rows, form, **flags)
    assert "\n" not in str(error.value)
    return str(error.value)


# ----- the five sets -----
@pytest.mark.parametrize("form", ["ans_sft", "cot_sft", "rl", "stage1", "stage2"])
def test_every_set_holds_every_task(tmp_path, capsys, form):
    records, manifest = build(tmp_path, ROWS, form, stage2="full")
    count, choice, number, calls = records
    assert [r["answer_type"] for r in records] == ["number", "choice", "number", "calls"]
    assert [r["source"].rpartition("_")[2] for r in records] == ["counting", "structure", "structure",
                                                                 "transformation"]
    assert choice["choices"] == ["3", "4", "5"] and choice["answer"] == "B"
    assert [r["answer"] for r in records] == [row["answer"] for row in ROWS]
    assert [len(r["images"]) for r in records] == [1, 1, 1, 2]
    assert all(Path(ref).samefile(tmp_path / Path(ref).name) for r in records for ref in r["images"])
    assert not (tmp_path / "out/images").exists()
    assert manifest["records"] == 4 and manifest["rows"] == [[1, 4]] and manifest["rejects"] == []
    assert manifest["answer_types"] == {"number": 2, "choice": 1, "calls": 1}
    assert capsys.readouterr().out == (f"{tmp_path}/out/meta_{form}.jsonl: 4 records "
                                       "(2 number, 1 choice, 1 calls), 0 left out\n")
    asks = ["<answer>" in rewards.build_prompt(r) for r in records]
    assert asks == [form != "ans_sft"] * 4
    if form in ("rl", "stage2"):
        assert not any("response" in r for r in records)
        return
    for r in records:
        assert rewards.format_think_answer(r["response"], r) == (form != "ans_sft")
        assert rewards.accuracy(r["response"], r) == 1
        if form == "ans_sft":
            assert r["response"] == r["answer"] and rewards.build_prompt(r).count(r["question"]) == 1
        else:
            assert re.fullmatch(r"<think>\n\S.*\n</think>\n<answer>\n.*\n</answer>", r["response"], re.DOTALL)
            assert r["response"].split("\n")[4] == r["answer"]
    if form == "ans_sft":
        assert "think" not in rewards.build_prompt(count)
        assert "change_size" in rewards.build_prompt(calls)


def test_calls_are_graded(tmp_path):
    records, _ = build(tmp_path, [CALLS, CALLS | {"id": "b", "answer": "change_color(0, 'red')"}], "cot_sft")
    assert [r["id"] for r in records] == ["trance-1"] and rewards.accuracy(records[0]["response"], records[0])


@pytest.mark.parametrize("form, flags, kept", [
    ("stage1", {}, "012"), ("stage2", {}, "3456"), ("stage2", {"stage2": "full"}, "0123456"),
    ("rl", {"n": 2}, "01"), ("cot_sft", {}, "0123456"), ("stage1", {"n": 2}, "01"),
])
def test_stages_share_the_file(tmp_path, form, flags, kept):
    rows = [COUNT | {"id": str(k)} for k in range(7)]
    records, manifest = build(tmp_path, rows, form, stage1_n=3, **flags)
    assert [r["id"] for r in records] == [*kept]
    assert manifest["rows"] == [[int(kept[0]) + 1, int(kept[-1]) + 1]]


def test_stage1_is_the_first_1600_rows():
    assert Config().stage1_n == 1600 and Config().stage2 == "rest"


# ----- rows as they come -----
@pytest.mark.parametrize("fields, expected", [
    ({"answer": None, "solution": "3"}, {"answer": "3"}), ({"answer": 3}, {"answer": "3"}),
    ({"answer": "<answer> 3 </answer>"}, {"answer": "3"}), ({"id": 7}, {"id": "7"}),
    ({"id": None}, {"id": "0"}),
    ({"image": ["a.png"]}, {}), ({"image": [{"path": "a.png"}]}, {}), ({"image": {"path": "a.png"}}, {}),
    ({"image": None, "images": ["a.png"]}, {}),
    ({"problem": "<image>How many?"}, {"question": "<image>How many?"}),
    ({"problem": "<image><image>How many?"}, {"question": "How many?"}),
    ({"answer": "3", "id": "geomath-5"}, {"source": "reason_rft_structure", "answer_type": "number"}),
    ({"answer": "2.5"}, {"source": "reason_rft_structure", "answer_type": "number"}),
    ({"answer": " B "}, {"answer": "B", "answer_type": "choice", "choices": ["A", "B", "C", "D"]}),
    ({"answer": "ABC"}, {"answer_type": "text"}), ({"answer": "12 AB"}, {"answer_type": "math"}),
    ({"answer": "b"}, {"answer_type": "text"}), ({"answer": "145°"}, {"answer_type": "math"}),
    ({"problem": CHOICE["problem"], "answer": "4"}, {"answer": "B", "answer_type": "choice"}),
    ({"problem": CHOICE["problem"], "answer": "7", "id": "geomath-1"}, {"answer_type": "number"}),
])
def test_aliases_and_answer_types(tmp_path, fields, expected):
    [got], _ = build(tmp_path, [COUNT | fields], "rl")
    assert {field: got.get(field) for field in expected} == expected and len(got["images"]) == 1
    [direct] = read_records(tmp_path / "meta.json")
    assert direct == got | {"images": direct["images"]}


@pytest.mark.parametrize("row, reason", [
    ([1], "a JSON list, not an object"), (None, "a JSON NoneType, not an object"),
    ({**COUNT, "answer": None}, "answer is missing"), ({**COUNT, "answer": " "}, "answer is missing"),
    ({**COUNT, "answer": ["3"]}, "answer is missing, empty or no text"),
    ({**COUNT, "answer": True}, "answer is missing, empty or no text"),
    ({**COUNT, "problem": ""}, "problem is missing"), ({**COUNT, "problem": 3}, "problem is missing"),
    ({**COUNT, "image": None}, "image is missing"), ({**COUNT, "image": [3]}, "image is missing"),
    ({**COUNT, "image": [{"bytes": ""}]}, "no 'path'"),
    ({**COUNT, "image": "gone.png"}, "image gone.png: No such file"),
    ({**COUNT, "image": "meta.json"}, "image meta.json: not an image"),
    ({**COUNT, "image": "../"}, "image ../: "),
    ({**CHOICE, "answer": "D"}, "must be a letter A-C, not 'D'"),
    ({**CALLS, "image": "a.png"}, "a transformation has 2 images, not 1"),
    ({**CALLS, "answer": "none"}, "answer holds 'none' besides calls"),
    ({**CALLS, "answer": "change_color(0, 'pink')"}, "change_color(.., 'pink'), no such function or value"),
    ({**CALLS, "answer": "paint(0, 'red')"}, "paint(.., 'red'), no such function or value"),
    ({**COUNT, "id": "first"}, "id was already used in row 1"),
])
def test_broken_rows_are_listed_not_fatal(tmp_path, row, reason):
    rows = [COUNT | {"id": "first"}, row, COUNT | {"id": "last"}]
    records, manifest = build(tmp_path, rows, "rl")
    assert [r["id"] for r in records] == ["first", "last"] and manifest["rows"] == [[1, 1], [3, 3]]
    [reject] = manifest["rejects"]
    assert reject["row"] == 2 and reason in reject["reason"] and "\n" not in reject["reason"]
    assert str(tmp_path) not in (tmp_path / "out/meta_rl_manifest.json").read_text()
    assert " row 2 (id " in refusal(tmp_path, rows, strict=True)


@pytest.mark.parametrize("cot, thought", [
    ("I count to three.", "I count to three."),
    ("I count. The answer is 3.", "I count. The answer is 3."),
    ("<think>I count.</think>", "I count."), ("<think>\nI count.", "I count."),
    ("I count.</think><answer>3</answer>", "I count."), ("I count.\n<answer> 3 </answer>", "I count."),
    ("<Think> I count. </ think >\n<ANSWER>3</ANSWER>", "I count."),
    ("<think>I count.</think> So there are 3.", "I count."), ("<think>I count.</think> 3", "I count."),
    ("<summary>s</summary><caption>c</caption><think>I count.</think><answer>3</answer>", "I count."),
    ("<think>old</think> Again: <think>I count.</think><answer>3</answer>", "I count."),
    ("<think>I look at <image>.</think><answer>3</answer>", "I look at image."),
    ("<think>It is \\boxed{3}, not 4.</think><answer>3.0</answer>", "It is \\boxed{3}, not 4."),
])
def test_rationales_lose_their_tags_and_get_ours(tmp_path, cot, thought):
    [got], manifest = build(tmp_path, [COUNT | {"cot": cot}], "cot_sft")
    assert got["response"] == f"<think>\n{thought}\n</think>\n<answer>\n3\n</answer>"
    assert rewards.format_think_answer(got["response"], got) == rewards.accuracy(got["response"], got) == 1
    silent = cot in ("I count to three.", "<think>I count.</think>", "<think>\nI count.")
    assert manifest["cot_without_answer"] == silent


@pytest.mark.parametrize("cot, reason", [
    (None, "cot is missing"), ("", "cot is missing"), (["a"], "cot is missing"),
    ("<think> </think><answer>3</answer>", "cot holds no reasoning"), ("<answer>3</answer>", "no reasoning"),
    ("<think>I count.</think><answer>4</answer>", "cot answers '4', the gold answer is '3'"),
    ("I count. The answer is 4.", "cot answers '4', the gold answer is '3'"),
    ("I count to \\boxed{4}.", "cot answers '4'"), ("I count.<answer></answer>", "cot answers '', the gold"),
    ("<think>I count.</think> So there are 4.", "the gold answer is '3'"),
])
def test_rationales_that_cannot_be_learnt_are_left_out_of_sft_only(tmp_path, cot, reason):
    rows = [COUNT, COUNT | {"id": "bad", "cot": cot}]
    records, manifest = build(tmp_path, rows, "stage1")
    assert len(records) == 1 and reason in manifest["rejects"][0]["reason"]
    for form in "rl", "ans_sft", "stage2":
        assert len(build(tmp_path, rows, form, stage2="full")[0]) == 2


# ----- files -----
def test_many_rejects_are_counted_not_printed(tmp_path, capsys):
    rows = [COUNT | {"id": str(k), "answer": "3" if k == 0 else ""} for k in range(20)]
    _, manifest = build(tmp_path, rows, "rl")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and lines[10] == "left out 9 more, see the manifest"
    assert manifest["rejected"] == len(manifest["rejects"]) == 19


def test_a_list_longer_than_a_block_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(data_prep, "BLOCK", 7)
    rows = [COUNT | {"id": f"é{k}", "problem": "[{\"}] ,\\ How many?"} for k in range(9)]
    for text in json.dumps(rows), json.dumps(rows, indent=3), " \n" + json.dumps(rows, ensure_ascii=False):
        assert [r["id"] for r in build(tmp_path, text, "rl")[0]] == [r["id"] for r in rows]
    rows.insert(1, 123456789012)  # a number cut by a block boundary must not become two rows
    assert build(tmp_path, rows, "rl")[1]["rejects"][0]["reason"] == "a JSON int, not an object"


@pytest.mark.parametrize("text, message", [
    ("[]", "no row is fit for --form rl"), ("", "expected a list"), ("{}", "expected a list"),
    (json.dumps(ROWS)[:-30], "row 4: "), (json.dumps(ROWS)[:-1], "row 4: the list is never"),
    (json.dumps(ROWS).replace('"id"', "id"), "row 1: Expecting"),
    ('[{"id": "x"}]', "no row is fit for --form rl; row 1: problem is missing"),
])
def test_files_that_cannot_be_used(tmp_path, text, message):
    assert refusal(tmp_path, text).startswith(f"{tmp_path / 'meta.json'}: {message}")
    assert not list(tmp_path.glob("out/*"))


def test_lines_of_json_do_too(tmp_path):
    build(tmp_path, ROWS, "rl")
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    cfg = Config(source="reason_rft", input=str(lines), form="rl", out=str(tmp_path / "out"))
    data_prep.main(cfg)
    assert (tmp_path / "out/lines_rl.jsonl").read_bytes() == (tmp_path / "out/meta_rl.jsonl").read_bytes()
    for name in "gone.json", "a.png":
        with pytest.raises(ValueError, match=f"^{tmp_path / name}: no such .json or .jsonl file$"):
            data_prep.main(dataclasses.replace(cfg, input=str(tmp_path / name)))


@pytest.mark.parametrize("flags, message", [
    ({"form": "sft"}, "--form sft: use ans_sft | cot_sft | rl | stage1 | stage2 | sharegpt"),
    ({"form": ""}, "--form : use"),
    ({"stage1_n": 0}, "--stage1_n 0: must be at least 1"), ({"task": "box"}, "--task box: use plain | "),
    ({"form": "stage2"}, "no row is fit for --form stage2"), ({"image_root": "gone"}, "image a.png: "),
])
def test_flags(tmp_path, flags, message):
    assert message in refusal(tmp_path, ROWS, **{"form": "rl"} | flags)


def test_what_stage2_takes_is_checked_with_the_flags():
    for allowed in ("rest", "full"):
        assert data_prep.parse_config(Config, ["--stage2", allowed]).stage2 == allowed
    with pytest.raises(SystemExit, match=r"--stage2: some: use rest \| full$"):
        data_prep.parse_config(Config, ["--source", "reason_rft", "--form", "rl", "--stage2", "some"])


def test_images_may_lie_elsewhere_and_move_along(tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (30, 40)).save(tmp_path / "pictures/c.png")
    build(tmp_path, [COUNT | {"image": "c.png"}], "rl", image_root=str(tmp_path / "pictures"))
    (tmp_path / "moved").mkdir()
    for name in "out", "pictures":
        (tmp_path / name).rename(tmp_path / "moved" / name)
    [got] = read_records(tmp_path / "moved/out/meta_rl.jsonl")
    assert data_prep.load_image(got["images"][0], 10**6).size == (30, 40)


# ----- ShareGPT -----
def test_sharegpt_files_load_back_as_the_same_records(tmp_path):
    build(tmp_path, ROWS + [COUNT | {"id": "marked", "problem": "<image>How many?"}], "sharegpt", stage1_n=3)
    info = json.loads((tmp_path / "out/dataset_info.json").read_text())
    assert list(info) == ["meta_ans_sft", "meta_cot_sft", "meta_stage1"]
    for form, size in ("ans_sft", 5), ("cot_sft", 5), ("stage1", 3):
        entry = info[f"meta_{form}"]
        assert entry["formatting"] == "sharegpt" and entry["columns"] == {"messages": "messages",
                                                                          "images": "image"}
        path = tmp_path / "out" / entry["file_name"]
        rows, records = json.loads(path.read_text()), read_records(path, need=("response",))
        assert len(rows) == size and records == build(
            tmp_path, ROWS + [COUNT | {"id": "marked", "problem": "<image>How many?"}], form, stage1_n=3)[0]
        for row, record in zip(rows, records):
            assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
            texts = [turn["content"] for turn in row["messages"]]
            assert isinstance(row["image"], list) and "".join(texts).count("<image>") == len(row["image"])
            [turn] = build_messages(record)
            assert "".join(part.get("text", "<image>") for part in turn["content"]) == texts[0]
            assert all((path.parent / ref).is_file() for ref in row["image"])


def test_sharegpt_registers_several_files_in_one_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/dataset_info.json").write_text('{"other": {"file_name": "o.json"}}')
    build(tmp_path, [COUNT], "sharegpt")
    assert list(json.loads((tmp_path / "out/dataset_info.json").read_text()))[0] == "other"
    (tmp_path / "out/dataset_info.json").write_text("{")
    assert "dataset_info.json: Expecting" in refusal(tmp_path, [COUNT], "sharegpt")


TURNS = [{"role": "user", "content": "<image>How many?"},
         {"role": "assistant", "content": "<think>I count.</think><answer>3</answer>"}]


@pytest.mark.parametrize("fields, expected", [
    ({}, {"question": "<image>How many?", "answer": "3", "answer_type": "number", "task": "plain"}),
    ({"image": None, "images": ["a.png"]}, {"answer": "3"}), ({"image": ["a.png"], "id": 4}, {"id": "4"}),
    ({"messages": [TURNS[0], {"role": "assistant", "content": "3"}]}, {"answer": None, "response": "3"}),
    ({"question": "Edited?", "answer": "4", "answer_type": "number"}, {"question": "<image>How many?",
                                                                       "answer": "4", "task": "plain"}),
])
def test_sharegpt_files_of_others(tmp_path, fields, expected):
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"id": "q", "image": "a.png", "messages": TURNS} | fields]))
    [got] = read_records(path, need=("response",))
    assert {field: got.get(field) for field in expected} == expected
    assert rewards.build_prompt(got) == "<image>How many?" and got["images"] == [str(tmp_path / "a.png")]


@pytest.mark.parametrize("fields, message", [
    ({"messages": TURNS[:1]}, "row 1: messages are by user, not by user, assistant"),
    ({"messages": TURNS * 2}, "row 1: messages are by user, assistant, user, assistant, not"),
    ({"messages": [{"by": "human", "value": "Q?"}]}, "row 1: no column 'role'"),
    ({"image": ["a.png", "b.png"]}, "row 1 (id 'q'): field 'images' has 2 entries for 1 <image>"),
])
def test_sharegpt_rows_that_cannot_be_read(tmp_path, fields, message):
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"id": "q", "image": "a.png", "messages": TURNS} | fields]))
    with pytest.raises(ValueError) as error:
        read_records(path, need=("response",))
    assert str(error.value).startswith(f"{path} {message}")


def test_sharegpt_columns_load_with_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    build(tmp_path, ROWS, "sharegpt")
    table = datasets.load_dataset("json", data_files=str(tmp_path / "out/meta_cot_sft.json"), split="train",
                                  cache_dir=str(tmp_path / "cache"))
    assert [len(images) for images in table["image"]] == [1, 1, 1, 2]
    again = [{field: value for field, value in data_prep.from_sharegpt(row, k).items() if value is not None}
             for k, row in enumerate(table)]
    here = read_records(tmp_path / "out/meta_cot_sft.json", need=("response",))
    assert [r | {"images": 0} for r in again] == [r | {"images": 0} for r in here]


def test_the_same_flags_give_the_same_bytes(tmp_path):
    cfg = Config(source="reason_rft", input=str(tmp_path / "meta.json"), form="rl", out=str(tmp_path / "out"))
    build(tmp_path, ROWS, "rl")
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    data_prep.main(dataclasses.replace(cfg, seed=9))
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


# ----- rewards of a group -----
@pytest.mark.parametrize("lengths, right, expected", [
    ([34, 83, 133], [1, 1, 0], [0.025, 0.000253, -0.025]), ([34, 83, 133], [0, 0, 0], [0, 0, -0.025]),
    ([7, 7, 7], [1, 0, 1], [0, 0, 0]), ([20, 10], [1, 1], [-0.025, 0.025]),
])
def test_length_bonus(lengths, right, expected):
    assert [0.05 * b for b in rewards.length_bonus(lengths, right)] == pytest.approx(expected, abs=1e-6)
