"""Each method where it is said to help: arms from the same start, on the same pictures, at equal rollouts.

    python tests/bench_regimes.py                           # all regimes, 5 seeds
    python tests/bench_regimes.py rethink --seeds 0 1       # one regime, two seeds
    python tests/bench_regimes.py saturated --only GRPO SSR

Prints a row per seed and arm, then each arm minus plain GRPO, paired by seed, with bootstrap 95 % intervals.
Writes out/regimes/REGIME.jsonl, the same rows, and docs/REGIME.svg, a dot for each run. Two runs go side by
side, with one thread each. What is finished is not repeated: remove out/regimes to have it anew. Starts are
those of bench_quickstart.py (out/bench, made here if there are none). The regimes:

shift      Does RL carry over to a drawing style that nobody trained on, and do answers or thoughts that are
           imitated? The quickstart's start and its GRPO, against SFT from there for the same time.
saturated  The start, GRPO's own result, answers nearly all questions right. One in ten is drawn in the style
           that it has not seen, and rollouts are scarce: few groups have an advantage. Measured: accuracy in
           that style.
rethink    The start can reconsider, and never does so by itself: it answers at first sight, but told to look
           it says "Wait," and goes through the board. Rollouts are scarce. Measured: accuracy.
overthink  The start goes on after a look that was right, and is right less often the longer it goes on. A
           fixed long limit against PTST, at the same product of limit and group. Measured: accuracy.
shortcut   To each question belongs a board that the start describes more often than the one that it sees.
           Measured: accuracy.
objectives The quickstart's start, with two updates a batch: with one, all objectives are the same.
"""
import argparse
import itertools
import json
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data_prep  # noqa: E402
import grpo  # noqa: E402
from bench_quickstart import draw_arms, folder_of, interval, quickstart, read_metrics, run  # noqa: E402

TRAIN = "data/mini/counting_train.jsonl"
HARD = 0.1  # saturated: share of unfamiliar questions
GOES_ON, LOOKS = 0.7, 6  # overthink: the chance of another look after each, and how many at most
SLIPS = 0.15  # and the chance that it is on another board, where the chain then stays
TYPICAL = 0.8  # shortcut: share of the start's lessons that describe the board which goes with their question


def start_of(seed, stage):
    """The quickstart's own model of that seed, after sft.py or grpo.py."""
    folder = folder_of(seed, "1", sys.executable)
    quickstart(seed, folder, threads="1")
    return f"{folder}/{stage}"


def answered(record, thought, answer=None):
    answer = answer or record["answer"]
    return record | {"response": f"<think> {thought} </think> <answer> {answer} </answer>"}


def thoughts():
    """What is to be seen on each picture of the training rows, by id."""
    return {row["id"]: row["cot"] for row in json.loads((ROOT / "data/mini/counting_meta.json").read_text())}


def written(path, records):
    """The path, with the records written to it unless they are there."""
    if not path.exists():
        data_prep.write_records(path, list(records))
    return path


def start_after(seed, folder, lessons):
    """The quickstart's start of that seed after some SFT on these records."""
    data, start = written(folder / "lessons.jsonl", lessons), folder / "start"
    run(start, "sft.py", "--seed", seed, "--model", start_of(seed, "sft"), "--data", data, "--steps", 600,
        "--eval_data", "", "--out", start, threads="1")
    return start


# ----- the regimes: (seed, folder) -> {arm: (run directory, command)}, where GRPO is the first


def shift(seed, folder):
    start, policy = start_of(seed, "sft"), start_of(seed, "grpo")
    records, seen = data_prep.read_records(ROOT / TRAIN), thoughts()
    answers = written(folder / "answers.jsonl", (answered(r, "at first sight") for r in records))
    looks = written(folder / "looks.jsonl", (answered(r, seen[r["id"]]) for r in records))
    spent = {stage: float((ROOT / stage / "wall_time").read_text()) for stage in (start, policy)}
    steps = round(len(read_metrics(ROOT / start / "metrics.jsonl")) * spent[policy] / spent[start])
    sft = ["sft.py", "--seed", 100 + seed, "--model", start, "--eval_data", "", "--steps", steps]
    return {"GRPO": (policy, []),
            "more SFT": (folder / "more", sft),
            "SFT on answers": (folder / "answers", [*sft, "--data", answers]),
            "SFT on thoughts": (folder / "thoughts", [*sft, "--data", looks])}


