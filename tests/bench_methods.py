"""Every method of grpo.py on the mini suite, at equal updates from the same start and on the same questions.

    python tests/bench_methods.py                    # 3 seeds, a minute or two an arm and seed on 2 cores
    python tests/bench_methods.py 0                  # one seed
    python tests/bench_methods.py 0 --only GRPO PAPO

Writes under out/bench; starts from out/bench/sft{seed}, made by sft.py if there is none. What was interrupted
goes on, what is finished is not repeated: remove a run's folder to have it anew. Arms from "clip x 2" on to
"sapo x 2" make two updates a batch: with one, all objectives are the same. Rollouts are equal but for refill,
which draws more, and ptst; the column of tokens says how much was sampled.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
COMMON = ["--prompts_per_step", "32", "--steps", "40", "--eval_every", "10", "--max_new_tokens", "120"]
REPLAY = ["--ssr", "replay"]
TWICE = ["--updates", "2"]
ARMS = {
    "GRPO": [],
    "filter": ["--ssr", "filter"],
    "SSR": REPLAY,
    "refill": ["--ssr", "refill"],
    "SSR + rethinking": [*REPLAY, "--rethink_frac", "0.5", "--rethink_min", "1", "--rethink_max", "60",
                         "--rethink_rewind", "1"],
    "ptst": ["--ptst", "60x16:20,120x8:20"],
    "clip x 2": TWICE,
    "gspo x 2": [*TWICE, "--objective", "gspo", "--clip_low", "3e-4", "--clip_high", "4e-4"],
    "cispo x 2": [*TWICE, "--objective", "cispo"],
    "sapo x 2": [*TWICE, "--objective", "sapo"],
    "PAPO": ["--perception", "papo"],
    "VPPO": ["--perception", "vppo", "--perception_entropy", "0.06"],
    "NoisyRollout": ["--noisy_frac", "0.5"],
    "LoRA": ["--lora_rank", "16", "--lr", "1e-3"],
}
HEAD = ("held out, step 10", "step 20", "counting-id", "counting-ood",
        "rollouts in the loss that have an advantage, steps 1-10", "31-40", "reflect", "fixed minus broke",
        "perception/kl, steps 1-10", "perception/kl, steps 31-40", "thousand tokens", "s")


def run(*argv):
    """Run a stage in the repository root; it goes on with what is there."""
    done = subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, argv))}\n{done.stderr[-2000:]}")


def measure(name, flags, seed):
    """Train one arm on one seed; its numbers for the table."""
    base, out = f"out/bench/sft{seed}", f"out/bench/{name.replace(' ', '')}{seed}"
    run("sft.py", "--seed", seed, "--out", base, "--resume")
    run("grpo.py", "--seed", seed, "--model", base, "--out", out, "--resume", *COMMON, *flags)
    run("eval.py", "--bench", "counting-id", "counting-ood", "--model", out, "--max_new_tokens", 120)
    rows = [json.loads(line) for line in (ROOT / out / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in rows if "reward/mean" in r]
    evals = {r["step"]: r for r in rows if "eval/accuracy" in r}
    benches = json.loads((ROOT / out / "eval/summary.json").read_text())
    first, last = steps[:10], steps[-10:]
    return [100 * evals[10]["eval/accuracy"], 100 * evals[20]["eval/accuracy"],
            100 * benches[0]["accuracy"], 100 * benches[1]["accuracy"],
            100 * mean(r["groups/trained_frac"] for r in first),
            100 * mean(r["groups/trained_frac"] for r in last),
            100 * mean(r["len/reflect"] for r in last),
            100 * mean(r["rethink/fixed"] - r["rethink/broke"] for r in steps),
            mean(r["perception/kl"] for r in first), mean(r["perception/kl"] for r in last),
            sum(r["tokens/gen"] for r in steps) / 1000, sum(r["time/step"] for r in steps)]


def main(seeds, names):
    print("| arm | " + " | ".join(HEAD) + " |\n|" + "---|" * (1 + len(HEAD)))
    for name in names:
        found = [measure(name, ARMS[name], seed) for seed in seeds]
        cells = []
        for title, values in zip(HEAD, zip(*found)):
            digits = 2 if "kl" in title else 0
            cells.append(" / ".join(f"{value:.{digits}f}" for value in values))
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="*", type=int)
    parser.add_argument("--only", nargs="*", choices=ARMS, default=list(ARMS))
    args = parser.parse_args()
    main(args.seeds or [0, 1, 2], args.only)
