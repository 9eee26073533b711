"""Forms x values: in every form the gold earns 1, and a value that differs in one thing earns 0.

A form is a sentence, a tag or a box with a place for an answer. A value comes with other ways to write it and
with changed values: another sign, digit, power of ten, coefficient, unit of i or e, option. The products are
some ten thousand cases, so that no rule of rewards.py can help one sentence or number alone.
"""
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import rewards  # noqa: E402


def record(answer, kind, **fields):
    return {"id": "0", "question": "q", "images": [], "answer": answer, "answer_type": kind, **fields}


def graded(response, answer, kind, **fields):
    return rewards.accuracy(response, record(answer, kind, **fields))


def wrongly_graded(cases):
    """Of (response, gold, answer type, fields, verdict) those that are graded otherwise."""
    return [case for case in cases if graded(case[0], case[1], case[2], **case[3]) != case[4]]


SLOTS = ["<answer>{}</answer>", "<think>9?</think>\n<answer> {} </answer>", "<answer>${}$</answer>",
         "<answer>\\({}\\)</answer>", "<answer>The answer is {}.</answer>", "<answer>Answer: {}</answer>",
         "<answer>答案是{}</answer>", "<answer>答案：{}。</answer>", "\\boxed{{{}}}", "So $\\boxed{{{}}}$.",
         "\\[ \\boxed{{ {} }} \\]", "<answer>\\boxed{{{}}}</answer>", "\\boxed{{1}} no, \\boxed{{{}}}"]
CUES = ["The answer is {}.", "The answer is: {}", "The final answer is ${}$.", "Final answer: {}",
        "Answer: {}",
        "**Answer:** {}", "**Answer: {}**", "The answer is **{}**.",
        "So the result is {}. I hope this helps!",
        "The answer is 8. Wait, that is wrong. The answer is {}.", "答案是{}", "答案：{}。", "所以，答案为 {}。",
        "First take 8, then 9.\n\nTherefore, the answer is {}.", "Hence, the final answer is\n{}"]

# ----- numbers

STATEMENTS = [
    "The slope is {}.", "So the temperature is {}.", "the total equals {}", "It is equal to {}.",
    "There were {} of them", "The value of f(8) is {}.", "Therefore, x = {}.", "Hence $x = {}$", "x={}",
    "So $k$ is ${}$.", "The change was **{}**.", "It is about {}.", "It is approximately {}.",
    "It would be {}.",
    "The result of the subtraction is: {}", "8 - 9 + 4 = {}", "Adding 8 and 9, we get {}.", "We obtain {}",
    "There are 8 rows. Thus the sum is {}.", "8 + 9\n= {}", "- 8 of one kind\n- 9 of another\nThe sum is {}.",
    "This gives {}.", "It is {}, not 8.", "It is not 8 but {}.", "The sum is 8. Actually, it is {}.",
    "The sum is 8. Wait, let me count again. It is {}.", "The result is {} (rounded).", "结果是{}", "一共是{}个。",
    "温度为{}度。", "So {} is the answer.", "{} is the correct answer.", "### Final Answer\n\n**{}**\n",
    "The answer is {}, because 8 and 9 are the sides.", "The sum is {} if we take 8 of them.",
    "The answer is:\n\n{}", "Answer: {}\n\nExplanation: I counted the cubes.", "The value must be {}.",
    "【解析】略。\n【答案】{}", "故答案为：{}．", "The sum is {}.\n\nIs there anything else?", "Ans: {}"]
IN_A_SLOT = ["x = {}", "{} cm", "about {}", "approximately {}", "约{}", "{}厘米", "= {}", "\\approx {}",
             "{} (rounded)", "{} \\text{{ cm}}", "{}\\,\\mathrm{{kg}}", "The sum is {}"]
