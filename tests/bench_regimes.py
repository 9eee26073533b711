"""Each method where it is said to help: arms from the same start, on the same questions, at equal rollouts.

    python tests/bench_regimes.py                           # all regimes, 5 seeds
    python tests/bench_regimes.py rethink --seeds 0 1       # one regime, two seeds
    python tests/bench_regimes.py saturated --only GRPO SSR

Prints a row per seed and arm, then each arm minus plain GRPO, paired by seed, with bootstrap 95 % intervals.
Rows go to out/regimes/REGIME.jsonl as well. What is finished is not repeated: remove out/regimes to have it
anew. Starts are the quickstart's (out/bench/SEED, made here if there are none). The regimes:

saturated  The start, GRPO's own result, answers nearly all questions right. One in ten is drawn in the style
           that it has not seen, and rollouts are scarce: few groups have an advantage. Measured: accuracy in
           that style.
rethink    The start answers at first sight, mostly wrong. In one response of twenty it hesitates with one of
           the triggers' words, and goes through the board. Measured: accuracy, how many reflect.
"""
import argparse
import json
import random
import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data_prep  # noqa: E402
import grpo  # noqa: E402
from bench_quickstart import interval, read_metrics, run  # noqa: E402

TRAIN = "data/mini/counting_train.jsonl"
HARD = 0.1  # share of unfamiliar questions
REPAIRED = 0.05  # share of the start's responses that notice and repair
RETHINK = ["--rethink_frac", "0.5", "--rethink_rewind", "1", "--rethink_min", "1", "--rethink_max", "60"]


def base(seed, stage):
    """The quickstart's own model of that seed, after sft.py or grpo.py."""
    out = f"out/bench/{seed}/{stage}"
    start = ["--model", base(seed, "sft")] if stage == "grpo" else []
    run(out, f"{stage}.py", "--seed", seed, "--out", out, *start)
    return out


# ----- saturated


def mostly_easy(seed, folder):
    """Training records of which HARD are drawn in the style "ood", other boards than the held-out ones."""
    path, rng = folder / "mixed.jsonl", random.Random(f"mixed/{seed}")
    if path.exists():
        return path
    records = data_prep.read_records(ROOT / TRAIN)
    hard = []
    for i in range(round(HARD * len(records))):
        row = data_prep.counting_example(rng, i, "ood")
        hard.append({"id": f"hard-{i}", "task": "counting", "source": "mini", "images": row["pictures"],
                     "question": row["question"], "answer": row["answer"], "answer_type": "number"})
    mixed = records[:len(records) - len(hard)] + hard
    rng.shuffle(mixed)
    data_prep.write_records(path, mixed)
    return path


def saturated(seed, folder):
    return base(seed, "grpo"), mostly_easy(seed, folder)


# ----- rethink


def hesitating(seed, folder):
    """Responses at first sight, of which REPAIRED go on with a trigger and the whole board."""
    path, rng = folder / "hesitating.jsonl", random.Random(f"hesitating/{seed}")
    if path.exists():
        return path
    meta = json.loads((ROOT / "data/mini/counting_meta.json").read_text())
    thoughts = {row["id"]: row["cot"] for row in meta}
    records = data_prep.read_records(ROOT / TRAIN)
    for record in records:
        thought = "at first sight"
        if rng.random() < REPAIRED:
            trigger = rng.choice(list(grpo.TRIGGERS.values()))
            thought += f"{trigger} {thoughts[record['id']]}"
        record["response"] = f"<think> {thought} </think> <answer> {record['answer']} </answer>"
    data_prep.write_records(path, records)
    return path


def rethink(seed, folder):
    start = f"{folder.relative_to(ROOT)}/start"
    run(start, "sft.py", "--seed", seed, "--model", base(seed, "sft"), "--data", hesitating(seed, folder),
        "--steps", 400, "--lr", 5e-4, "--out", start)
    return start, TRAIN


# ----- arms

COMMON = ["--eval_every", "5", "--eval_n", "100", "--eval_data"]
# regime -> (its start and data, flags of all arms, arms, the benchmark that counts)
REGIMES = {
    "saturated": (saturated, ["--prompts_per_step", "16", "--steps", "40", "--max_new_tokens", "60"],
                  {"GRPO": [], "filter": ["--ssr", "filter"], "SSR": ["--ssr", "replay"],
                   "refill": ["--ssr", "refill"]}, "counting-ood"),
    "rethink": (rethink, ["--prompts_per_step", "16", "--steps", "20", "--max_new_tokens", "140"],
                {"GRPO": [], "rethinking": RETHINK}, "counting-id"),
}


def measure(regime, arm, seed):
    """Train one arm on one seed; what is known of it afterwards."""
    prepare, flags, arms, bench = REGIMES[regime]
    folder = ROOT / f"out/regimes/{regime}/{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    start, data = prepare(seed, folder)
    out = f"out/regimes/{regime}/{seed}/{arm.replace(' ', '_')}"
    held_out = f"data/mini/{bench.replace('-', '_')}.jsonl"
    seconds = run(out, "grpo.py", "--seed", seed, "--model", start, "--data", data, "--out", out, *COMMON,
                  held_out, *flags, *arms[arm])
    run(f"{out}/eval", "eval.py", "--bench", bench, "--model", out, "--max_new_tokens", 140)
    after = json.loads((ROOT / out / "eval/summary.json").read_text())[0]
    rows = read_metrics(ROOT / out / "metrics.jsonl")
    steps = [row for row in rows if "reward/mean" in row]
    return {"regime": regime, "arm": arm, "seed": seed, "start": 100 * rows[0]["eval/accuracy"],
            "accuracy": 100 * after["accuracy"], "tokens": after["tokens"],
            "effective": 100 * mean(row["groups/effective_frac"] for row in steps[:10]),
            "reflect": 100 * steps[-1]["len/reflect"],
            "rollout tokens": sum(row["tokens/gen"] for row in steps), "seconds": seconds}


def main(regimes, seeds, only):
    for regime in regimes:
        rows = []
        for seed in seeds:
            for arm in [arm for arm in REGIMES[regime][2] if arm in only or not only]:
                rows.append(measure(regime, arm, seed))
                if len(rows) == 1:
                    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
                shown = [f"{cell:.1f}" if isinstance(cell, float) else str(cell)
                         for cell in rows[-1].values()]
                print("| " + " | ".join(shown) + " |", flush=True)
        data_prep.write_rows(ROOT / f"out/regimes/{regime}.jsonl", rows)
        scores = {(row["arm"], row["seed"]): row["accuracy"] for row in rows}
        for arm in dict.fromkeys(row["arm"] for row in rows if row["arm"] != "GRPO"):
            gains = [scores[arm, seed] - scores["GRPO", seed] for seed in seeds]
            print(f"{arm} minus GRPO: {interval(gains)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("regimes", nargs="*", metavar="REGIME", help=", ".join(REGIMES))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--only", nargs="*", default=[])
    args = parser.parse_args()
    main(args.regimes or list(REGIMES), args.seeds, args.only)
