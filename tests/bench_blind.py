"""What each reward pays for a response that was written without a look at the question.

    python tests/bench_blind.py      # a table: reward, best blind response, its mean pay, an honest guess's

PLAYS are the responses of a policy that looks for holes: it lists all options, hedges, gives several tags or
a hundred boxes, sets that hold everything, identities, NaN and infinity, every call, nothing or punctuation,
an echo of the prompt, very long text. Each is paid over RECORDS, a spread of golds of one answer type, and
the best for each reward stands beside the best GUESS: an ordinary answer that is sometimes right.
"""
import itertools
import random
import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import rewards  # noqa: E402

EMOTIONS = ["anger", "disgust", "fear", "joy", "sadness", "surprise", "neutral"]
CALLS = [f"change_{what}({i}, '{value}')" for i in range(4) for what, values in (
    ("shape", ("cube", "sphere")), ("size", ("small", "large")), ("color", ("red", "blue")))
    for value in values]
OPTIONS = [["3 cm", "4 cm", "5 cm", "6 cm"], ["sun", "moon", "mars", "earth"],
           ["yes", "no", "maybe", "never"]]
BOX = "[[{}, {}, {}, {}]]"


def records_of(rng):
    """{answer type: records with golds of every kind}, seeded."""
    def rows(kind, golds, **fields):
        return [{"id": str(i), "question": "What is shown?", "images": [], "answer": gold,
                 "answer_type": kind, **fields}
                for i, gold in enumerate(golds)]

    def box():
        x, y = rng.randrange(700), rng.randrange(700)
        return f"[{x}, {y}, {x + rng.randrange(50, 300)}, {y + rng.randrange(50, 300)}]"

    def feelings():
        parts = [rng.random() ** 3 for _ in EMOTIONS]
        pairs = (f'"{name}": {part / sum(parts):.3f}' for name, part in zip(EMOTIONS, parts))
        return f"{{{', '.join(pairs)}}}"

    choices = [row for options in OPTIONS for row in rows("choice", "ABCD", choices=options)]
    return {
        "choice": choices,
        "number": rows("number", [*map(str, range(1, 11)), "0.5", "-2", "17", "120", "3.14", "50%"]),
        "math": rows("math", ["12", "-3", r"\frac{1}{2}", r"2\sqrt{3}", "x^2-1", "y=2x+1", "x=5", r"\{1,2\}",
                              "(3,-4)", r"(2,\infty)", r"x\le 4", r"\pi", "1,2", "3:4",
                              r"\begin{pmatrix}1\\2\end{pmatrix}", "0"]),
        "text": rows("text", ["cat", "Red", "frying pan", "New York", "7", "left", "yes", "no", "12:30",
                              "an apple", "Joe's", "A", "wood", "the sea", "5 cm", "north"]),
        "calls": rows("calls", [", ".join(rng.sample(CALLS, 1 + i % 3)) for i in range(24)]),
        "boxes": rows("boxes", [f"[{', '.join(box() for _ in range(1 + i % 4))}]" for i in range(24)])
        + rows("boxes", [f"[{box()}]" for _ in range(8)], task="ground"),
        "distribution": rows("distribution", [feelings() for _ in range(24)], meta={"classes": EMOTIONS}),
    }


RECORDS = records_of(random.Random(0))
GRID = ", ".join(f"[{x}, {y}, {x + 250}, {y + 250}]"
                 for x in range(0, 1000, 100) for y in range(0, 1000, 100))
UNIFORM = "{" + ", ".join(f'"{name}": 0.142857' for name in EMOTIONS) + "}"
SURE = '{{"Position": [0, 0, 1, 1], "Confidence": {}}}'

# what an ordinary policy that cannot see would answer
GUESSES = {
    "choice": ["A", "B", "C", "D", "yes", "sun", "3 cm"],
    "number": [*map(str, range(11)), "0.5", "120"],
    "math": ["0", "1", "2", "12", "x", "1,2", r"\frac{1}{2}", r"\pi", "x^2-1", "y=2x+1"],
    "text": ["cat", "yes", "no", "left", "7", "red", "A"],
    "calls": CALLS[:6] + [", ".join(CALLS[:2])],
    "boxes": ["[[250, 250, 750, 750]]", "[[400, 400, 600, 600]]", "[[0, 0, 1000, 1000]]",
              "[[100, 100, 400, 400], [500, 500, 800, 800]]", "[250, 250, 750, 750]"],
    "distribution": [UNIFORM, '{"neutral": 1}', '{"joy": 0.5, "sadness": 0.5}'],
}

