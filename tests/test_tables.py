"""Images inside parquet and Arrow files stay there until they are needed.

python -m pytest tests/test_tables.py
"""
import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

pyarrow = pytest.importorskip("pyarrow")
from pyarrow.parquet import write_table  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))
import data_prep  # noqa: E402
from data_prep import image_bytes, load_image, read_records  # noqa: E402
from test_data_prep import png  # noqa: E402

ROWS = 40
PICTURES = [png((k, k, k), (30, 30 + k)) for k in range(ROWS)]
IMAGE = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of its own for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nanovlr"


def table(kind=None, images=None):
    kind, images = kind or pyarrow.list_(IMAGE), images or [
        [{"bytes": data, "path": "x.png"}] for data in PICTURES]
    return pyarrow.table({"images": pyarrow.array(images, kind),
                          "problem": [f"q{k}" for k in range(len(images))],
                          "answer": [str(k) for k in range(len(images))]})


def saved(tmp_path, form, rows_a_group=7):
    """The table as a file or folder of a form."""
    if form == "parquet":
        write_table(table(), tmp_path / "x.parquet", row_group_size=rows_a_group)
        return tmp_path / "x.parquet"
    datasets = pytest.importorskip("datasets")
    datasets.Dataset(table()).save_to_disk(tmp_path / "saved")
    return next((tmp_path / "saved").glob("*.arrow")) if form == "arrow" else tmp_path / "saved"


def shown(records):
    return [image_bytes(record["images"][0]) for record in records]


@pytest.fixture(params=["parquet", "unpacked", "arrow", "folder"])
def records(tmp_path, monkeypatch, request):
    """The records of the table, in a small parquet file, in one whose row groups count as large,
    or elsewhere.
    """
    if request.param == "unpacked":
        monkeypatch.setattr(data_prep, "DIRECT", 0)
        monkeypatch.setattr(data_prep, "PIECE", 300)  # several pieces
    return read_records(saved(tmp_path, "parquet" if request.param == "unpacked" else request.param))


def test_a_record_holds_no_bytes_and_reads_them_each_time(records, cache):
    assert not cache.exists()
    assert all(b"PNG" not in pickle.dumps(record) for record in records)
    assert shown(records) == PICTURES and shown(records[::-1]) == PICTURES[::-1]
    assert records[3]["images"][0]["bytes"] == PICTURES[3]
    assert load_image(records[5]["images"][0], 10**6).size == (30, 35)
    assert len(list(cache.glob("*"))) in (0, 6)  # one file for each row group, and nothing else


def worker(ref):
    return image_bytes(ref)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_them_too(records, method):
    refs = [record["images"][0] for record in records]
    shown(records[:3])  # the parent has opened the table
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(worker, refs, 5) == PICTURES
    assert image_bytes(copy.deepcopy(pickle.loads(pickle.dumps(refs[4])))) == PICTURES[4]


def test_records_become_a_file_beside_their_images(tmp_path, records):
    data_prep.write_records(tmp_path / "out" / "x.jsonl", records)
    assert shown(read_records(tmp_path / "out/x.jsonl")) == PICTURES


@pytest.mark.parametrize("kind, wrap", [
    (pyarrow.binary(), lambda data: data), (pyarrow.large_binary(), lambda data: data),
    (IMAGE, lambda data: {"bytes": data, "path": None}),
    (pyarrow.struct({"bytes": pyarrow.binary()}), lambda data: {"bytes": data}),
    (pyarrow.list_(pyarrow.binary()), lambda data: [data]),
    (pyarrow.large_list(IMAGE), lambda data: [{"bytes": data}]),
    (pyarrow.list_(pyarrow.struct({"bytes": pyarrow.binary()})), lambda data: [{"bytes": data}]),
    (pyarrow.struct({"data": pyarrow.binary(), "mime": pyarrow.string()}),
     lambda data: {"data": data, "mime": "png"}),
])
@pytest.mark.parametrize("direct", [0, 1 << 20])
def test_columns_of_every_kind(tmp_path, monkeypatch, kind, wrap, direct):
    """Some rows have no image."""
    monkeypatch.setattr(data_prep, "DIRECT", direct)
    images = [wrap(data) if k % 3 else None for k, data in enumerate(PICTURES)]
    write_table(table(kind, images), tmp_path / "x.parquet", row_group_size=9)
    records = read_records(tmp_path / "x.parquet")
    assert [len(record["images"]) for record in records] == [bool(k % 3) for k in range(ROWS)]
    assert shown([r for r in records if r["images"]]) == [data for k, data in enumerate(PICTURES) if k % 3]


def test_several_images_and_none(tmp_path):
    images = [[{"bytes": data, "path": None} for data in PICTURES[:k]] for k in range(4)] + [None]
    write_table(table(images=images), tmp_path / "x.parquet")
    records = read_records(tmp_path / "x.parquet")
    assert [[*map(image_bytes, r["images"])] for r in records] == [*(PICTURES[:k] for k in range(4)), []]