NUMBERS = {  # gold: (other ways to write it, changed values)
    "-2": (["−2", "-2.0", "－２"], ["2", "-3", "-20", "-0.2"]),
    "7": (["7.0", "+7", "７"], ["-7", "6", "70", "0.7"]),
    "-0.25": (["-.25", "−0.250", "-1/4"], ["0.25", "-0.26", "-2.5", "-25"]),
    "3.5": (["3.50", "7/2", "３．５"], ["-3.5", "3.6", "35", "0.35"]),
    "-3/4": (["-0.75", "\\frac{-3}{4}", "-\\frac{3}{4}", "-\\dfrac34"], ["3/4", "-4/3", "-3/5", "-7.5"]),
    "1.5": (["1 1/2", "1\\frac{1}{2}", "1½", "3/2"], ["-1.5", "11/2", "15", "1/2"]),
    "12500": (["12,500", "12{,}500", "12\\,500", "12 500", "1.25e4", "12，500"], ["1250", "-12500", "12501"]),
    "1234.5": (["1,234.50", "\\$1,234.50", "$1,234.5"], ["1234", "12345", "-1234.5", "1,235.5"]),
    "2015": (["2015"], ["2016", "-2015", "20.15", "215"]),
    "-118": (["-118.0", "−118"], ["118", "-11.8", "-119", "-18"]),
}


@pytest.mark.parametrize("form", SLOTS + CUES + STATEMENTS)
def test_a_number_in_any_form(form):
    cases = []
    for gold, (ways, changed) in NUMBERS.items():
        for kind in ("number", "math"):
            cases += [(form.format(way), gold, kind, {}, 1) for way in [gold, *ways]]
            cases += [(form.format(way), gold, kind, {}, 0) for way in changed]
            cases += [(form.format(gold), other, kind, {}, 0) for other in changed]
    assert not wrongly_graded(cases)


@pytest.mark.parametrize("slot", SLOTS[:3] + SLOTS[8:10])
@pytest.mark.parametrize("inner", IN_A_SLOT)
def test_a_slot_may_say_more_than_a_number(slot, inner):
    form = slot.replace("{}", inner)
    test_a_number_in_any_form(form)


SMALL_AND_LARGE = {
    "3 \\times 10^8": (["3e8", "3E8", "3.0×10^8", "3.0 x 10^8", "3×10⁸", "3\\cdot 10^{8}", "300,000,000",
                        "3.0*10^8"],
                       ["3e7", "-3e8", "3\\times10^{-8}", "4×10⁸", "3", "300"]),
    "4.5e-3": (["4.5\\times10^{-3}", "0.0045", "4.5 × 10⁻³", "4.5 \\times 10^{ -3 }"],
               ["4.5e-2", "0.045", "-4.5e-3", "4.6e-3", "4.5", "0"]),
    "1.6\\times 10^{-19}": (["1.6e-19", "1.60×10^-19", "0.16\\times10^{-18}"],
                            ["9\\times 10^{-25}", "1.7e-19", "-1.6e-19", "1.6e-18", "0", "1.6e19"]),
    "0.0000005": (["5\\times10^{-7}", "5e-7"], ["4\\times 10^{-7}", "5e-8", "-5e-7", "0"]),
    "10^{-3}": (["0.001", "1e-3", "1\\times10^{-3}"], ["10^{3}", "10^{-2}", "-0.001", "10"]),
    "6.02e23": (["6.02\\times 10^{23}", "6.02×10²³", "602\\times10^{21}"], ["6.02e22", "6.03e23", "6.02"]),
}


@pytest.mark.parametrize("unit", ["", " m/s", "\\text{ kg}"])
@pytest.mark.parametrize("form", SLOTS + CUES)
def test_numbers_of_every_magnitude(form, unit):
    cases = []
    for gold, (ways, changed) in SMALL_AND_LARGE.items():
        for kind in ("number", "math"):
            cases += [(form.format(way + unit), gold, kind, {}, 1) for way in [gold, *ways]]
            cases += [(form.format(way + unit), gold, kind, {}, 0) for way in changed]
            cases += [(form.format(way + unit), gold + unit, kind, {}, 0) for way in changed]
    assert not wrongly_graded(cases)


