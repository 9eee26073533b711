"""Reason-RFT's four paradigms (arXiv 2503.20752) on the three mini tasks, as the paper's ID / OOD table.

    python tests/bench_paradigms.py        # seeds 0 and 1 side by side, about 40 minutes on 2 cores
    python tests/bench_paradigms.py 0      # one seed; finished runs under out/paradigms are not repeated

All arms of a task and seed start from one base, taught by sft.py on TASK_train.jsonl: it sees, and could go
through the board, but answers at first sight. Then:
    ANS-SFT     answers alone                CoT-SFT     thoughts and answers
    RFT-Zero    GRPO on the base             Reason-RFT  thoughts of the first 1,600 rows, then GRPO
Cells are greedy accuracy in percent on 300 rows (transform: the mean partial score, exact in brackets), seed
by seed. Floor: the best constant answer that the training rows suggest, chosen for each kind of question.
"""
import json
import os
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import rewards  # noqa: E402
from data_prep import read_records  # noqa: E402

ROOM = ROOT / "out/paradigms"
STAGE1 = 1600  # rows of stage 1, as in the paper
ROWS = 300  # of each split
STEPS = {  # of SFT with 32 rows, of GRPO (rl, stage2) with 32 questions x 8
    "counting": {"base": 400, "ans_sft": 1200, "cot_sft": 300, "rl": 40, "stage1": 100, "stage2": 40},
    "structure": {"base": 400, "ans_sft": 1200, "cot_sft": 300, "rl": 40, "stage1": 100, "stage2": 40},
    "transform": {"base": 600, "ans_sft": 1200, "cot_sft": 800, "rl": 40, "stage1": 400, "stage2": 40},
}
SFT = ["sft.py", "--batch_size", 32]
RATE = {"ans_sft": 1e-3}  # at the others' 2e-3 counting stayed at the floor
TOKENS = {"counting": 80, "structure": 80, "transform": 96}  # of a response, at most
SPLITS = {"counting": ("id", "ood"), "structure": ("id", "ood"), "transform": ("id", "left", "right")}
ARMS = {"base": (), "ANS-SFT": ("ans_sft",), "CoT-SFT": ("cot_sft",), "RFT-Zero": ("rl",),
        "Reason-RFT": ("stage1", "stage2")}


def run(*argv):
    """Run a stage in the repository root; return its wall time in seconds."""
    began = time.time()
    done = subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"{' '.join(map(str, argv))}\n{done.stderr[-2000:]}")
    return time.time() - began


def train(task, arm, seed, base):
    """Train one arm from the base, stage by stage; return the run that holds the result and the seconds."""
    model, spent = base, 0.0
    score = "functions" if task == "transform" else "accuracy"
    for form in ARMS[arm]:
        out, clock = ROOM / f"{task}_{form}_{seed}", ROOM / f"{task}_{form}_{seed}/seconds"
        stage = ["grpo.py", "--reward", f"{score}=1,format=1", "--prompts_per_step", 32,
                 "--max_new_tokens", TOKENS[task]] if form in ("rl", "stage2") else [
                     *SFT, "--warmup", 10, "--lr", RATE.get(form, 2e-3)]
        if not clock.exists():
            took = run(*stage, "--model", model, "--data", ROOM / f"data/{task}_meta_{form}.jsonl",
                       "--steps", STEPS[task][form], "--seed", seed, "--out", out)
            clock.write_text(f"{took:.0f}")
        model, spent = out, spent + float(clock.read_text())
    return model, spent


def measure(task, seed):
    """{arm: (seconds, {split: summary entry})} of one task and seed."""
    base, found = ROOM / f"{task}_base_{seed}", {}
    if not list(base.glob("step_*/meta.json")):
        run(*SFT, "--lr", 2e-3, "--data", f"data/mini/{task}_train.jsonl", "--seed", seed, "--out", base,
            "--steps", STEPS[task]["base"])
    for arm in ARMS:
        model, seconds = train(task, arm, seed, base)
        prompt = "board_answer" if task == "transform" else f"{task}_answer"
        asked = ["--task", prompt] if arm == "ANS-SFT" else []  # as it was taught, for the answer alone
        run("eval.py", "--bench", *(f"{task}-{split}" for split in SPLITS[task]), "--model", model, *asked,
            "--max_new_tokens", TOKENS[task], "--limit", ROWS)
        entries = json.loads((model / "eval/summary.json").read_text())
        found[arm] = seconds, dict(zip(SPLITS[task], entries))
        print(f"{task} seed {seed} {arm}: {seconds:.0f} s", *(
            f"{entry['bench']} {cell(entry)}" for entry in entries), file=sys.stderr, flush=True)
    return found


def prepare():
    """The mini suite and its Reason-RFT training sets."""
    if not (ROOT / "data/mini/transform_train.jsonl").exists():
        run("data_prep.py")
    for task in STEPS:
        board = ["--task", "board"] if task == "transform" else []
        for form in ("ans_sft", "cot_sft", "rl", "stage1", "stage2"):
            run("data_prep.py", "--source", "reason_rft", "--input", f"data/mini/{task}_meta.json",
                "--form", form, "--stage1_n", STAGE1, *board, "--out", ROOM / "data")


def cell(entry):
    partial, exact = entry["scores"].get("partial"), f"{100 * entry['accuracy']:.0f}"
    return exact if partial is None else f"{100 * partial:.0f} ({exact})"


def floor(task, split):
    """Score of the best constant answer, per answer type, among the most frequent of the training rows."""
    reward = rewards.functions if task == "transform" else rewards.accuracy
    training = read_records(ROOT / f"data/mini/{task}_train.jsonl")
    rows, total = read_records(ROOT / f"data/mini/{task}_{split}.jsonl", limit=ROWS), 0.0
    for kind in {row["answer_type"] for row in rows}:
        guesses = Counter(row["answer"] for row in training if row["answer_type"] == kind).most_common(40)
        own = [row for row in rows if row["answer_type"] == kind]
        total += max(sum(reward(f"<answer>{guess}</answer>", row) for row in own) for guess, _ in guesses)
    return 100 * total / len(rows)


def main(seeds):
    prepare()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        jobs = {(task, seed): pool.submit(measure, task, seed) for task in STEPS for seed in seeds}
        found = {key: job.result() for key, job in jobs.items()}
    columns = [(task, split) for task in STEPS for split in SPLITS[task]]
    print("| paradigm | " + " | ".join(f"{task} {split}" for task, split in columns) + " | seconds |\n"
          "|---|" + "---|" * (len(columns) + 1))
    print("| floor | " + " | ".join(f"{floor(*column):.0f}" for column in columns) + " | |")
    for arm in ARMS:
        cells = [" / ".join(cell(found[task, seed][arm][1][split]) for seed in seeds)
                 for task, split in columns]
        spent = [found[task, seed][arm][0] for task in STEPS for seed in seeds]
        print(f"| {arm} | " + " | ".join(cells) + f" | {min(spent):.0f} - {max(spent):.0f} |")


if __name__ == "__main__":
    main([int(s) for s in sys.argv[1:]] or [0, 1])
