"""RISE on the mini suite: do its rationales improve, and does RISE-R1 beat SFT and GRPO that have none?

    python tests/bench_rise.py             # both tasks, seeds 0 to 4; writes under out/bench
    python tests/bench_rise.py 0 detect    # one of each

The tiny model first learns from data/mini/TASK_see.jsonl to describe pictures, then from TASK_talk.jsonl to
write and to read rationales of mixed quality, and to answer at first sight, which is to guess. All arms of a
seed start from there, know the same few annotations (KNOWN) and get about the same CPU
time, counted in the seconds of their own processes, so that other work does not matter:
    RISE    rise.py, --phase annotate, sft.py on what it exports, grpo.py
    SFT     sft.py on the answers, at first sight
    GRPO    grpo.py from the start, as Visual-RFT does
Prints a row per seed and arm, RISE minus the others, paired by seed, with bootstrap 95 % intervals, and the
curves of RISE-CoT. Draws docs/rise_TASK.svg, a dot for each run. Two runs go side by side, with one thread
each. A seed that is finished is not repeated: remove out/bench to have it anew.
"""
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data_prep  # noqa: E402
import rewards  # noqa: E402
from bench_quickstart import draw_arms, interval  # noqa: E402

RL = ["--prompts_per_step", "16", "--group_size", "8", "--max_new_tokens", "64", "--warmup", "2",
      "--lr", "2e-4"]
SFT = ["--eval_data", "", "--token_budget", "2048", "--batch_size", "32", "--lr", "2e-3"]
STEPS = {"see": 300, "talk": 500, "cot": 20, "sft": 120, "grpo": 20}
KNOWN = {"detect": 64, "mood": 16}  # annotated records, for all arms


def run(*argv):
    """Run a stage in the repository root; return the CPU seconds it took, those of its processes included."""
    command = [sys.executable, *map(str, argv)]
    stage = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                             env=os.environ | {"OMP_NUM_THREADS": "1"})
    _, status, used = os.wait4(stage.pid, 0)
    if status:
        raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), command)
    return used.ru_utime + used.ru_stime


def glance(record):
    return record | {"response": f"<think> at first sight </think> <answer> {record['answer']} </answer>"}


def agreement(model, task):
    """Mean agreement and accuracy of greedy answers on the held-out questions, in percent."""
    bench = f"{task}-id"
    run("eval.py", "--bench", bench, "--model", model, "--max_new_tokens", 64)
    path = ROOT / model / f"eval/{bench}.jsonl"
    gold = {r["id"]: r for r in data_prep.read_records(ROOT / f"data/mini/{task}_id.jsonl")}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return (100 * mean(rewards.agreement(row["response"], gold[row["id"]]) for row in rows),
            100 * mean(rewards.accuracy(row["response"], gold[row["id"]]) for row in rows))