UNITS = ["cm", " cm", " m/s", " m/s²", " m/s^2", " km/h", " kg·m/s", " N·m", " J/(kg·K)", " cm²", " cm^{2}",
         "\\text{ cm}^2", "\\,\\mathrm{m/s}", "\\ \\mu\\text{F}", "\\ \\mathrm{m\\,s^{-2}}", " \\mathrm{~kg}",
         "\\Omega", " kΩ", " μm", "°", "^\\circ", "^{\\circ}", " degrees", "℃", " square meters", " cubic cm",
         " dollars", " people", " years old", " mol/L", " g/cm³", " kg m^2", " per cent", "%", "\\%", "厘米",
         "平方米", "元", " sq. ft", " mL", " eV", " rad/s", " kWh"]


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_does_not_count(unit):
    cases = []
    for form in SLOTS + CUES + STATEMENTS[:3]:
        for value, changed in (("5", "6"), ("-2.5", "2.5"), ("340", "34"), ("0.2", "-0.2")):
            cases.append((form.format(value + unit), value, "number", {}, 1))
            cases.append((form.format(changed + unit), value, "number", {}, 0))
            cases.append((form.format(value), value + unit, "math", {}, 1))
            cases.append((form.format(changed), value + unit, "math", {}, 0))
    assert not wrongly_graded(cases)


@pytest.mark.parametrize("word, value", [("zero", 0), ("one", 1), ("three", 3), ("seven", 7), ("twelve",
                                                                                               12),
                                                                                               ("twenty",
                                                                                                20)])
def test_counts_in_words(word, value):
    forms = ["There are {} cubes.", "There are a total of {} chairs left.", "I count {} birds.",
             "The answer is {}."]
    cases = []
    for form in forms:
        cases.append((form.format(word), str(value), "number", {}, 1))
        cases += [(form.format(word), str(other), "number", {}, 0) for other in (value + 1, value + 10,
                                                                                 value + 2)]
        cases.append((form.format("minus " + word), str(-value), "number", {}, 1))
    assert not wrongly_graded(cases)


@pytest.mark.parametrize("response, gold, verdict", [
    ("The polynomial has 1 zero.", "1", 1), ("The polynomial has 2 zeros.", "2", 1),
    ("The slope is -2. This means that it falls.", "-2", 1), ("It rose by 5 million people.", "5000000", 1),
    ("<answer>1.2 million</answer>", "1200000", 1), ("<answer>1.2 million</answer>", "1.2", 1),
    ("<answer>1.2 million</answer>", "1.2 billion", 0), ("<answer>3万</answer>", "30000", 1),
    ("The loss is -$450.", "-450", 1), ("The loss is -$450.", "450", 0), ("It would be negative 8.", "-8", 1),
    ("<answer>12!</answer>", "12", 0), ("7 minus 2 is 5", "5", 1), ("7 - 2", "-2", 0),
    ("<answer>7 - 2</answer>", "-2", 0), ("<answer>3 or -3</answer>", "-3", 0),
    ("<answer>-3, 3</answer>", "-3", 0), ("<answer>not -3</answer>", "-3", 0),
])
def test_numbers_and_what_is_around_them(response, gold, verdict):
    assert graded(response, gold, "number") == verdict


COUNTED = {"13": "thirteen", "21": "twenty-one", "40": "forty", "58": "fifty-eight", "99": "ninety-nine",
           "107": "one hundred and seven", "300": "three hundred", "256": "two hundred and fifty-six"}
COUNTING = ["There are {} cubes.", "In the image, there are {} birds on the wire.", "The answer is {}.",
            "I can see {} people.", "After removing the cubes, {} objects are left.", "Answer: {}", "**{}**"]


@pytest.mark.parametrize("form", COUNTING)
def test_larger_counts_in_words(form):
    cases = [(form.format(word), gold, "number", {}, int(gold == value))
             for value, word in COUNTED.items() for gold in COUNTED]
    assert not wrongly_graded(cases)