def test_a_table_that_only_names_its_images(tmp_path):
    """As `datasets` writes it with embed_external_files=False: paths are relative to the file,
    or to image_root.
    """
    for folder in (tmp_path, tmp_path / "root"):
        folder.mkdir(exist_ok=True)
        (folder / "x.png").write_bytes(PICTURES[0] if folder == tmp_path else PICTURES[1])
    write_table(table(images=[[{"bytes": None, "path": "x.png"}]]), tmp_path / "x.parquet")
    assert shown(read_records(tmp_path / "x.parquet")) == PICTURES[:1]
    assert shown(read_records(tmp_path / "x.parquet", image_root=tmp_path / "root")) == PICTURES[1:2]


def test_images_in_the_parts_of_turns(tmp_path):
    part = [{"type": "image", "image": {"bytes": PICTURES[7], "path": None}, "text": None},
            {"type": "text", "image": None, "text": "Find x"}]
    turns = [{"role": "user", "content": part}]
    write_table(pyarrow.Table.from_pylist([{"messages": turns, "answer": "5"}]), tmp_path / "x.parquet")
    [record] = read_records(tmp_path / "x.parquet")
    assert record["question"] == "<image>Find x" and image_bytes(record["images"][0]) == PICTURES[7]


@pytest.mark.parametrize("direct", [0, 1 << 20])
def test_a_file_that_was_written_anew(tmp_path, monkeypatch, direct):
    monkeypatch.setattr(data_prep, "DIRECT", direct)
    for images in (PICTURES, PICTURES[::-1]):
        write_table(table(images=[[{"bytes": data, "path": None}] for data in images]),
                    tmp_path / "x.parquet")
        os.utime(tmp_path / "x.parquet", ns=(0, images[0][-20]))
        assert shown(read_records(tmp_path / "x.parquet")) == images


def test_without_room_for_a_copy_they_are_decoded_in_memory(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(data_prep, "DIRECT", 0)
    cache.parent.write_text("no folder")
    records = read_records(saved(tmp_path, "parquet"))
    with pytest.warns(UserWarning, match="x.parquet: its images are decoded in memory, which is slow: "):
        assert shown(records) == PICTURES


def test_what_a_killed_process_left_is_no_hindrance(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(data_prep, "DIRECT", 0)
    records = read_records(saved(tmp_path, "parquet", ROWS))
    image_bytes(records[0]["images"][0])
    [copied] = cache.iterdir()
    copied.with_suffix(".tmp").write_bytes(copied.read_bytes()[:-100])
    copied.unlink()
    data_prep.unpacked_group.cache_clear()
    assert shown(records) == PICTURES and list(cache.iterdir()) == [copied]


def test_several_processes_make_one_copy(tmp_path, cache):
    path = saved(tmp_path, "parquet", ROWS)
    code = ("import data_prep, sys; data_prep.DIRECT = 0; records = data_prep.read_records(sys.argv[1]);"
            "print(sum(len(data_prep.image_bytes(r['images'][0])) for r in records))")
    command = [sys.executable, "-c", code, str(path)]
    ranks = [subprocess.Popen(command, cwd=Path(data_prep.__file__).parent, stdout=subprocess.PIPE, text=True)
             for _ in range(4)]
    assert {rank.communicate()[0].strip() for rank in ranks} == {str(sum(map(len, PICTURES)))}
    assert [file.suffix for file in cache.iterdir()] == [".arrow"]


def test_a_fault_names_the_row(tmp_path):
    images = [[{"bytes": PICTURES[0], "path": None}], [{"bytes": b"junk", "path": None}]]
    write_table(table(images=images), tmp_path / "x.parquet")
    records = read_records(tmp_path / "x.parquet")
    with pytest.raises(data_prep.BadImage) as error:
        load_image(records[1]["images"][0], 10**6)
    assert str(error.value) == f"image in row 2 of {tmp_path}/x.parquet: not an image"


def test_only_a_little_is_read_at_the_start(tmp_path):
    """A file of 60 MB: neither reading its records nor all its images takes much of it."""
    data = os.urandom(300_000)
    images = [[{"bytes": data + bytes([k]), "path": None}] for k in range(200)]
    write_table(table(images=images), tmp_path / "x.parquet")
    code = """if True:
        import data_prep, sys, pyarrow.parquet
        def own():
            return int(open('/proc/self/status').read().split('RssAnon:')[1].split()[0])
        bare = own()
        records = data_prep.read_records(sys.argv[1])
        then = own()
        for record in records:
            data_prep.image_bytes(record['images'][0])
        print(then - bare, own() - bare)"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.parquet")], capture_output=True,
                          text=True, cwd=Path(data_prep.__file__).parent, check=True)
    then, last = map(int, done.stdout.split())
    assert then < 20_000 and last < 40_000, (then, last)
