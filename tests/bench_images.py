"""Images on their way: bytes of a row, and what a rank's workers and its trainer hold while it computes.

    python tests/bench_images.py              # 160 rows of a million pixels a rank and step: 8 GiB of memory

1,280 questions a step on the 8 ranks of a node are 160 a rank. The rows are real ones of Qwen2.5-VL's
processor; making them is not measured: a worker copies one. Each way is measured in a process of its own:
fp32 pixels without a bound, as on a CPU, and bf16 pixels with Workers' own bound, as on a GPU.
"""
import argparse
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from conftest import picture, qwen25  # noqa: E402

import sft  # noqa: E402

SIDE = 1001  # of a square image: 1,002,001 pixels


def held(pid):
    """GiB of memory of a process, what it shares with others divided among them (Linux)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    [kib] = [line.split()[1] for line in lines if line.startswith("Pss:")]
    return int(kib) / 2**20


def measure(dtype, rows):
    """Print a line of the table: two batches of `rows`,
    of which the first was taken and the second is ahead.
    """
    torch.set_num_threads(1)
    _, processor = qwen25()
    record = {"question": "one two", "images": [picture(SIDE, SIDE)], "answer_type": "text"}
    made = sft.encode_prompt(record, processor, 10**7, dtype=dtype)

    def encode(i, step):
        return {name: value.clone() if torch.is_tensor(value) else value for name, value in made.items()}

    workers = sft.Workers(encode, 2)
    pids = [process.pid for process, _, _ in workers.crew]
    before = sum(map(held, pids)), held(os.getpid())
    ahead = workers.prepared([range(rows)] * 2)
    began = time.time()
    batch = next(ahead)
    seconds = time.time() - began
    last, now = -1, 0
    while now - last > 0.01:  # until they have encoded what they may
        time.sleep(5)
        last, now = now, sum(map(held, pids))
    size = len(pickle.dumps(batch[0][1])) / 2**20
    name = str(dtype).removeprefix("torch.")
    print(f"| {name} | {size:.1f} | {now - before[0]:.2f} | {held(os.getpid()) - before[1]:.2f} "
          f"| {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=160, help="rows of a batch")
    parser.add_argument("--dtype", default="", help="measure this one alone")
    args = parser.parse_args()
    if args.dtype:
        if args.dtype == "float32":
            sft.Workers.AHEAD = 2**60
        measure(getattr(torch, args.dtype), args.rows)
    else:
        print("| pixels | a row, MiB | workers hold, GiB | trainer holds, GiB | to take the first batch, s |")
        print("|---|---|---|---|---|", flush=True)
        for dtype in ("float32", "bfloat16"):
            with tempfile.TemporaryDirectory() as room:
                command = [sys.executable, Path(__file__).resolve(), "--rows", str(args.rows),
                           "--dtype", dtype]
                subprocess.run(command, check=True, cwd=room)