# answers that want to be right whatever is asked
ANSWERS = [
    "", " ", ".", "?", "-", "*", ",", "{}", "[]", "()", "none", "None of these", "all of them", "any",
    "unknown", "N/A",
    "A, B, C, D", "A or B", "A and B", "A/B", "ABCD", "A B C D", "(A)(B)(C)(D)", "either A or B or C or D",
    "not A", "A?",
    "A. B. C. D.", "(A) 3 cm (B) 4 cm (C) 5 cm (D) 6 cm", "3 cm, 4 cm, 5 cm, 6 cm", "yes or no", "yes, no",
    "yes/no",
    "1 2 3 4 5 6 7 8 9 10", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10", "3 or 4", "1-10", "between 1 and 10",
    r"\{1,2,3,4,5,6,7,8,9,10\}",
    r"[1,10]", r"(-\infty,\infty)", r"\mathbb{R}", r"x\in\mathbb{R}", "x", "x = x", "y = y", "0 = 0", "1 = 1",
    "x", "a = b",
    "x=1 or x=2", r"x \ge 0", r"x<\infty", r"\emptyset", r"\pm 3", r"\pm 12", "nan", "NaN", "inf", r"\infty",
    "0/0", "1/0",
    r"\frac{0}{0}", "0", "-0", "1e999", "x^2-1=x^2-1", r"\{x\}", r"\{x | x = x\}", r"1 \cup 2", "the answer",
    "answer", "?!",
    "a", "e", "the", "o", "t", "a b c d e f g h i j k l m n o p q r s t u v w x y z",
    "cat dog red blue yes no left right",
    "cat, red, frying pan, New York, 7, left, yes, no", "What is shown?", r"\text{ }", r"\ ", "$", "$$",
    "\\", "True", "1",
    BOX.format(0, 0, 1000, 1000), BOX.format(-1e12, -1e12, 1e12, 1e12),
    BOX.format("nan", "nan", "nan", "nan"), BOX.format("-inf", "-inf", "inf", "inf"),
    BOX.format("1e99", "1e99", "-1e99", "-1e99"), BOX.format(500, 500, 500, 500),
    f"[{GRID}]", f"[{', '.join(['[250, 250, 750, 750]'] * 100)}]", BOX.format(0, 0, 0, 0),
    "[0, 0, 1000, 1000]", "[[]]",
    UNIFORM, UNIFORM.replace("0.142857", "1"), UNIFORM.replace("0.142857", "0"),
    UNIFORM.replace("0.142857", "nan"), UNIFORM.replace("0.142857", "inf"),
    UNIFORM.replace("0.142857", "1e-99"), UNIFORM.replace("0.142857", "0.5"),
    UNIFORM[:-1] + ", " + UNIFORM[1:], '{"joy": 0}', '{"joy": 1, "fear": 1}',
    ", ".join(CALLS), ", ".join(CALLS[:6]), ", ".join(CALLS * 5), "f(x, y)", "change_color(0, red)" * 3,
    "(0, red)",
    f"[{SURE.format(0)}]", f"[{SURE.format(1)}]", f"[{SURE.format(0.5)}]", f"[{SURE.format('nan')}]",
    f"[{SURE.format(-9)}]",
    "so " * 60 + "3", "3 " * 60, "A " * 90, "1," * 99,
]

FRAMES = ["<think>so</think><answer>{}</answer>", "<answer>{}</answer>", "\\boxed{{{}}}",
          "The answer is {}.", "{}", "<think>so</think><answer>\\boxed{{{}}}</answer>",
          "<think>Wait, wait, so</think><answer>\\boxed{{{}}}</answer>"]

