"""rewards.accuracy on 20,000 hostile strings: always 0.0 or 1.0 and soon, in threads and processes too."""
import math
import multiprocessing
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rewards  # noqa: E402

MATH = ["3", "-0.5", "1/3", "\\frac{\\sqrt{3}}{2}", "x^2+1", "2\\pi", "\\{1,2,3\\}", "(1,-4)", "[0,\\infty)",
        "(-2,1]\\cup(3,4)", "y=2x+5", "x^2+y^2=49", "x<3", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "1:2",
        "Area $=9 \\pi \\mathrm{cm}^{2}$", "118掳T", "\\sin^2 x", "3^{1008}", "|x-3|", "-4.9\n-4.9", "12:00"]
CHOICES = [None, ["3", "4"], ["yes", "no"], ["the sun", "the moon"], ["2\\sqrt{3}", "x^2", "\\pi", "0.5"]]
GOLDS = [[{"answer": gold, "answer_type": "math"} for gold in MATH],
         [{"answer": gold, "answer_type": "number"} for gold in ("3", "1234567", "0.5", "50\\%", "5 cm")]
         + [{"answer": "3.14", "answer_type": "number", "precision": 2}],
         [{"answer": gold, "answer_type": "text"} for gold in ("cat", "[2, 3]", "New York", "C", "42%-63%")],
         [{"answer": "B", "answer_type": "choice", "choices": choices} for choices in CHOICES]
         + [{"answer": "A, C", "answer_type": "choice"}],
         [{"answer": "change_color(2, red), change_size(0, small)", "answer_type": "calls"}]]

ATOMS = ["0", "3", "12", "-0", ".5", "1e9", "1e99", "1e999", "9" * 40, "1,000", "3/0", "2 1/2", "50%",
         "NaN", "inf", "-inf", "1_000", "0x1F", "٣", "५", "７", "²", "½", "Ⅻ", "π", "√", "∞", "x", "y", "n",
         "e", "i", "abc", "A", "B", "(B)", "A.", "yes", "no", "not", "the moon", "cm", "km/h", "°", "\\pi",
         "\\infty", "\\circ", "\\%", "\\quad", "\\cup", "or", "and", ",", ";", ":", "=", "<", "\\le",
         "\\ne", "+", "-", "*", "**", "/", "!", "!!", "^", "_", "'", "|", "$", "$$", "&", "\\\\", "\\", "{",
         "}", "(", ")", "[", "]", "\\{", "\\}", "\\left(", "\\right]", "<answer>", "</answer>", "<think>",
         "</think>", "\\boxed{", "\\boxed", "the answer is", "Answer:", "答案", "选", "\x00", "\ud800",
         "\udfff", "\u202e", "\u200b", "\ufeff", "e\u0301", "🙂", "\n", "\r", "\t", " ", "", "</s>",
         "change_color(2, red)", "cannot", "9^{9^{9^9}}", "100000000!", "9**9**9"]
MACROS = ["\\frac{%s}{%s}", "\\sqrt{%s}", "\\sqrt[%s]{%s}", "%s^{%s}", "%s_{%s}", "(%s)", "[%s,%s)",
          "\\{%s,%s\\}", "%s!", "\\text{%s}", "\\boxed{%s}", "\\sin(%s)", "\\log_{%s}{%s}", "e^{%s}",
          "|%s|", "%s+%s", "%s-%s", "%s*%s", "%s %s", "\\binom{%s}{%s}", "\\sum_{%s}^{%s}",
          "\\int_{%s}^{%s}", "\\lim_{%s}", "$%s$", "\\(%s\\)", "\\[%s\\]", "%s=%s", "%s<%s", "%s, %s",
          "%s or %s", "\\left(%s\\right)", "\\begin{pmatrix}%s&%s\\end{pmatrix}", "%s/%s", "\\frac%s%s",
          "\\mathrm{%s}", "\\overline{%s}", "\\prod_{%s}%s", "%s\\cup %s", "%s\n%s", "f(%s)=%s"]