def saturated(seed, folder):
    rng, records = random.Random(f"mixed/{seed}"), data_prep.read_records(ROOT / TRAIN)
    hard = []
    for i in range(round(HARD * len(records))):
        row = data_prep.counting_example(rng, i, "ood")  # other boards than the held-out ones
        hard.append({"id": f"hard-{i}", "task": "counting", "source": "mini", "images": row["pictures"],
                     "question": row["question"], "answer": row["answer"], "answer_type": "number"})
    mixed = records[len(hard):] + hard
    rng.shuffle(mixed)
    command = ["grpo.py", "--seed", seed, "--model", start_of(seed, "grpo"), "--prompts_per_step", 16,
               "--steps", 40, "--data", written(folder / "mixed.jsonl", mixed),
               "--eval_data", "data/mini/counting_ood.jsonl", "--eval_every", 5, "--eval_n", 100]
    ways = {"GRPO": "off", "filter": "filter", "SSR": "replay", "refill": "refill"}
    return {arm: (folder / arm, [*command, "--ssr", way]) for arm, way in ways.items()}


def rethink(seed, folder):
    rng, seen = random.Random(f"hesitating/{seed}"), thoughts()

    def hesitating(record):
        thought = f"at first sight{grpo.TRIGGERS['bare']} {seen[record['id']]}"
        if rng.random() < data_prep.TOLD:
            return answered(record | {"question": record["question"] + data_prep.LOOK}, thought)
        return answered(record, "at first sight")

    start = start_after(seed, folder, map(hesitating, data_prep.read_records(ROOT / TRAIN)))
    command = ["grpo.py", "--seed", seed, "--model", start, "--max_new_tokens", 140,
               "--prompts_per_step", 4, "--steps", 60, "--eval_every", 5, "--eval_n", 100]
    forced = ["--rethink_frac", 0.5, "--rethink_kinds", "bare=1", "--rethink_rewind", 1, "--rethink_min", 1,
              "--rethink_max", 60]
    return {"GRPO": (folder / "GRPO", command),
            "GRPO, 5 x the steps": (folder / "longer", [*command, "--steps", 300, "--eval_every", 25]),
            "rethinking": (folder / "rethinking", [*command, *forced])}


def overthink(seed, folder):
    rng, seen, records = random.Random(f"chains/{seed}"), thoughts(), data_prep.read_records(ROOT / TRAIN)
    alike = {}
    for record in records:
        alike.setdefault(record["question"], []).append(record)

    def chain(record):
        board = record
        looks = [seen[board["id"]]]
        while rng.random() < GOES_ON and len(looks) < LOOKS:
            if rng.random() < SLIPS:
                board = rng.choice(alike[record["question"]])
            looks.append(seen[board["id"]])
        return answered(record, grpo.TRIGGERS["bare"].join(looks), board["answer"])

    start = start_after(seed, folder, map(chain, records))
    command = ["grpo.py", "--seed", seed, "--model", start, "--prompts_per_step", 4, "--steps", 40,
               "--eval_every", 5, "--eval_n", 100]
    long = [*command, "--max_new_tokens", 280]
    return {"GRPO": (folder / "GRPO", [*long, "--group_size", 4]),
            "GRPO, 4 x the rollouts": (folder / "larger", [*long, "--group_size", 16]),
            "PTST": (folder / "PTST", [*command, "--ptst", "70x16:20,140x8:20"])}


def shortcut(seed, folder):
    rng, seen, records = random.Random(f"typical/{seed}"), thoughts(), data_prep.read_records(ROOT / TRAIN)
    typical = {}
    for record in records:
        typical.setdefault(record["question"], record)

    def described(record):
        board = typical[record["question"]] if rng.random() < TYPICAL else record
        return answered(record, seen[board["id"]], board["answer"])

    start = start_after(seed, folder, map(described, records))
    command = ["grpo.py", "--seed", seed, "--model", start, "--prompts_per_step", 4, "--steps", 40,
               "--eval_every", 4, "--eval_n", 100]
    ways = {"GRPO": [], "PAPO": ["--perception", "papo"],
            "VPPO": ["--perception", "vppo", "--perception_entropy", 0.06],
            "NoisyRollout": ["--noisy_frac", 0.5]}
    return {arm: (folder / arm, [*command, *flags]) for arm, flags in ways.items()}


def objectives(seed, folder):
    command = ["grpo.py", "--seed", seed, "--model", start_of(seed, "sft"), "--updates", 2,
               "--prompts_per_step", 16, "--steps", 40, "--eval_every", 4, "--eval_n", 100]
    ways = {"GRPO": [], "cispo": ["--objective", "cispo"], "sapo": ["--objective", "sapo"],
            "gspo": ["--objective", "gspo", "--clip_low", 3e-4, "--clip_high", 4e-4],
            "LoRA": ["--lora_rank", 16, "--lr", 1e-3]}
    return {arm: (folder / arm, [*command, *flags]) for arm, flags in ways.items()}