# whole responses
RESPONSES = [
    "", "\n", "<answer></answer>", "\\boxed{}", "\\boxed{", "<answer>", "<think></think><answer></answer>",
    "<think>so</think><answer>?</answer>", "<think></answer>", "<think></think> <answer></answer>",
    "I cannot tell.",
    "<summary>s</summary><caption>c</caption><think>so</think><answer>?</answer>",
    "First, a. Next, b. Finally, c.",
    "".join(f"<answer>{letter}</answer>" for letter in "ABCD"),
    "".join(f"<answer>{n}</answer>" for n in range(11)),
    ", ".join(f"\\boxed{{{n}}}" for n in range(1, 11)), " ".join(f"\\boxed{{{letter}}}" for letter in "ABCD"),
    "(A) is right. (B) is right. (C) is right. (D) is right.", "It is A. It is B. It is C. It is D.",
    "The answer is A. The answer is B.", "It is the sun, the moon, mars and earth.", "Yes. No. Maybe. Never.",
    "1 2 3 4 5 6 7 8 9 10", "It may be 3. Or 4.", f"<think>{GRID}</think><answer>[{GRID}]</answer>",
    f"so [{GRID}]",
    "so " * 100_000 + "A", "<answer>" + "so " * 50_000 + "</answer>", "<think>" * 9000, "</answer>" * 9000,
    "0" * 20_000,
    "<think>" + "Wait, alternatively, " * 99 + "</think><answer>A</answer>", "Wait, wait, " + "\\boxed{}",
]


def framed(answers):
    return [frame.format(answer) for answer, frame in itertools.product(answers, FRAMES)]


def plays_of(record):
    """Echoes of what a record's prompt says, its options too, which the policy can see."""
    prompt, options = rewards.build_prompt(record), record.get("choices") or ["?"]
    answers = [prompt, record["question"], ", ".join(options), " or ".join(options), "\n".join(options)]
    return framed(answers + [f"{options[0]} or {options[-1]}"])


def pays(name, response_of, records):
    """Mean pay of a reward over records, for the response that response_of(record) gives."""
    return mean(rewards.REWARDS[name](response_of(record), record) for record in records)


def best(name, kind):
    """((pay, response) of the best play, the same of the best guess) of a reward on one answer type."""
    records = RECORDS[kind]
    fixed = {response: (lambda record, response=response: response)
             for response in RESPONSES + framed(ANSWERS)}
    echoes = {f"echo {i}: {text}": (lambda record, i=i: plays_of(record)[i])
              for i, text in enumerate(plays_of(records[0]))}
    plays = [(pays(name, response_of, records), text) for text, response_of in (fixed | echoes).items()]
    guesses = [(pays(name, lambda record, text=text: text, records), text) for text in framed(GUESSES[kind])]
    return max(plays), max(guesses)


# the answer types a reward is made for; the others that it can be given are answer types of accuracy
KINDS = {
    "accuracy": list(RECORDS), "hfrrf": ["choice", "number", "math", "text"],
    "boxed": ["choice", "number", "math", "text"],
    "vl_rethinker": ["choice", "number", "math", "text"], "discrete": ["choice", "number"],
    "numeric": ["number", "math"],
    "functions": ["calls"], "functions_full": ["calls"], "functions_penalty": ["calls"],
    "agreement": list(RECORDS), "rise": list(RECORDS), "detection_legacy": ["boxes"],
    "grounding_legacy": ["boxes"], "grounding_giou": ["boxes"], "grounding_format": ["boxes"],
    "visual_rft_iou": ["boxes"], "visual_rft_conf": ["boxes"],
    "distribution_legacy": ["distribution"], "distribution_format": ["distribution"],
    "contains": ["text", "choice"],
    "format": ["text"], "format_legacy": ["text"], "format_caption": ["text"], "steps": ["text"],
}


def main():
    print("| reward | on | best blind response | pays | best guess | pays |\n|---|---|---|---|---|---|")
    for name, kinds in KINDS.items():
        for kind in kinds:
            (pay, play), (honest, guess) = best(name, kind)
            shown = [repr(text if len(text) < 60 else text[:57] + "...").replace("|", "\\|")
                     for text in (play, guess)]
            print(f"| `{name}` | {kind} | `{shown[0]}` | {pay:.3f} | `{shown[1]}` | {honest:.3f} |",
                  flush=True)


if __name__ == "__main__":
    main()