TWO_NUMBERS = [
    "The answer is {} or {}.", "It could be {} or {}.", "The answer is {} or maybe {}.", "{}, or else {}",
    "The answer is either {} or {}.", "The answer lies between {} and {}.", "The answer is {} and {}.",
    "Both {} and {} could be right.", "The answer is neither {} nor {}.", "<answer>{} or {}</answer>",
    "<answer>{}\n{}</answer>", "<answer>{}|{}</answer>", "<answer>{} to {}</answer>", "{} (or {})",
    "\\boxed{{{}}} or \\boxed{{{}}}", "\\boxed{{{}}} \\boxed{{{}}}", "<answer>{} ≈ {}</answer> not it",
    "答案是{}或{}。", "<answer>{}或{}</answer>", "{}, perhaps {}", "<answer>{}, possibly {}</answer>"]
DENIED = [
    "The answer is not {}.", "The answer isn't {}.", "The answer cannot be {}.", "not {}",
    "<answer>not {}</answer>",
    "I cannot say whether the answer is {}.", "Is the answer {}?", "The answer is less than {}.",
    "The answer is up to {}.", "<answer>x = {} or something else</answer>", "<answer>!={}</answer>",
    "We are given {}. The answer is", "Let a = {}. Then", "<answer>more than {}</answer>",
    "<answer>不是{}</answer>"]


@pytest.mark.parametrize("kind", ["number", "math"])
def test_no_number_is_said(kind):
    cases = []
    for first, second in (("21", "240"), ("240", "21"), ("-7", "7.5"), ("1250", "3")):
        for form in TWO_NUMBERS:
            hedge = form.format(first, second)
            wanted = (second,) if "≈" in form else (first, second)  # the exact one may count
            cases += [(hedge, gold, kind, {}, 0) for gold in wanted]
        cases += [(form.format(first), first, kind, {}, 0) for form in DENIED]
    assert not wrongly_graded(cases)


ROUNDED = ["{} ≈ {}", "{} (approximately {})", "{} or approximately {}"]
EXACT = {"2\\sqrt{3}": ("2√3", "3.46", "3√2", "4.24"), "\\frac{5}{3}": ("5/3", "1.67", "5/4", "1.25"),
         "6\\pi": ("6π", "18.85", "5π", "15.71"), "\\sqrt{41}": ("√41", "6.40", "√40", "6.32")}


@pytest.mark.parametrize("gold", EXACT)
def test_an_exact_value_beside_a_rounded_one(gold):
    way, near, other, near_other = EXACT[gold]
    cases = []
    for form in ("The answer is {}.", "<answer>{}</answer>", "\\boxed{{{}}}", "**Answer:** {}"):
        for inner in ROUNDED:
            right, wrong = form.format(inner.format(way, near)), form.format(inner.format(other, near_other))
            cases += [(right, gold, "math", {}, 1), (wrong, gold, "math", {}, 0)]
            places = {"precision": 2}
            cases += [(right, near, "number", places, 1), (wrong, near, "number", places, 0)]
    assert not wrongly_graded(cases)


CONVERSIONS = [("2 km", "2000 m", "2 m"), ("3 hours", "180 minutes", "3 minutes"),
               ("90 seconds", "1.5 min", "90 h"),
               ("5 kPa", "5000 Pa", "5 Pa"), ("4 MHz", "4000 kHz", "4 Hz"), ("2 days", "48 hours", "2 hours")]


@pytest.mark.parametrize("gold, same, other", CONVERSIONS)
def test_units_of_a_kind_convert(gold, same, other):
    cases = []
    for form in SLOTS[:2] + CUES[:5]:
        cases += [(form.format(way), gold, "math", {}, 1) for way in (gold, same, gold.split()[0])]
        cases += [(form.format(other), gold, "math", {}, 0), (form.format(same), other, "math", {}, 0)]
    assert not wrongly_graded(cases)