FRAMES = ["%s", "\\boxed{%s}", "<answer>%s</answer>", "<think>%s</think><answer>%s</answer>",
          "The answer is %s.", "<answer>\\boxed{%s}</answer>", "so\n%s", "<answer>%s", "\\boxed{%s",
          "Answer: %s\n", "\\boxed{%s} and \\boxed{%s}"]


def some_gold(rng):
    return rng.choice(rng.choice(GOLDS)) | {"question": "Is the moon larger than x?"}


def expression(rng, depth):
    """A random formula or text of nested macros, at its leaves atoms and golds."""
    if depth == 0 or rng.random() < 0.2:
        return rng.choice(ATOMS) if rng.random() < 0.85 else some_gold(rng)["answer"]
    return fill(rng.choice(MACROS), lambda: expression(rng, depth - 1))


def fill(template, part):
    first, *rest = template.split("%s")
    return first + "".join(part() + piece for piece in rest)


def repeated(rng, text):
    return text * rng.choice([2, 5, 30, 200, 20_000 if rng.random() < 0.05 else 3])


def tower(rng, text):
    left, right = rng.choice([
        ("\\frac{1}{1+", "}"), ("\\sqrt{", "}"), ("(", ")"), ("{", "}"), ("\\boxed{", "}"), ("9^{", "}"),
        ("x^", ""), ("\\frac{", "}{2}"), ("|", "|"), ("[", ")"), ("-", ""), ("\\text{", "}"), ("$", "$")])
    n = rng.choice([2, 4, 8, 20, 100, 5000 if rng.random() < 0.1 else 3])
    return left * n + text + right * rng.choice([n, n, n - 1, 0])


def damaged(rng, text):
    at, to = sorted(rng.choices(range(len(text) + 1), k=2))
    return rng.choice([text[:at], text[at:], text[:at] + text[to:], text[:at] + rng.choice(ATOMS) + text[at:],
                       text[::-1], text.upper(), text.swapcase(), " ".join(text[:2000]),
                       text.replace("{", ""), text.replace("}", "")])


def hostile(rng):
    text = expression(rng, rng.randrange(5))
    for mutation in rng.choices([repeated, tower, damaged, damaged], k=rng.choice([0, 0, 1, 1, 2, 3])):
        text = mutation(rng, text)[:1 << 20]
    return fill(rng.choice(FRAMES), lambda: text)


def cases(n, seed):
    rng = random.Random(seed)
    return [(hostile(rng), some_gold(rng)) for _ in range(n)]


def test_twenty_thousand_hostile_strings():
    worst = (0, "", {})
    for text, gold in cases(20_000, seed=0):
        start = time.process_time()  # seconds of this process, however busy the machine
        assert rewards.accuracy(text, gold) in (0.0, 1.0), (text[:200], gold)
        worst = max(worst, (time.process_time() - start, text[:200], gold), key=lambda case: case[0])
    assert worst[0] < 1, worst


ENDLESS = [" ", "\n", "a", "1\n", "(\n", "5 or ", "is ", "answer ", "(about ", "because ", "<answer>",
           "\\boxed{", "twenty-", "not 5 ", "A. ", "kg·", "A or <answer>n't ", "≈"]
RECORDS = [{"answer": "5", "answer_type": "number"}, {"answer": "\\frac{1}{2}", "answer_type": "math"},
           {"answer": "B", "answer_type": "choice", "choices": ["cat", "5 cm", "1/2", "none of these"]}]


@pytest.mark.parametrize("piece", ENDLESS)
def test_a_hundred_thousand_characters_of_one_kind(piece):
    for length in (3900, 100_000):  # within what is read of a response, and beyond
        for form in ("{}", "<answer>5 {} y</answer>", "It is 5{}"):
            text = form.format((piece * length)[:length])
            for gold in RECORDS:
                gold = gold | {"id": "0", "question": "Is it?", "images": []}
                start = time.process_time()
                values = [reward(text, gold) for reward in rewards.REWARDS.values()]
                assert time.process_time() - start < 1.2 and all(map(math.isfinite, values))


def test_hostile_strings_in_threads_and_processes():
    sample = cases(400, seed=1)
    here = [rewards.accuracy(*case) for case in sample]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(rewards.accuracy, *zip(*sample))) == here
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(rewards.accuracy, *zip(*sample), chunksize=50)) == here