# regime -> (its arms, benchmarks: the first is the one that it is about)
REGIMES = {"shift": (shift, ["counting-ood", "counting-id"]),
           "saturated": (saturated, ["counting-ood", "counting-id"]),
           "rethink": (rethink, ["counting-id", "counting-ood"]),
           "overthink": (overthink, ["counting-id", "counting-ood"]),
           "shortcut": (shortcut, ["counting-id", "counting-ood"]),
           "objectives": (objectives, ["counting-id", "counting-ood"])}


# ----- their tables


def measure(regime, seed, only):
    """Train the arms of one seed; a row for each."""
    prepare, benches = REGIMES[regime]
    folder = ROOT / f"out/regimes/{regime}/{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for arm, (out, command) in prepare(seed, folder).items():
        if only and arm not in only:
            continue
        seconds = run(out, *command, "--out", out, threads="1")
        run(f"{out}/eval", "eval.py", "--model", out, "--max_new_tokens", 280, "--bench", *benches,
            threads="1")
        found = json.loads((ROOT / out / "eval/summary.json").read_text())
        metrics = read_metrics(ROOT / out / "metrics.jsonl")
        steps = [row for row in metrics if "reward/mean" in row]
        row = {"regime": regime, "seed": seed, "arm": arm, "seconds": round(seconds)}
        row |= {entry["bench"]: 100 * entry["accuracy"] for entry in found[:len(benches)]}
        row["tokens"] = found[0]["tokens"]
        if steps:  # of GRPO
            row |= {"before": 100 * metrics[0]["eval/accuracy"],
                    "rollout tokens": sum(step["tokens/gen"] for step in steps),
                    "effective": 100 * mean(step["groups/effective_frac"] for step in steps[:10]),
                    "reflect": 100 * steps[-1]["len/reflect"]}
        row["curve"] = [(step["step"], 100 * step["eval/accuracy"], spent)
                        for step, spent in with_seconds(metrics) if "eval/accuracy" in step]
        rows.append(row)
    return rows


def with_seconds(metrics):
    """(row, seconds of training up to it) of each row of a metrics.jsonl."""
    spent = 0.0
    for row in metrics:
        spent += row.get("time/step", 0.0)
        yield row, spent


def held_out(row, seconds):
    """Held-out accuracy of a run when it had trained for so long."""
    return [accuracy for _, accuracy, spent in row["curve"] if spent <= seconds][-1]


def differences(rows, benches):
    """Lines: each arm minus those of GRPO alone, paired by seed; on the benchmarks, then held out when the
    shorter of the two runs ended.
    """
    runs = {(row["arm"], row["seed"]): row for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    plain = [arm for arm in arms if arm.startswith("GRPO")]
    for ours, theirs in itertools.product([arm for arm in arms if arm not in plain], plain):
        pairs = [(runs[ours, seed], runs[theirs, seed]) for seed in seeds]
        for bench in benches:
            gains = [a[bench] - b[bench] for a, b in pairs]
            yield f"{bench}, {ours} minus {theirs}: {interval(gains)}"
        if pairs[0][0]["curve"]:
            gains = []
            for a, b in pairs:
                shortest = min(a["curve"][-1][2], b["curve"][-1][2])
                gains.append(held_out(a, shortest) - held_out(b, shortest))
            yield f"held out at equal time, {ours} minus {theirs}: {interval(gains)}"


def shown(cell):
    return f"{cell:.1f}" if isinstance(cell, float) else str(cell)


def main(regimes, seeds, only):
    for regime in regimes:
        with ThreadPoolExecutor(2) as pool:
            rows = [row for found in pool.map(lambda seed: measure(regime, seed, only), seeds)
                    for row in found]
        data_prep.write_rows(ROOT / f"out/regimes/{regime}.jsonl", rows)
        names = [name for name in rows[0] if name != "curve"]
        print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
        for row in rows:
            print("| " + " | ".join(shown(row.get(name, "")) for name in names) + " |")
        benches = REGIMES[regime][1]
        print("\n".join(differences(rows, benches)), flush=True)
        scores = {}
        for row in rows:
            scores.setdefault(row["arm"], []).append(row[benches[0]])
        draw_arms(scores, f"{benches[0]}, accuracy after training (%)", ROOT / f"docs/{regime}.svg")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("regimes", nargs="*", metavar="REGIME", help=", ".join(REGIMES))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--only", nargs="*", default=[])
    args = parser.parse_args()
    main(args.regimes or list(REGIMES), args.seeds, args.only)