# ----- formulas

FORMULAS = {
    "x^2+1": (["x²+1", "1+x^2", "x^{2} + 1"], ["x^2-1", "x^3+1", "2x^2+1", "x^2+2"]),
    "5x^3": (["5x³", "5\\cdot x^3"], ["5x^2", "3x^5", "-5x^3", "5x"]),
    "2\\sqrt{3}": (["2√3", "\\sqrt{12}", "2\\sqrt3"], ["3\\sqrt{2}", "-2\\sqrt{3}", "\\sqrt{3}", "2"]),
    "\\frac{\\pi}{2}": (["π/2", "\\pi/2", "\\frac12\\pi"], ["\\frac{\\pi}{3}", "-\\frac{\\pi}{2}", "2\\pi"]),
    "1-\\frac{1}{\\mathrm{e}}": (["1-\\frac{1}{e}", "1-e^{-1}"], ["1+\\frac{1}{\\mathrm{e}}", "1",
                                                                  "1-\\mathrm{e}"]),
    "2+3\\mathrm{i}": (["2+3i", "3i+2"], ["2-3i", "2+3", "2+3\\mathrm{e}", "5", "2"]),
    "\\frac{\\mathrm{m}}{2}": (["\\frac{m}{2}", "m/2"], ["\\frac{\\mathrm{m}}{3}", "\\frac{n}{2}",
                                                         "\\frac12"]),
    "\\frac{dy}{dx}=2x": (["\\frac{dy}{dx} = 2 x", "\\frac{\\mathrm{d}y}{\\mathrm{d}x}=2x"],
                          ["\\frac{dy}{dx}=3x", "\\frac{dy}{dx}=2", "\\frac{dx}{dy}=2x",
                           "\\frac{dy}{dx}=-2x"]),
    "y=2x+1": (["y = 1+2x", "2x+1"], ["y=2x-1", "y=3x+1", "x=2y+1"]),
    "(3,-4)": (["(3, -4)", "\\left(3,-4\\right)", "（3，-4）"], ["(-4,3)", "(3,4)", "(-3,-4)"]),
    "\\{1,2\\}": (["\\{2,1\\}", "{1, 2}"], ["\\{1,3\\}", "\\{1,2,3\\}", "\\{1\\}"]),
    "(-\\infty,3]": (["x \\le 3", "x≤3", "3 \\ge x", "x \\leq 3", "(-∞,3]"],
                     ["x<3", "x \\ge 3", "x \\le 4", "(-\\infty,3)", "x \\le -3"]),
    "x>3": (["(3,\\infty)", "3<x", "(3,+\\infty)"], ["[3,\\infty)", "x<3", "(-\\infty,3)", "x\\ge3", "x>4"]),
    "-1<x\\le 2": (["(-1,2]", "-1 < x ≤ 2"], ["[-1,2)", "(1,2]", "-1<x<2", "(-1,3]"]),
    "3:4": (["3 : 4", "3：4"], ["4:3", "3:5"]),
    "2ab+a^2": (["a^2+2ab", "a^2 + 2ba"], ["a^2+2", "a^2+2a", "a^2-2ab"]),
    "\\emptyset": (["\\varnothing", "∅"], ["\\{0\\}", "0"]),
    "x=2,x=5": (["x_1 = 2, x_2 = 5", "x = 5, x = 2"], ["x=2", "x=-2,x=5", "x=2,x=6"]),
}
MATHS = ["The answer is\n\\[ {} \\]", "**Answer:** {}", "**{}**", "<answer>**{}**</answer>",
         "<answer>{}.</answer>",
         "The result must be {}.", "It is equal to {}.", "So {} is the answer.", "## Final Answer\n{}\n",
         "The answer is {}, because the sides are equal.", "【答案】{}", "Thus, the result is ${}$."]


