"""What it costs to start on, and to read from, images inside parquet files:
python tests/bench_data.py [--gb 1]

Writes two files of --gb GB, one of row groups of 100 rows as on the Hub, one of a single row group as pandas
writes. Each is read by --ranks processes at once, first without and then with an unpacked copy in the cache.
Columns, the worst of the ranks: seconds until the records are there; MiB that belong to a process then, at
most and at the end (RssAnon, so without the pages of the file that all processes share); rows/s of --reads
rows in order, then of as many at random.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data_prep  # noqa: E402

IMAGE = 200_000  # bytes of an encoded image, about a megapixel as JPEG


def write_table(path: Path, gigabytes: float, rows_a_group: int) -> int:
    """Write a parquet file of random images as `datasets` lays them out; return its number of rows."""
    import pyarrow
    from pyarrow.parquet import ParquetWriter
    image = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    schema = pyarrow.schema({"images": pyarrow.list_(image), "problem": pyarrow.string(),
                             "answer": pyarrow.string()})
    rng, count = random.Random(0), int(gigabytes * 1e9 / IMAGE)
    with ParquetWriter(path, schema) as writer:
        for start in range(0, count, rows_a_group):
            rows = [{"images": [{"bytes": rng.randbytes(IMAGE), "path": f"{row}.jpg"}],
                     "problem": f"<image>What is in picture {row}?", "answer": str(row)}
                    for row in range(start, min(start + rows_a_group, count))]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema), row_group_size=rows_a_group)
    return count


def own_memory() -> float:
    """MiB of this process that no other shares."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def read_as_a_rank(path: str, reads: int) -> dict:
    """What one process sees."""
    begin, bare, seen = time.perf_counter(), own_memory(), []

    def watch():
        while True:
            seen.append(own_memory())
            time.sleep(0.005)

    threading.Thread(target=watch, daemon=True).start()
    records = data_prep.read_records(path)
    figures = {"start": time.perf_counter() - begin, "then": own_memory() - bare}
    refs = [record["images"][0] for record in records]
    for name, order in (("in order", refs[:reads]), ("at random", random.Random(1).sample(refs, reads))):
        begin = time.perf_counter()
        for ref in order:
            assert len(data_prep.image_bytes(ref)) == IMAGE
        figures[name] = reads / (time.perf_counter() - begin)
    return figures | {"most": max(seen) - bare, "at the end": own_memory() - bare}


def measure(path: Path, reads: int, ranks: int, cache: Path) -> dict:
    """The worst of what `ranks` processes see, each beside the others."""
    command = [sys.executable, __file__, "--read", str(path), "--reads", str(reads)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE,
                                env=os.environ | {"XDG_CACHE_HOME": str(cache)})
               for _ in range(ranks)]
    seen = [json.loads(process.communicate()[0]) for process in started]
    worst = {name: max(figures[name] for figures in seen) for name in ("start", "then", "most", "at the end")}
    return worst | {name: min(figures[name] for figures in seen) for name in ("in order", "at random")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--reads", type=int, default=500)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--read", default="", help="a file: be one of the ranks")
    args = parser.parse_args()
    if args.read:
        print(json.dumps(read_as_a_rank(args.read, args.reads)))
        return
    print("| file | start, s | own memory then, MiB | at most | at the end | in order, rows/s "
          "| at random, rows/s |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        cache, path = Path(folder) / "cache", Path(folder) / "train.parquet"
        for title, group in (("row groups of 100 rows", 100), ("a single row group", 10**6)):
            rows = write_table(path, args.gb, group)
            for title in (title, f"{title}, again"):
                figures = measure(path, min(args.reads, rows), args.ranks, cache)
                print(f"| {title} | {figures['start']:.2f} | {figures['then']:.0f} | {figures['most']:.0f} |"
                      f" {figures['at the end']:.0f} |"
                      f" {figures['in order']:.0f} | {figures['at random']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
