"""Runs that are stopped, killed and resumed at random moments:
python tests/bench_kills.py [--times 10] [--only NAME]

Each row: how often a run that was stopped so ended as it should, over --times random moments. `saved`: the
step it was at is complete. `gone`: no rank and no worker is left. `quiet`: no traceback but torchrun's own.
`same`: resumed, it has the metrics and weights of a run that nobody touched, bit for bit. A signal before the
first step has nothing to save and counts as saved.
"""
import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data_prep  # noqa: E402
import rewards  # noqa: E402
from test_kills import GRPO, SFT, TWO, is_gone, own_lines, send, stage_traceback, started  # noqa: E402
from test_stages import metrics, newest, run, weights  # noqa: E402

RISE = ["rise.py", "--model", "tiny", "--data", "data/mood_train.jsonl", "--eval_data", "",
        "--prompts_per_step", "4", "--group_size", "2", "--max_new_tokens", "12"]
STAGES = {"sft": SFT, "grpo": GRPO, "rise": RISE}
# name: (stage, torchrun, signal, target)
STOPS = {}
for name in STAGES:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        STOPS[f"{name} {number.name} itself"] = (name, (), number, "itself")
    STOPS[f"{name} SIGTERM all"] = (name, (), signal.SIGTERM, "all")
    STOPS[f"{name} SIGINT all"] = (name, (), signal.SIGINT, "all")
for name in ("sft", "grpo"):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        for target in ("itself", "rank", "all"):
            STOPS[f"torchrun {name} {number.name} {target}"] = (name, TWO, number, target)


def make_room(root):
    """The small mini suite and its tiny model, as the tests have them."""
    data_prep.make_mini(root / "data", 0, sizes={"train": 24, "id": 12, "ood": 12, "left": 12, "right": 12})
    records = data_prep.read_records(root / "data/counting_train.jsonl")
    texts = [text for r in records for text in (rewards.build_prompt(r), r["response"])]
    data_prep.make_tiny(root / "tiny", texts, 0)


def is_whole(folder, whole):
    """Whether a run has the metrics and weights of another; of two ranks, to rounding."""
    if metrics(folder) != metrics(whole):
        return False
    a, b = weights(newest(folder)), weights(newest(whole))
    return all(torch.equal(a[name], b[name]) for name in b)


def stop_once(root, stop, chance, seconds, command, whole):
    """One run stopped at a random moment of its `seconds`, and resumed: {column: bool}."""
    _, torchrun, number, target = stop
    folder = root / "cut"
    shutil.rmtree(folder, ignore_errors=True)
    job = started(root, *command, "--out", "cut", torchrun=torchrun)
    time.sleep(chance.uniform(0, seconds))
    pids = send(job, number, target)
    job.process.wait(180)  # with its last thread: only then is its lock free
    deadline = time.time() + 40
    while not is_gone(pids)() and time.time() < deadline:
        time.sleep(0.05)
    gone, log = is_gone(pids)(), job.log()
    rows = metrics(folder) if (folder / "metrics.jsonl").exists() else []
    steps = [row["step"] for row in rows]
    saved = True
    if number != signal.SIGKILL and steps and max(steps) > 0 and "ended by" not in log:
        saved = newest(folder).name == f"step_{max(steps):06d}"
    run(root, *command, "--out", "cut", "--resume", ranks=2 if torchrun else 1)
    return {"saved": saved, "gone": gone, "quiet": not stage_traceback(log) and len(own_lines(log)) <= 2,
            "same": is_whole(folder, whole)}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    # In a shell's background job Ctrl-C is ignored, and it would be by all that starts here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    root = Path(tempfile.mkdtemp())
    make_room(root)
    print("| stopped | times | saved | gone | quiet | same |\n|---|---|---|---|---|---|", flush=True)
    wholes = {}
    for name, stop in STOPS.items():
        if args.only not in name:
            continue
        stage, torchrun, _, _ = stop
        command = [*STAGES[stage], "--steps", "20", "--save_every", "5", "--eval_every", "10"]
        key = stage, bool(torchrun)
        if key not in wholes:
            whole = root / f"whole{len(wholes)}"
            began = time.time()
            job = started(root, *command, "--out", whole, torchrun=torchrun)
            job.process.wait()
            wholes[key] = whole, time.time() - began
        whole, seconds = wholes[key]
        counts = dict.fromkeys(("saved", "gone", "quiet", "same"), 0)
        chance = random.Random(name)
        for _ in range(args.times):
            for column, good in stop_once(root, stop, chance, seconds, command, whole).items():
                counts[column] += good
        print("|", " | ".join([name, str(args.times), *map(str, counts.values())]), "|", flush=True)
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
