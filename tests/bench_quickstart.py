"""The quickstart's claim, measured: GRPO against its own start, on other seeds and other machines.

    python tests/bench_quickstart.py           # 5 seeds, 4 minutes each on 2 cores; writes under out/bench
    python tests/bench_quickstart.py --threads 1 2 --pythons python3.11 other/bin/python  # ten runs
    python tests/bench_quickstart.py --curve out/grpo/metrics.jsonl  # only the picture, of a run that exists

The second form shows how much depends on the machine: each seed runs once with each pair of a number of
threads and a Python, whose packages may be other ones. Prints a row per run (held-out accuracy, 500 questions
each), the gain with its 95 % interval, and the curve of the first run, which is also drawn: docs/curve.svg,
the picture of the README. What is finished is not repeated: remove out/bench to have it anew.
"""
import argparse
import functools
import itertools
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parents[1]
CURVE = ROOT / "docs/curve.svg"
WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 578, 48, 244  # the plot's frame within the picture
# The 97.5 % quantile of Student's t for n differences.
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
BLUE, ORANGE, GREY, INK = "#0b62c4", "#bf5500", "#d9dde2", "#24292f"


def run(out, *argv, threads="", python=sys.executable):
    """Run a stage in the repository root unless `out` has its wall time already; return that, in seconds."""
    took = ROOT / out / "wall_time"
    if not took.exists():
        began = time.time()
        variables = os.environ | ({"OMP_NUM_THREADS": threads} if threads else {})
        subprocess.run([python, *map(str, argv)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL, env=variables)
        took.write_text(str(time.time() - began))
    return float(took.read_text())


def accuracy(model, **how):
    """Greedy accuracy on the 500 held-out questions of counting-id and of counting-ood, in percent."""
    run(f"{model}/eval", "eval.py", "--bench", "counting-id", "counting-ood", "--model", model,
        "--max_new_tokens", 96, **how)
    return [100 * bench["accuracy"] for bench in json.loads((ROOT / model / "eval/summary.json").read_text())]


# ----- the picture


def text(x, y, words, colour=INK, anchor="middle", more=""):
    return f'<text x="{x:g}" y="{y:g}" fill="{colour}" text-anchor="{anchor}"{more}>{words}</text>'


def line(x1, y1, x2, y2, colour):
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{colour}"/>'


def series(points, colour, dots):
    """A polyline through (x, y) points, with a dot on each of them if asked."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    yield (f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5" '
           'stroke-linejoin="round"/>')
    if dots:
        for x, y in points:
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>'


def tick_size(largest, most):
    """The least of 1, 2, 5, 10, 20, 50, .. of which `most` steps reach `largest`."""
    sizes = (lead * 10 ** power for power in range(9) for lead in (1, 2, 5))
    return next(size for size in sizes if size * most >= largest)


def draw_curve(rows, path):
    """Draw held-out accuracy and the length of sampled responses over the steps of a run, as an SVG file.

    rows: those of metrics.jsonl. Accuracy (left axis, percent) has a dot for each evaluation, length (right
    axis, tokens) a value for each step. The picture brings its own background, for light and dark pages.
    """
    accuracies = [(row["step"], 100 * row["eval/accuracy"]) for row in rows if "eval/accuracy" in row]
    lengths = [(row["step"], row["len/mean"]) for row in rows if "len/mean" in row]
    if not accuracies or not lengths:
        raise ValueError("no step with eval/accuracy, or none with len/mean: "
                         "is this a metrics.jsonl of grpo.py?")
    last = max(1, rows[-1]["step"])
    tokens = tick_size(max(length for _, length in lengths), 5)  # between two lines; there are five of them

    def x(step):
        return LEFT + (RIGHT - LEFT) * step / last

    def y(share):
        return BOTTOM - (BOTTOM - TOP) * share

    marks = []
    for i in range(6):
        height = y(i / 5)
        marks += [line(LEFT, height, RIGHT, height, GREY),
                  text(LEFT - 8, height + 4, f"{20 * i}", BLUE, "end"),
                  text(RIGHT + 8, height + 4, f"{tokens * i}", ORANGE, "start")]
    for step in range(0, last + 1, tick_size(last, 8)):
        marks += [line(x(step), BOTTOM, x(step), BOTTOM + 5, INK), text(x(step), BOTTOM + 20, step)]
    middle = (TOP + BOTTOM) / 2
    marks += [line(LEFT, BOTTOM, RIGHT, BOTTOM, INK),
              text((LEFT + RIGHT) / 2, BOTTOM + 42, "GRPO step"),
              text(18, middle, "accuracy (%)", BLUE, more=f' transform="rotate(-90 18 {middle:g})"'),
              text(WIDTH - 14, middle, "tokens", ORANGE,
                   more=f' transform="rotate(90 {WIDTH - 14} {middle:g})"')]
    marks += series([(x(step), y(length / (5 * tokens))) for step, length in lengths], ORANGE, dots=False)
    marks += series([(x(step), y(percent / 100)) for step, percent in accuracies], BLUE, dots=True)
    marks += series([(LEFT, 24), (LEFT + 13, 24), (LEFT + 26, 24)], BLUE, dots=False)
    marks += [f'<circle cx="{LEFT + 13}" cy="24" r="3.5" fill="{BLUE}"/>',
              text(LEFT + 34, 28, "held-out accuracy, greedy", anchor="start")]
    marks += series([(LEFT + 262, 24), (LEFT + 288, 24)], ORANGE, dots=False)
    marks += [text(LEFT + 296, 28, "length of sampled responses", anchor="start")]
    write_picture(path, HEIGHT, "Held-out accuracy and response length over the steps of GRPO", marks)


def draw_arms(arms, title, path):
    """Draw a dot for each run of each arm, and a bar for their mean, as an SVG file.

    arms: name -> percents, one a seed. The picture brings its own background, for light and dark pages.
    """
    row, top = 34, 44
    left = max(150, 24 + 7 * max(map(len, arms)))  # a letter is about seven wide
    height = top + row * len(arms) + 40

    def x(percent):
        return left + (WIDTH - left - 70) * percent / 100

    marks = [text(left, 26, title, anchor="start")]
    for percent in range(0, 101, 20):
        marks += [line(x(percent), top, x(percent), height - 36, GREY),
                  text(x(percent), height - 16, percent)]
    for i, (name, percents) in enumerate(arms.items()):
        y, middle = top + row * (i + 0.5), mean(percents)
        colour = ORANGE if name == "GRPO" else BLUE
        marks += [text(left - 12, y + 4, name, anchor="end"),
                  f'<rect x="{x(middle) - 1.5:.1f}" y="{y - 11:g}" width="3" height="22" fill="{colour}"/>',
                  text(WIDTH - 62, y + 4, f"{middle:.1f}", colour, "start")]
        marks += [f'<circle cx="{x(percent):.1f}" cy="{y:g}" r="4.5" fill="{colour}" fill-opacity="0.45"/>'
                  for percent in percents]
    write_picture(path, height, title, marks)


def write_picture(path, height, title, marks):
    """Write an SVG file of the width of all, with a background and a title for those who cannot see it."""
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}" font-family="Helvetica, Arial, sans-serif" font-size="13" role="img">')
    background = f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="6" fill="#ffffff" ' \
                 f'stroke="{GREY}"/>'
    lines = [head, f"<title>{title}</title>", background, *marks, "</svg>"]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_metrics(path):
    return [json.loads(row) for row in Path(path).read_text(encoding="utf-8").splitlines()]


# ----- the tables


def interval(differences, draws=10_000):
    """Their mean with a bootstrap 95 % interval (percentiles of resampled means).

    "no difference" if it holds 0. Of few values it is too narrow: "not settled" if Student's holds 0.
    """
    rng, n = random.Random(0), len(differences)
    means = sorted(sum(rng.choices(differences, k=n)) / n for _ in range(draws))
    low, high = means[round(0.025 * draws)], means[round(0.975 * draws) - 1]
    verdict = ""
    if low <= 0 <= high:
        verdict = ", no difference"
    elif n in STUDENT and abs(mean(differences)) <= STUDENT[n] * stdev(differences) / math.sqrt(n):
        verdict = ", not settled"
    return f"{mean(differences):+.1f} ({low:+.1f} to {high:+.1f}, {n} runs{verdict})"


@functools.cache
def folder_of(seed, threads, python):
    """Where the runs of a seed are, by what they ran on."""
    ask = [python, "-c", "import torch; print(torch.__version__)"]
    torch = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()
    return f"out/bench/{seed}-{threads or 'any'}-{torch}"


def quickstart(seed, folder, **how):
    """Train the two models of a seed; their seconds, by stage."""
    base, policy = f"{folder}/sft", f"{folder}/grpo"
    return {"sft": run(base, "sft.py", "--seed", seed, "--out", base, **how),
            "grpo": run(policy, "grpo.py", "--seed", seed, "--model", base, "--out", policy, **how)}


def main(args):
    print("| seed | threads | torch | start: id | ood | after GRPO: id | ood | seconds of SFT, GRPO |\n"
          "|---|---|---|---|---|---|---|---|")
    pairs, folders = [], []
    for (threads, python), seed in itertools.product(zip(args.threads, args.pythons), args.seeds):
        folder, how = folder_of(seed, threads, python), {"threads": threads, "python": python}
        seconds = quickstart(seed, folder, **how)
        start, after = (accuracy(f"{folder}/{stage}", **how) for stage in ("sft", "grpo"))
        cells = [f"{percent:.1f}" for percent in (*start, *after)]
        spent = ", ".join(f"{seconds[stage]:.0f}" for stage in ("sft", "grpo"))
        head = [str(seed), threads, folder.rpartition("-")[2]]
        print("|", " | ".join([*head, *cells, spent]), "|", flush=True)
        pairs.append((start, after))
        folders.append(folder)
    for split, name in enumerate(("id", "ood")):
        gains = [after[split] - start[split] for start, after in pairs]
        print(f"{name}: starts {min(start[split] for start, _ in pairs):.1f} to "
              f"{max(start[split] for start, _ in pairs):.1f}, after GRPO "
              f"{min(after[split] for _, after in pairs):.1f} at least, gain {interval(gains)}")
    rows = read_metrics(ROOT / f"{folders[0]}/grpo/metrics.jsonl")
    show_curve(rows)
    draw_curve(rows, CURVE)


def show_curve(rows):
    """Print the evaluated steps as a table."""
    print("\n| step | mean reward (sampled) | sampled tokens | effective groups | held-out accuracy (greedy) "
          "| greedy tokens |\n|---|---|---|---|---|---|")
    for row in rows:
        if "eval/accuracy" not in row:
            continue
        sampled = ["", "", ""]  # before the first step nothing was sampled
        if "len/mean" in row:
            sampled = [f"{row['reward/mean']:.3f}", f"{row['len/mean']:.1f}",
                       f"{row['groups/effective_frac']:.2f}"]
        print("|", " | ".join([str(row["step"]), *sampled, f"{100 * row['eval/accuracy']:.1f}",
                               f"{row['eval/len']:.1f}"]), "|")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", nargs="*", default=[""])
    parser.add_argument("--pythons", nargs="*", default=[sys.executable])
    parser.add_argument("--curve", metavar="METRICS")
    args = parser.parse_args()
    if args.curve:
        show_curve(read_metrics(args.curve))
        draw_curve(read_metrics(args.curve), CURVE)
    else:
        main(args)
