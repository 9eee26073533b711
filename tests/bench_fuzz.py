"""How long rewards.accuracy takes for formulas that computer algebra does not like.

    python tests/bench_fuzz.py               # 100,000 formulas
    python tests/bench_fuzz.py 20000 1       # that many, of another seed
    python tests/bench_fuzz.py 2000 0 1.0    # with the limits of a run: a second each,
                                               a tenth of it for the many

Formulas are drawn around those that have stalled a run (STALLS): high powers of sums, products of sums,
functions of sums, nested roots, towers, factorials, sums and integrals, broken braces. Each is boxed and
graded against one of GOLDS, as a policy would write it. Prints percentiles of the wall time of a call and the
slowest formulas. Ends with an error if a call raised, was no 0 or 1, or took more than LIMIT seconds. All
limits are 0.3 of a run's, so that those that are given up, mostly after 0.03 s, do not take hours: the
mechanics are the same.
"""
import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import rewards  # noqa: E402

LIMIT = 1.2
STALLS = [r"\sin((3-z)^9)", "(x+y+z)^{99}", r"\frac{a}{7}y^{9}\sin((4-c)^3)", "(a+b+c+d)^{20}",
          "(a+b)(b+c)(c+d)(d+e)(e+f)(f+g)(g+h)(h+j)(j+k)(k+l)", r"\tan(a+b+c+d+f+g)",
          r"(\sqrt{2}+\sqrt{3}+\sqrt{5}+\sqrt{7})^{50}", r"5\sin(880\pi t - 60x)"]
GOLDS = ["12", "x^2+1", r"\frac{\sqrt{3}}{2}", "y=2x+1", r"(2,\infty)", r"\{1,2\}", "3.5", r"\sin x"]
FUNCTIONS = ["sin", "cos", "tan", "log", "ln", "arctan", "exp", "sec"]


def formula(rng, depth=3):
    """A formula of random shape; the deeper, the worse."""
    if depth == 0 or rng.random() < 0.15:
        return rng.choice([rng.choice("abcxyz"), str(rng.randrange(1, 13)), str(rng.randrange(100, 10000)),
                           r"\pi"])
    inner = [formula(rng, depth - 1) for _ in range(rng.randrange(2, 5))]
    power, function = rng.choice([2, 3, 5, 9, 20, 50, 99]), rng.choice(FUNCTIONS)
    return rng.choice([
        "+".join(inner), "-".join(inner), "".join(f"({part})" for part in inner),
        f"({'+'.join(inner)})^{{{power}}}",
        rf"\{function}({'+'.join(inner)})", rf"\frac{{{inner[0]}}}{{{inner[1]}}}", rf"\sqrt{{{inner[0]}}}",
        rf"\sqrt[{power}]{{{inner[0]}}}", f"{{{inner[0]}}}^{{{inner[1]}}}", f"({inner[0]})!",
        rf"\{function} {inner[0]}",
        f"{inner[0]} = {inner[1]}", rf"{inner[0]} \le {inner[1]}", rf"\{{{','.join(inner)}\}}",
        f"({','.join(inner)})",
        rf"|{inner[0]}|", rf"\int_0^{{{inner[0]}}} {inner[1]} dx", rf"\sum_{{k=1}}^{{{power}}} {inner[0]}",
        rf"\lim_{{x\to 0}} {inner[0]}", rf"\binom{{{power}}}{{{inner[0]}}}",
        rf"\begin{{pmatrix}}{inner[0]}&{inner[1]}\\1&{power}\end{{pmatrix}}"])


def mutated(rng, text):
    """A formula with a few characters changed, doubled or lost, so that braces break as well."""
    for _ in range(rng.randrange(3)):
        at = rng.randrange(len(text))
        text = (text[:at] + rng.choice(["", text[at] * 2, rng.choice("0123456789xyz(){}^_!/+-=,.\\ ")])
                + text[at + 1:])
        text = text or "x"
    return text


def fuzz(rng):
    """(formula, gold): most grown at random, every eighth a stalling one with other numbers
    and a few changes.
    """
    if rng.random() < 7 / 8:
        text = formula(rng, rng.choice([1, 1, 2, 2, 3]))
    else:
        digits = {digit: str(rng.randrange(10)) for digit in "0123456789"}
        text = mutated(rng, "".join(digits.get(c, c) for c in rng.choice(STALLS)))
    return text, rng.choice(GOLDS)


def timed(text, gold):
    """(seconds, score) of one call."""
    record = {"question": "q", "answer": gold, "answer_type": "math"}
    began = time.perf_counter()
    score = rewards.accuracy(f"\\boxed{{{text}}}", record)
    return time.perf_counter() - began, score


def report(took):
    """A line of percentiles of (seconds, ...), sorted."""
    shown = ", ".join(f"{100 * q:g} %: {took[int(q * len(took))][0] * 1000:.0f} ms"
                      for q in (0.5, 0.9, 0.99, 0.999))
    return f"{shown}, slowest {took[-1][0]:.3f} s, {sum(seconds for seconds, *_ in took):.0f} s in all"


def main(n=100_000, seed=0, second=0.3):
    rng = random.Random(int(seed))
    timed("x+0", "x")  # starts the judge
    rewards.JUDGE.second, rewards.JUDGE.budget = second, 5 * second
    took = []
    for i in range(1, int(n) + 1):
        text, gold = fuzz(rng)
        seconds, score = timed(text, gold)
        took.append((seconds, text, gold))
        if score not in (0.0, 1.0):
            sys.exit(f"{text!r} earned {score} for {gold!r}")
        if i % 1000 == 0 or i == n:
            print(f"{i} formulas, seed {seed:g}, limits x {second:g}, {rewards.JUDGE.cut_short} cut short:"
                  f" {report(sorted(took))}", flush=True)
    for seconds, text, gold in sorted(took)[-5:]:
        print(f"  {seconds:.3f} s: {text[:100]} for {gold}")
    if max(took)[0] > LIMIT:
        sys.exit(f"over {LIMIT} s")


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