@pytest.mark.parametrize("gold", FORMULAS)
def test_formulas(gold):
    ways, changed = FORMULAS[gold]
    forms = ["<answer>{}</answer>", "\\boxed{{{}}}", "The answer is ${}$.", *MATHS]
    cases = []
    for form in forms:
        cases += [(form.format(way), gold, "math", {}, 1) for way in [gold, *ways]]
        cases += [(form.format(gold), way, "math", {}, 1) for way in ways]
        cases += [(form.format(way), gold, "math", {}, 0) for way in changed]
        cases += [(form.format(gold), way, "math", {}, 0) for way in changed]
    assert not wrongly_graded(cases)


# ----- options

OPTIONS = [["3 cm", "12 cm", "18 cm", "24 cm"], ["cat", "the brown dog", "cow", "none of these"], ["-2",
                                                                                                   "2",
                                                                                                   "1/2",
                                                                                                   "-1/2"]]
CHOSEN = ["{L}", "({L})", "{L}.", "{L})", "{L}: {t}", "{L}. {t}", "({L}) {t}", "Option {L}",
          "option ({L})", "{t}",
          "\\text{{{L}}}", "**{L}**", "选项{L}", "选{L}", "（{L}）", "{F}", "[\"{L}\"]", "【{L}】", "{L}。",
          "{L} {t}"]
CHOICES_IN_PROSE = [
    "{L}", "({L})", "**{L}**", "I choose {L}.", "Option {L} is correct.", "{L} is correct.", "It is {L}.",
    "So the right option is ({L}) {t}.", "故选{L}", "因此选（{L}）。", "正确答案：{L}", "I would go with option {L}.",
    "The answer is {L}, not {O}.", "Not {O} but {L}.", "The answer is {O}. Wait, no. The answer is {L}.",
    "Option {O} is wrong. Option {L} is right.", "({O}) is incorrect, so it is ({L}).",
    "The answer is ({L}) rather than ({O}).", "The answer is {L}. {t}",
    "The correct answer is option {L}: {t}.",
    "The answer is {t}.", "It must be {t}.", "{L} is the best answer.", "Among the choices, {L} fits best.",
    "It is {L} rather than {O}.", "The answer is clearly {L}.", "Therefore, {L}.",
    "Thus, option ({l}) is correct.", "The {N} option is correct.", "So the answer is the {N} option.",
    "Eliminating {O}, we are left with {L}.", "答：{L}",
    "Answer - {L}", "The answer is {L}, because {O} is too long.",
    "Ans. ({L})", "### Answer\n\n**{L}**"]
UNDECIDED = ["{L} or {O}", "{L}, {O}", "{L}/{O}", "{L} and {O}", "({L}) ({O})", "ABCD", "A, B, C, D",
             "A B C D", "not {L}",
             "{L}. {t} or {O}. {o}", "{L} or maybe {O}", "({L}) {t} ({O}) {o}",]


def filled(form, options, i, other):
    letter = chr(65 + i)
    place = ["first", "second", "third", "fourth"][i]
    return form.format(L=letter, l=letter.lower(), N=place,
                       F=chr(ord("Ａ") + i), t=options[i], O=chr(65 + other), o=options[other])


@pytest.mark.parametrize("options", OPTIONS)
def test_an_option_in_any_form(options):
    forms = [slot.replace("{}", inner) for slot in SLOTS[:2] + SLOTS[4:10] for inner in CHOSEN]
    forms += [cue.replace("{}", inner) for cue in CUES for inner in CHOSEN[:10]]
    forms += CHOICES_IN_PROSE
    cases = []
    for form in forms:
        for i in range(4):
            response = filled(form, options, i, (i + 1) % 4)
            cases += [(response, gold, "choice", {"choices": options},
                       int("ABCD"[i] == gold)) for gold in "ABCD"]
    assert not wrongly_graded(cases)


