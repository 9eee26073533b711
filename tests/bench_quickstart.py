"""The quickstart's claim, measured: GRPO against its own start, and against as much extra time of more SFT.

    python tests/bench_quickstart.py       # 3 seeds, about 25 minutes on 2 cores; writes under out/bench
    python tests/bench_quickstart.py 0     # one seed

Prints one row per seed (held-out accuracy of the three models, 500 questions each) and the curve of the first
seed.
"""
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(*argv):
    """Run a stage in the repository root; return its wall time in seconds."""
    began = time.time()
    subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)
    return time.time() - began


def accuracy(model):
    """Greedy accuracy on the 500 held-out questions of counting-id and of counting-ood, in percent."""
    run("eval.py", "--bench", "counting-id", "counting-ood", "--model", model, "--max_new_tokens", 96)
    return [100 * bench["accuracy"] for bench in json.loads((ROOT / model / "eval/summary.json").read_text())]


def main(seeds):
    print("| seed | start (sft.py) | s | + GRPO | s | gain | + SFT for the same time | s |\n"
          "|---|---|---|---|---|---|---|---|")
    for seed in seeds:
        base, policy, control = (f"out/bench/{name}{seed}" for name in ("sft", "grpo", "more_sft"))
        t_base = run("sft.py", "--seed", seed, "--out", base)
        t_grpo = run("grpo.py", "--seed", seed, "--model", base, "--out", policy)
        steps = round(len((ROOT / base / "metrics.jsonl").read_text().splitlines()) * t_grpo / t_base)
        t_more = run("sft.py", "--seed", seed + 100, "--model", base, "--out", control, "--steps", steps)
        a, b, c = accuracy(base), accuracy(policy), accuracy(control)
        print(f"| {seed} | {a[0]:.1f} (ood {a[1]:.1f}) | {t_base:.0f} "
              f"| {b[0]:.1f} (ood {b[1]:.1f}) | {t_grpo:.0f} | {b[0] - a[0]:+.1f} "
              f"| {c[0]:.1f} (ood {c[1]:.1f}) | {t_more:.0f} |", flush=True)
    lines = (ROOT / f"out/bench/grpo{seeds[0]}/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    print("\n| step | reward | held-out accuracy | response tokens | effective groups |\n"
          "|---|---|---|---|---|")
    for row in rows:
        if "eval/accuracy" in row:
            print(f"| {row['step']} | {row.get('reward/mean', float('nan')):.3f} "
                  f"| {100 * row['eval/accuracy']:.1f} | {row['eval/len']:.1f} "
                  f"| {row.get('groups/effective_frac', float('nan')):.2f} |")


if __name__ == "__main__":
    main([int(s) for s in sys.argv[1:]] or [0, 1, 2])
