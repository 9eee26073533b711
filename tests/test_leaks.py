"""Annotations that a rationale gives away in words, in scattered digits, by ratios or late;
and what is innocent.
"""
import random
import re
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import rewards  # noqa: E402
from test_rise_rewards import CUP, EMOTIONS, GOLD, INNOCENT, boxes, mood, record  # noqa: E402

UNITS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen \
fifteen sixteen
seventeen eighteen nineteen""".split()
TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
ROTATED = str.maketrans("0123456789", "٠١٢٣٤٥٦٧٨٩")
WIDE = str.maketrans("0123456789", "０１２３４５６７８９")


def below_hundred(n):
    return [UNITS[n]] if n < 20 else [TENS[n // 10], *([UNITS[n % 10]] if n % 10 else [])]


def in_words(n, style):
    """Words of a number from 100 to 999, as people and policies say it."""
    hundreds, rest = divmod(n, 100)
    if style == "digits":
        return [UNITS[int(digit)] for digit in str(n)]
    if style == "pairs" and rest >= 10:
        return [UNITS[hundreds], *below_hundred(rest)]
    first = ["hundred"] if hundreds == 1 and style == "bare" else [UNITS[hundreds], "hundred"]
    return first + (["and"] if style == "and" and rest else []) + (below_hundred(rest) if rest else [])


def hidden(rng, n):
    """A number from 100 to 999 in one of many disguises."""
    kind = rng.randrange(7)
    if kind < 3:
        words = in_words(n, rng.choice(["digits", "pairs", "and", "bare", "plain"]))
        text = rng.choice([" ", "-", ", ", "_", " - ", "\n", "/"]).join(words)
        return rng.choice([str, str.upper, str.title])(text)
    if kind == 3:
        return rng.choice([" ", ".", ",", "-", "_", " , ", "|", "*"]).join(str(n))
    if kind == 4:
        return " ".join(digit + letter for digit, letter in zip(str(n), rng.sample("abcdefghkm", 3)))
    if kind == 5:
        return str(n).translate(rng.choice([ROTATED, WIDE]))
    return "".join(rng.choice("abk") + digit for digit in str(n))


def test_disguised_coordinates_are_leaks_and_are_scrubbed():
    rng = random.Random(0)
    missed = []
    for _ in range(3000):
        a, b, c, d = (rng.randrange(*side) for side in ((100, 500), (100, 500), (501, 1000), (501, 1000)))
        if any(str(n) in "0123456789101112" for n in (a, b, c, d)):
            continue  # "one, two, three" and "nine ten" are read as counting
        gold = boxes([a, b, c, d])
        told = rng.sample([a, b, c, d], rng.choice([2, 3, 4]))
        words = rng.choices([word for word in INNOCENT if word.isalpha() and word not in UNITS], k=9)
        for i, n in enumerate(told):
            words.insert(3 * i, "cup " + hidden(rng, n) + rng.choice([" ;", ".", " ok"]))
        text = " ".join(words)
        clean = rewards.scrub(text, gold)
        if not rewards.leaks(text, gold) or rewards.leaks(clean, gold):
            missed.append((told, text, clean))
        assert rewards.scrub(clean, gold) == clean
    assert not missed, (len(missed), missed[:5])


@pytest.mark.parametrize("text", [
    "one, two, zero; three, four, zero", "hundred-and-twenty, three hundred forty", "1a 2b 0c and 3a 4b 0c",
    "onetwozero threefourzero", "1.2.0 then 3.4.0", "one twenty by three forty",
    "A HUNDRED AND TWENTY of THREE-FORTY",
    "x" * 8100 + " at 120, 340, 560, 780", "five hundred sixty. " + "so " * 5000 + "seven hundred eighty",
    "so " * 2660 + "120 340 560 780", "١٢٠ and ٣٤٠",
    "one hundred twenty, three hundred forty, five sixty, seven eighty"])
def test_boxes_leak_in_these_forms(text):
    """It is read in parts: one ends amid the numbers, and two coordinates are parts away from each other."""
    assert rewards.leaks(text, CUP)
    assert rewards.rise(f"{text}<answer>{CUP['answer']}</answer>", CUP) == pytest.approx(0.1)
    assert rewards.leaks(rewards.scrub(text, CUP), CUP) == []


@pytest.mark.parametrize("text", [
    "seven tenths", "seven-tenths", "7 tenths", "7:3", "70 : 30", "6:3:1", "７：３", "7 out of 10",
    "seven out of 10", "three quarters", "one half", "two thirds", "sixty percent", "zero point six",
    "zero, point, six", "point six",
    "sixty hundredths", "j/o/y", "j, o, y", "J|O|Y", "j - o - y", "j\no\ny", "f.e.a.r", "so " * 3000 + "joy",
    "(j)(o)(y)", "0 . 6 of it is .6", "6 in 10"])
def test_distributions_leak_in_these_forms(text):
    assert rewards.leaks(f"It is {text} here.", GOLD)
    assert rewards.leaks(rewards.scrub(f"It is {text} here.", GOLD), GOLD) == []
    assert rewards.rise(f"{text}<answer>{GOLD['answer']}</answer>", GOLD) == pytest.approx(0.1)


@pytest.mark.parametrize("text", [
    "One man and two dogs.", "I see one, two, three, four, five cups.", "At 10:30 the bus comes.",
    "One by one they leave.",
    "The third one is half hidden.", "A quarter moon, a fifth wheel.", "Two or three people.",
    "A hundred candles burn.",
    "Seven people at the table, three on the floor.", "One left, one right, two behind.",
    "The point is, one can tell.",
    "She is at her tenth step.", "Twenty-one candles.", "In the nineties, two bands met.",
    "Someone often lightens it.",
    "A 3D view of 2 rooms, 4 doors.", "Rows 1 and 2.", "It happened in 1998 and in 2020.",
    "Of a, b and c, b is odd.",
    "He is one of ten.", "A ten. Then four.", "Two to one against.", "Jo, you see it?", "He is fe, a robot."])
def test_innocent_sentences_are_no_leaks(text):
    spelled_list = {"One left, one right, two behind."}
    for gold in (GOLD, CUP, mood({"anger": 1}, EMOTIONS), boxes([10, 20, 300, 400])):
        assert rewards.leaks(text, gold) == [] or text in spelled_list


def test_a_rationale_is_read_to_its_end_in_linear_time():
    for text in ("one and ", "one, two ", "7:", "1a", "j/", "seven ", "twenty one point ", "0.5", "joy ",
                 "1 2 3 "):
        long = (text * 20_000)[:100_000]
        for gold in (GOLD, CUP, record("frying pan", "text")):
            began = time.process_time()
            rewards.leaks(long, gold)
            assert rewards.leaks(rewards.scrub(long, gold), gold) == []
            assert time.process_time() - began < 2, text


def test_number_words_of_other_answers_stay():
    text = "One, two, zero and three, four, zero."
    assert rewards.scrub(text, record("frying pan", "text")) == text


@pytest.mark.parametrize("words, digits", [
    ("hundred-and-twenty", "120"), ("three hundred four", "304"), ("one twenty", "1 20"),
    ("twenty-one", "21"), ("hundred-and-twenty and three hundred forty", "120 340"),
    ("three, four, zero", "3 4 0"), ("nine hundred", "900"),
    ("two hundred three hundred", "200 300"), ("zero point six", "0.6"), ("seven tenths", "7 /10"),
    ("one, two, three", "one, two, three"), ("one one", "1 1"), ("ten", "ten"), ("ninety", "90"),
    ("one thousand", "1 1000")])
def test_number_words(words, digits):
    assert rewards.SPELLED.sub(rewards._in_digits, words) == digits
    assert re.fullmatch(rewards.SPELLED, words)