@pytest.mark.parametrize("answer", ["(B) the fish", "B. 7 cm", "B: it swims", "\\textbf{(B)}\\ 12", "[B] 7"])
def test_a_letter_beats_the_text_beside_it(answer):
    for form in SLOTS[:2] + SLOTS[8:10]:
        for gold in "ABCD":
            assert graded(form.format(answer), gold, "choice", choices=OPTIONS[1]) == int(gold == "B")


@pytest.mark.parametrize("options", OPTIONS)
def test_several_options_are_no_answer(options):
    cases = []
    for form in [slot.replace("{}",
                              inner) for slot in SLOTS[:2] + SLOTS[8:10] + CUES[:4] for inner in UNDECIDED]:
        for i in range(4):
            response = filled(form, options, i, (i + 1) % 4)
            cases += [(response, gold, "choice", {"choices": options}, 0) for gold in "ABCD"]
    assert not wrongly_graded(cases)


@pytest.mark.parametrize("way", [
    "A, C", "A,C", "AC", "A and C", "C, A", "(A), (C)", "A、C", "[A, C]", '["A", "C"]', "A & C", "A C", "选AC",
    "A. cat, C. cow", "A) cat and C) cow", "Ａ，Ｃ", "A;C", "cat, cow", "Options A and C", "{A, C}", "A, and C"])
def test_several_golds(way):
    fields = {"choices": ["cat", "dog", "cow", "pig"]}
    for form in ("<answer>{}</answer>", "\\boxed{{{}}}"):
        for gold, verdict in (("A, C", 1), ("A", 0), ("C", 0), ("A, B", 0), ("A, B, C", 0), ("B, D", 0)):
            assert graded(form.format(way), gold, "choice", **fields) == verdict


# ----- words

WORDS = [("Paris", "London"), ("a red bicycle", "a blue bicycle"), ("北京", "上海"), ("March 3, 1998",
                                                                                  "March 4, 1998"),
         ("New York City", "York"), ("10:30", "10:31"), ("3:30 PM", "3:30 AM"), ("yes", "no"), ("3-5", "3-6")]


@pytest.mark.parametrize("answer, other", WORDS)
def test_words(answer, other):
    cases = []
    for form in SLOTS[:2] + SLOTS[4:10] + CUES:
        for way in (answer, answer.upper(), f"“{answer}”", f"{answer}。"):
            cases.append((form.format(way), answer, "text", {}, 1))
            cases.append((form.format(way), other, "text", {}, 0))
    assert not wrongly_graded(cases)


# ----- further golds, and cases from practice

@pytest.mark.parametrize("kind, gold, accepted, right, wrong", [
    ("text", "car", ["automobile"], ["car", "Automobile"], ["bus", "car, automobile"]),
    ("math", "24/7", ["3.43"], ["24/7", "3.43", "\\frac{24}{7}"], ["3.44", "24"]),
    ("choice", "A", ["C"], ["A", "(C)"], ["B", "A, C"]), ("number", "5", [], ["5"], ["6"]),
])
def test_any_of_several_golds_is_right(kind, gold, accepted, right, wrong):
    fields = {"meta": {"accepted": accepted}, "choices": ["cat", "dog", "cow", "pig"]}
    for verdict, ways in ((1, right), (0, wrong)):
        assert [graded(f"<answer>{way}</answer>", gold, kind,
                       **fields) for way in ways] == [verdict] * len(ways)
    assert graded(f"<answer>{gold}</answer>", gold, kind, choices=fields["choices"], meta=None) == 1


CASES = ROOT.parent / "shared" / "cases" / "grading.jsonl"


@pytest.mark.skipif(not CASES.exists(), reason="needs the handed cases")
def test_handed_cases():
    rows = [json.loads(line) for line in CASES.read_text().splitlines()]
    cases = []
    for row in rows:
        fields = {"choices": row.get("choices"), "meta": {"accepted": row.get("accepted", [])}}
        cases.append((row["response"], row["gold"], row["answer_type"], fields, row["right"]))
    assert len(cases) > 40 and not wrongly_graded(cases)