def measure(job):
    """All arms on one (task, seed): rows of the table, and the metrics of RISE-CoT."""
    task, seed = job
    folder, common = f"out/bench/rise_{task}_{seed}", ["--seed", seed]
    kept = ROOT / folder / "result.json"
    if kept.exists():
        return json.loads(kept.read_text())
    see, start = f"{folder}/see", f"{folder}/talk"
    taught = sum(run("sft.py", *common, *SFT, "--model", model, "--data", f"data/mini/{task}_{name}.jsonl",
                     "--steps", STEPS[name], "--out", f"{folder}/{name}")
                 for model, name in (("out/tiny", "see"), (see, "talk")))
    known, glances, held_out = (f"data/mini/{task}_{name}_{seed}.jsonl"
                                for name in ("known", "glance", "held_out"))
    n = KNOWN[task]
    records = data_prep.read_records(ROOT / f"data/mini/{task}_train.jsonl")[seed * n:][:n]
    data_prep.write_records(ROOT / known, records)
    data_prep.write_records(ROOT / glances, map(glance, records))
    data_prep.write_records(ROOT / held_out,
                            data_prep.read_records(ROOT / f"data/mini/{task}_id.jsonl", limit=100))
    spent = {
        "cot": run("rise.py", *common, *RL, "--model", start, "--data", known, "--steps", STEPS["cot"],
                   "--eval_data", held_out, "--eval_every", "5", "--out", f"{folder}/cot"),
        "annotate": run("rise.py", *common, *RL, "--phase", "annotate", "--model", f"{folder}/cot",
                        "--data", known, "--out", f"{folder}/notes"),
        "sft": run("sft.py", *common, *SFT, "--model", start, "--data", f"{folder}/notes/sft.jsonl",
                   "--lr", "1e-3", "--warmup", 10, "--steps", STEPS["sft"], "--out", f"{folder}/r1_sft")}
    reward = ["--data", known, "--eval_data", "", "--reward", "agreement=1,format=1"]
    spent["grpo"] = run("grpo.py", *common, *RL, *reward, "--model", f"{folder}/r1_sft",
                        "--steps", STEPS["grpo"], "--out", f"{folder}/r1")
    total, idle = sum(spent.values()), run("sft.py", "--help")  # to start takes seconds, too
    more = {name: round(STEPS[name] * (total - idle) / (spent[name] - idle)) for name in ("sft", "grpo")}
    sft = run("sft.py", *common, *SFT, "--model", start, "--data", glances, "--lr", "1e-3", "--warmup", 10,
              "--steps", more["sft"], "--out", f"{folder}/sft")
    grpo = run("grpo.py", *common, *RL, *reward, "--model", start,
               "--steps", more["grpo"], "--out", f"{folder}/grpo")
    notes = len((ROOT / folder / "notes/sft.jsonl").read_text().splitlines())
    times = " + ".join(f"{seconds:.0f}" for seconds in spent.values())
    rows = [(name, *agreement(f"{folder}/{model}", task), shown) for name, model, shown in (
        ("start of all", "talk", f"{taught:.0f}"), ("SFT on answers", "sft", f"{sft:.0f}"),
        ("GRPO", "grpo", f"{grpo:.0f}"), (f"RISE without its GRPO, {notes} rationales", "r1_sft", ""),
        ("RISE", "r1", f"{total:.0f} = {times}"))]
    lines = (ROOT / folder / "cot/metrics.jsonl").read_text().splitlines()
    result = rows, [json.loads(line) for line in lines]
    data_prep.write_text(kept, [json.dumps(result)])
    return result


def main(seeds, tasks):
    jobs = [(task, seed) for task in tasks for seed in seeds]
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(jobs, pool.map(measure, jobs)))
    print("| task | seed | arm | agreement | accuracy | CPU s |\n|---|---|---|---|---|---|")
    for (task, seed), (rows, _) in found.items():
        for name, agrees, right, seconds in rows:
            print(f"| {task} | {seed} | {name} | {agrees:.1f} | {right:.1f} | {seconds} |")
    print()
    for task in tasks:
        arms = {}
        for seed in seeds:
            for name, agrees, *_ in found[task, seed][0]:
                arms.setdefault(name.partition(",")[0], []).append(agrees)
        for name in [name for name in arms if name != "RISE"]:
            gains = [rise - other for rise, other in zip(arms["RISE"], arms[name])]
            print(f"{task}, agreement, RISE minus {name}: {interval(gains)}")
        draw_arms(arms, f"{task}, agreement on held-out questions (%)", ROOT / f"docs/rise_{task}.svg")
    print("\n| task | seed | step | agreement in training | held out | leaks | tokens |\n"
          "|---|---|---|---|---|---|---|")
    for (task, seed), (_, steps) in found.items():
        for row in steps:
            if "eval/agreement" in row:
                seen = f"{100 * row['reward/agreement']:.1f}" if row["step"] else ""
                print(f"| {task} | {seed} | {row['step']} | {seen} | {100 * row['eval/agreement']:.1f} "
                      f"| {100 * row['eval/leaks']:.1f} | {row['eval/len']:.1f} |")


if __name__ == "__main__":
    main([int(a) for a in sys.argv[1:] if a.isdigit()] or [0, 1, 2, 3, 4],
         [a for a in sys.argv[1:] if not a.isdigit()] or ["detect", "mood"])
