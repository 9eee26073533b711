"""rewards.py: prompts, extraction, grading tables, format, specs, and hostile text."""
import itertools
import json
import math
import random
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data_prep  # noqa: E402
import rewards  # noqa: E402


def record(answer, kind="math", **fields):
    return {"id": "0", "question": "q", "images": [], "answer": answer, "answer_type": kind, **fields}


def box(text):
    return f"\\boxed{{{text}}}"


# ----- prompts

def test_prompt_fills_braces_and_renders_options():
    ask = record("B", "choice", choices=["3 cm", "4 cm"]) | {"question": "What is {x} in \\frac{1}{2}?"}
    prompt = rewards.build_prompt(ask)
    assert "What is {x} in \\frac{1}{2}?\n(A) 3 cm\n(B) 4 cm\n" in prompt and "{question}" not in prompt


@pytest.mark.parametrize("question", [
    "Pick:\n(A) 1\n(B) 2", "Pick\nA. 1\nB. 2", "Pick\nChoices:\nA:1\nB:2", "Pick. Options: A. 1 B. 2",
])
def test_prompt_does_not_repeat_options(question):
    prompt = rewards.build_prompt(record("A", "choice", choices=["1", "2"]) | {"question": question})
    assert prompt.startswith(question + "\nWork")


def test_task_prompt_wins_over_answer_type():
    prompt = rewards.build_prompt(record("3", "number", task="counting") | {"question": "How many cubes ?"})
    assert prompt == ("How many cubes ? Think inside <think> </think>, "
                      "then give the number inside <answer> </answer>.")


@pytest.mark.parametrize("task, words", [("boxed", ["step"]), ("rethink", ["Guidelines", "wait", "repair"])])
def test_prompts_that_ask_for_a_box(task, words):
    ask = record("B", "choice", choices=["3 cm", "4 cm"], task=task) | {"question": "What is {x}?"}
    question, blank, request = rewards.build_prompt(ask).rpartition("\n\n")
    assert question == "What is {x}?\n(A) 3 cm\n(B) 4 cm" and request.endswith("\\boxed{}.")
    assert all(word in request for word in words) and "<answer>" not in request


SHOWN = "Find x.\nChoices:\nA: 30\nB: 45"


@pytest.mark.parametrize("question, choice", [
    (SHOWN, True), ("Find x. (A) 30 (B) 45", True), ("Find x.\nA. 30\nB. 45", True),
    ("Find x. Options: 30, 45", True), ("Find angle A.", False), ("Lines a and b meet in (A).", False),
    ("The circle with centre A. Find its radius, a choice of yours.", False), ("", False),
])
def test_the_question_decides_whether_a_letter_is_asked_for(question, choice):
    assert bool(rewards.HAS_OPTIONS.search(question)) is choice
    for task in ("structure", "structure_answer"):
        asked = {rewards.build_prompt(record(gold, kind, task=task) | {"question": question})
                 for gold, kind in (("A", "text"), ("30", "number"), ("12 AB", "text"))}
        assert len(asked) == 1 and asked == {question + rewards.PROMPTS[task + "_choice" * choice][10:]}


def test_structure_asks_for_a_letter_when_the_record_has_the_options():
    ask = record("B", "choice", choices=["3 cm", "4 cm"], task="structure_answer")
    assert rewards.build_prompt(ask) == "q\n(A) 3 cm\n(B) 4 cm\nGive only the letter of the right option."


@pytest.mark.parametrize("task", ["counting", "structure", "structure_choice", "transform"])
def test_tasks_are_asked_with_and_without_reasoning(task):
    ask = record("3", "number") | {"question": "What is {x}?"}
    answer_only = {"structure_choice": "structure_answer_choice"}.get(task, f"{task}_answer")
    reasoned, direct = (rewards.build_prompt(ask | {"task": name}) for name in (task, answer_only))
    tags = "<think>", "</think>", "<answer>", "</answer>"
    assert all(tag in reasoned and tag not in direct for tag in tags)
    assert all("What is {x}?" in prompt and "{question}" not in prompt for prompt in (reasoned, direct))


def test_transform_prompt_names_what_can_be_called():
    prompt = rewards.PROMPTS["transform"]
    kinds = {"size": "small medium large", "shape": "cube sphere cylinder", "material": "glass metal rubber",
             "color": "yellow gray cyan blue brown green red purple"}
    for kind, values in kinds.items():
        line = prompt.partition(f"change_{kind}(object_id, value): ")[2].partition("\n")[0]
        assert sorted(line.replace(",", "").replace(" or ", " ").split()) == sorted(values.split())
    sides = ["front", "behind", "left", "right", "front_left", "front_right", "behind_left", "behind_right"]
    assert "change_position(" in prompt and all(f"\n{side}: " in prompt for side in sides)
    assert rewards.PROMPTS["transform_answer"].startswith(prompt.partition("{question}")[0])


# ----- extraction

@pytest.mark.parametrize("response, answer", [
    ("<think>2</think><answer> 3 </answer>", "3"),
    ("<answer>2</answer> no <answer>3</answer>", "3"),
    ("<answer>\n\\boxed{3}\n</answer>", "3"),
    ("\\boxed{4} <answer>3</answer>", "3"),
    ("<answer>3</answer> \\boxed{4}", "3"),
    ("<answer> Final Answer:B </answer>", "B"),
    ("first \\boxed{3}, wait, \\boxed{4}", "4"),
    ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
    ("\\boxed{x = \\boxed{3}}", "3"),
    ("\\boxed{1} and \\boxed{2}", "1, 2"),
    ("\\boxed{3", None),
    ("\\boxed{3} then \\boxed{4", None),
    ("\\boxed{}", None),
    ("<answer></answer>", None),
    ("", None),
    ("So the answer is 7. Hope it helps!", "7"),
    ("**Final Answer**: 7", "7"),
    ("The final answer is 2.5", "2.5"),
    ("<think>maybe 9</think> 7", "7"),
    ("just 7 apples", "just 7 apples"),
])
def test_extract(response, answer):
    assert rewards.extract_answer(response) == answer


# ----- accuracy

@pytest.mark.parametrize("gold, answer, verdict", [
    ("17^\\circ", "17", 1), ("17", "17^\\circ", 1), ("17", "17°", 1), ("17", "17 degrees", 1),
    ("1/2", "0.5", 1), ("0.5", "\\frac{1}{2}", 1), ("0.5", "\\frac12", 1),
    ("1/3", "0.333333", 1), ("1/3", "0.33", 0),
    ("50", "50\\%", 1), ("50\\%", "50", 1), ("50\\%", "0.5", 1), ("0.5", "50%", 1), ("0.5", "50", 0),
    ("1000", "1,000", 1), ("1000", "1{,}000", 1), ("1000", "1.000", 0), ("5", "x=5", 1), ("5", "x = -5", 0),
    ("5", "5 cm", 1), ("5", "5 \\text{ cm}", 1), ("5", "5 m", 1), ("5", "5cm^2", 1),
    ("5 cm", "5", 1), ("5", "5\\pi", 0),
    ("3", "3.0", 1), ("3", "03", 1), ("3", "$3$", 1), ("-3", "−3", 1),
    ("3", "-3", 0), ("3", "nan", 0), ("3", "inf", 0),
    ("$5$", "5", 1), ("\\boxed{5}", "5", 1), ("<answer> 5 </answer>", "5", 1),
    ("4\\sqrt{2}", "4", 0), ("4", "4\\sqrt{2}", 0), ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}", 1),
    ("2\\sqrt{3}", "\\sqrt{12}", 1), ("2\\sqrt{3}", "3.46", 0),
    ("\\pi", "3.14", 0), ("3.1415926", "3.1416", 0),
    ("x^2-1", "(x-1)(x+1)", 1), ("x^2-1", "x^2+1", 0),
    ("\\{2,1\\}", "\\{1,2\\}", 1), ("\\{1,2\\}", "\\{1,3\\}", 0), ("1,2", "1,2", 1), ("1,2", "2", 0),
    ("(3,-4)", "(3, -4)", 1), ("(3,-4)", "(-4,3)", 0), ("[0,1)", "[0,1)", 1), ("(0,9)", "[0,9)", 0),
    ("12:00", "12:00", 1),
])
def test_math(gold, answer, verdict):
    assert rewards.accuracy(box(answer), record(gold)) == verdict
    assert rewards.accuracy(f"<think>r</think><answer>{answer}</answer>", record(gold)) == verdict


@pytest.mark.parametrize("gold, answer, precision, verdict", [
    ("3", "3", None, 1), ("3", " 3\n", None, 1), ("3", "3.0", None, 1), ("3", "03", None, 1),
    ("3", "three", None, 0), ("3", "3 cubes", None, 1), ("3", "there are 3 cubes", None, 1),
    ("3", "3 or 4", None, 0), ("5", "1 2 3 4 5", None, 0),
    ("1000", "1,000", None, 1), ("0.5", "\\frac{1}{2}", None, 1), ("4", "\\sqrt{16}", None, 1),
    ("3.14", "3.14159", 2, 1), ("3.14", "3.146", 2, 0), ("3.14", "3.1", 2, 0), ("3.1", "3.14159", 1, 1),
    ("3.14", "3.14159", None, 0), ("3.14", "3.14159", 2.0, 1), ("0.73", "73%", 2, 1),
])
def test_number(gold, answer, precision, verdict):
    gold = record(gold, "number", precision=precision)
    assert rewards.accuracy(f"<answer>{answer}</answer>", gold) == verdict


@pytest.mark.parametrize("response, gold, verdict", [
    ("I count 2 red and 1 blue so 3", "3", 1),
    ("I count 3 red and 1 blue so 4", "3", 0),
    ("There are three cubes left.", "3", 1),
    ("There are 4 queries with a value below 0.5.", "4", 1),
    ("7 - 2 = 5 objects. Therefore, there are 5 objects left.", "5", 1),
    ("The question cannot be answered without the 3 images.", "3", 0),
    ("<answer>2</answer><answer>3</answer>", "3", 1),
    ("", "3", 0),
])
def test_number_in_prose(response, gold, verdict):
    assert rewards.accuracy(response, record(gold, "number")) == verdict


@pytest.mark.parametrize("answer, verdict", [
    ("A", 1), ("(A)", 1), ("A.", 1), ("A. 3", 1), ("\\text{A}", 1), ("a", 1), ("A: 3", 1), ("**A**", 1),
    ("Option A", 1), ("3", 1), ("3 cm", 1), ("$3$", 1),
    ("Apple", 0), ("AB", 0), ("A or B", 0), ("A, B", 0), ("A and B", 0), ("A. 3 or B. 4", 0), ("B", 0),
    ("4", 0), ("", 0), ("C", 0),
])
def test_choice(answer, verdict):
    assert rewards.accuracy(box(answer), record("A", "choice", choices=["3", "4"])) == verdict
    assert rewards.accuracy(box(answer), record("3", "choice", choices=["3", "4"])) == verdict


@pytest.mark.parametrize("response, gold, choices, verdict", [
    ("B: 3π", "B", None, 1), ("Bird", "B", None, 0), ("A, C", "C\nA", None, 1), ("A", "C\nA", None, 0),
    ("(b)", "B", ["yes", "no"], 1), ("No.", "B", ["yes", "no"], 1),
    ("\\frac{5}{3}\\pi", "A", ["\\frac { 5 } { 3 } \\pi", "5"], 1),
])
def test_choice_in_a_slot(response, gold, choices, verdict):
    assert rewards.accuracy(box(response), record(gold, "choice", choices=choices)) == verdict


@pytest.mark.parametrize("response, verdict", [
    ("The answer is (B).", 1), ("The correct option letter is B. It grows.", 1),
    ("So it is the moon.", 1), ("B) the moon", 1),
    ("The answer is (A) Sun.", 0), ("The correct answers are (A) and (B).", 0),
    ("I cannot see the moon.", 0), ("The moon is larger than the sun.", 1),
    ("The sun is larger than the moon.", 0), ("答案:B", 1),
])
def test_choice_in_prose(response, verdict):
    assert rewards.accuracy(response, record("B", "choice", choices=["Sun", "Moon"])) == verdict


@pytest.mark.parametrize("gold, answer, verdict", [
    ("Yes", "yes", 1), ("Red", "red.", 1), ("the red car", "Red car", 1), ("Left", "L", 0),
    ("cat", "dog", 0), ("12", "12.0", 1), ("New York", "new  york", 1), ("\\text{cat}", "cat", 1),
])
def test_text(gold, answer, verdict):
    assert rewards.accuracy(f"<answer>{answer}</answer>", record(gold, "text")) == verdict


@pytest.mark.parametrize("response, verdict", [
    ("<think>r</think><answer> Final Answer:B </answer>", 1),
    ("<think>r</think>\n<answer>(B)</answer>\n", 1),
    ("<think>r</think><answer>C</answer>", 0), ("\\boxed{A} and then \\boxed{B", 0),
])
def test_tagged_choice(response, verdict):
    assert rewards.accuracy(response, record("B", "choice")) == verdict


AREA = "Area $=9 \\pi \\mathrm{cm}^{2}$"


@pytest.mark.parametrize("gold, answer, verdict", [
    (AREA, "9\\pi", 1), (AREA, "9π cm²", 1), (AREA, "A = 9 \\pi \\text{ cm}^2", 1), (AREA, "9", 0),
    (AREA, "3\\pi", 0),
    ("Area $=113.1 \\mathrm{~cm}^{2}$", "113.1", 1), ("Area $=113.1 \\mathrm{~cm}^{2}$", "113.2 cm^2", 0),
    ("=\\frac{7}{4}", "1.75", 1), ("5=s", "5", 1), ("5=s", "6", 0), ("x=8 \\mathrm{~cm}", "8", 1),
    ("118掳T", "118°T", 1), ("118掳T", "118", 1), ("S 23.5 ^\\circ W", "S23.5°W", 1),
    ("N 34° W", "N34^\\circ E", 0),
    ("Center $=(20,10)$", "(20, 10)", 1), ("Center $=(20,10)$", "(10, 20)", 0), ("=(4,0)", "(4, 0)", 1),
    ("(x, y)=\\left(90^{\\circ}, 5\\right)", "(90, 5)", 1), ("8\\sqrt{3}{squareinches}", "8√3", 1),
    ("69{degrees}", "69", 1), ("10km / h", "10 \\text{ km/h}", 1), ("-4.9\n-4.9", "-4.9\n-4.9", 1),
    ("63\\pi x^3+66\\pi x^2 litres", "63\\pi x^3+66\\pi x^2", 1), ("1:64", "1 : 64", 1), ("1:64", "64", 0),
    ("f(x)=|x-3|", "|x - 3|", 1), ("y=-2 x+5", "y=5-2x", 1), ("y=-2 x+5", "2x+5", 0),
    ("\\frac{\\sqrt{30}}{2}", "√30/2", 1), ("5 \\sqrt { 3 }", "5*sqrt(3)", 1), ("2\\pi", "2pi", 1),
    ("2\\pi", "2", 0),
    ("2.5", "2\\frac{1}{2}", 1), ("2.5", "2 1/2", 1), ("1.5", "1½", 1), ("3", "6/2 = 3", 1),
    ("1000", "1\\,000", 1), ("1000", "1 000", 1), ("12", "1 2", 0), ("0.5", ".5", 1), ("5", ".5", 0),
    ("3", "3/0", 0),
    ("7", "\\approx 7", 1), ("5", "\\$5", 1), ("4", "3 cm or 4 cm", 0), ("3", "not 3", 0),
    ("0.333333", "1/3", 1), ("0.5", "50 %", 1), ("x=5", "y=5", 0), ("x=5", "X = 5", 1), ("y=5", "5", 1),
    ("(-\\infty, 4]", "(-∞, 4]", 1), ("y \\leq 5", "y ≤ 5", 1), ("y \\leq 5", "y<5", 0),
    ("x>3", "(3,\\infty)", 1),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{bmatrix}1&2\\\\3&4\\end{bmatrix}", 1),
])
def test_notation(gold, answer, verdict):
    assert rewards.accuracy(box(answer), record(gold)) == verdict
    assert rewards.accuracy(f"<answer>{answer}</answer>", record(gold)) == verdict


@pytest.mark.parametrize("answer, verdict", [
    ("[B]", 1), ("{B}", 1), ("B?", 1), ("B 4 cm", 1), ("B (4 cm)", 1), ("B, 4 cm", 1), ("B - 4 cm", 1),
    ("4.0 cm", 1),
    ("\\mathbf{(B)}", 1), ("B, 5 cm", 0), ("(A)(B)", 0), ("A B", 0), ("A&B", 0), ("B\nA", 0), ("not B", 0),
    ("E", 0),
])
def test_choice_beside_its_text(answer, verdict):
    choices = ["3 cm", "4 cm", "5 cm", "6 cm"]
    assert rewards.accuracy(box(answer), record("B", "choice", choices=choices)) == verdict


@pytest.mark.parametrize("response, gold, choices, verdict", [
    ("Hence B is correct.", "B", ["3", "4"], 1), ("Option B fits.", "B", ["3", "4"], 1),
    ("因此,选B。", "B", ["3", "4"], 1),
    ("(A) 3\n(B) 4", "B", ["3", "4"], 0), ("(A) 3 (B) 4 (C) 5", "C", ["3", "4", "5"], 0),
    ("Then the tuna population would likely increase.", "A", ["The tuna will increase",
     "The mice will die"], 1),
    ("The tuna would increase. The mice would die.", "A", ["The tuna will increase", "The mice will die"], 0),
    ("It could be the sun or the moon.", "A", ["sun", "moon"], 0),
    ("The moon is larger than the sun.", "A", ["yes", "no"], 1),
    ("The moon is not larger.", "B", ["yes", "no"], 1),
    ("It may be yes or no.", "A", ["yes", "no"], 0), ("I like trees.", "A", ["yes", "no"], 0),
    ("I do not know.", "B", ["yes", "no"], 0),
])
def test_choice_by_its_words(response, gold, choices, verdict):
    asked = record(gold, "choice", choices=choices) | {"question": "Is the moon larger than the sun?"}
    assert rewards.accuracy(response, asked) == verdict


@pytest.mark.parametrize("gold, answer, verdict", [
    ("[2, 3]", "[2,3]", 1), ("[2, 3]", "2, 3", 1), ("[2, 3]", "[3, 2]", 0), ("B", "(B)", 1),
    ("1,000", "1000", 1),
    ("42.2%-62.6%", "42.2% – 62.6%", 1),
    ("domain: (2,8] and range: [6,8)", "domain: (2,8] and range: [6,8)", 1),
    ("domain: (2,8] and range: [6,8)", "domain: [2,8] and range: [6,8)", 0),
])
def test_text_brackets(gold, answer, verdict):
    assert rewards.accuracy(f"<answer>{answer}</answer>", record(gold, "text")) == verdict


REAL = ROOT.parent / "shared" / "real"


@pytest.mark.skipif(not REAL.exists(), reason="needs the published rows")
def test_published_golds_answer_themselves():
    rows = [row for path in ("mathvision/sample100.jsonl",
     "format_samples/geometry3k_hiyouga_form_10.parquet",
                             "format_samples/mathvision_hf_form_100.parquet")
            for row in data_prep.read_records(REAL / path)]
    for row in json.loads((REAL / "format_samples/mathverse_testmini_text_only.json").read_text()):
        kinds = ("choice",) if row["question_type"] == "multi-choice" else ("math", "number", "text")
        rows += [record(row["answer"], kind, question=row["question"]) for kind in kinds]
    for row in json.loads((REAL / "format_samples/mathvista_testmini_sample.json").read_text()).values():
        choices, kind = row["choices"], "number" if row["answer_type"] in ("integer", "float") else "text"
        letter = {"choices": choices, "answer": chr(65 + choices.index(row["answer"]))} if choices else {}
        rows.append(record(row["answer"], "choice" if choices else kind, precision=row["precision"]) | letter)
    assert len(rows) > 1500
    for row in rows:
        for text in (f"<answer>{row['answer']}</answer>", box(row["answer"])):
            assert rewards.accuracy(text, row) == 1, row


# ----- format

@pytest.mark.parametrize("response, verdict", [
    ("<think>a</think><answer>1</answer>", 1),
    ("<think>a</think>\n\n<answer>1</answer>", 1),
    ("<think>a</think>\n<answer>\n3\n</answer>", 1),
    (" <think>a</think><answer>1</answer>\n", 1),
    ("<think>r</think><answer> Final Answer:B </answer>", 1),
    ("<think></think><answer></answer>", 0),
    ("<think> </think><answer>1</answer>", 0),
    ("<think>a</think><answer>\n</answer>", 0),
    ("<think>a</think> so <answer>1</answer>", 0),
    ("well <think>a</think><answer>1</answer>", 0),
    ("<think>a</think><answer>1</answer> done", 0),
    ("<answer>1</answer>", 0),
    ("<think>a</think>1", 0),
    ("<think>a</think><answer>1</answer><answer>2</answer>", 0),
    ("<think>a</think><answer>1</answer><think>b</think><answer>2</answer>", 0),
    ("<think><think>a</think></think><answer>1</answer>", 0),
    ("<think>a<answer>1</answer></think>", 0),
    ("<answer>1</answer><think>a</think>", 0),
    ("<Think>a</Think><Answer>1</Answer>", 0),
    ("<think>a</think><answer>1", 0),
    ("", 0),
])
def test_format(response, verdict):
    assert rewards.format_think_answer(response, record("1")) == verdict


# ----- Vision-R1's reward

def tagged(answer, think="r"):
    return f"<think>{think}</think><answer>{answer}</answer>"


def composed(spec, response, gold):
    weights = rewards.parse_reward_spec(spec)
    return sum(weight * rewards.REWARDS[name](response, gold) for name, weight in weights.items())


PICK = record("B", "choice", choices=["2π", "3π", "4π", "5π"])


@pytest.mark.parametrize("response, gold, verdict", [
    (tagged(" Final Answer:B "), PICK, 1), (tagged(" Final Answer: B "), PICK, 1),
    (tagged("Final Answer:B"), PICK, 1), (tagged("Final Answer: B"), PICK, 1),
    ("<think>r</think>\n<answer> Final Answer:B </answer>", PICK, 1), (tagged("B") + "\n", PICK, 1),
    ("\n" + tagged("B"), PICK, 1), (tagged("B: 3π"), PICK, 1), (tagged("(B)"), PICK, 1),
    (tagged("1,000"), record("1000", "number"), 1), (tagged("yes"), record("Yes", "text"), 1),
    (tagged("\nFinal Answer:\n3.0\n"), record("3", "number"), 1),
    (tagged("\\boxed{3}", "so \\boxed{4}"), record("3", "number"), 1),
    (tagged("B", "r" * 100_000), PICK, 1),
    (tagged("C"), PICK, 0), (tagged("Bird"), PICK, 0), (tagged("B or C"), PICK, 0),
    ("<answer>B</answer>", PICK, 0), ("<think>r</think>B", PICK, 0), ("B", PICK, 0), ("", PICK, 0),
    ("<think>r</think> so <answer>B</answer>", PICK, 0), ("so " + tagged("B"), PICK, 0),
    (tagged("B") + " done", PICK, 0), (tagged("C") + "<answer>B</answer>", PICK, 0),
    (tagged("B") + tagged("B"), PICK, 0), (tagged("B", "<think>r</think>"), PICK, 0),
    (tagged("B", "<think>r"), PICK, 0), (tagged("<answer>B</answer>"), PICK, 0), (tagged("B", ""), PICK, 0),
    (tagged("B", "\n"), PICK, 0), (tagged(""), PICK, 0), (tagged(" Final Answer: "), PICK, 0),
    (tagged("B").replace("think", "Think").replace("answer", "ANSWER"), PICK, 0),
    (tagged("B").removesuffix("</answer>"), PICK, 0), (tagged("B").replace("</think>", ""), PICK, 0),
    ("<think>" * 50_000 + tagged("B"), PICK, 0), (tagged("<answer>" * 20_000 + "B"), PICK, 0),
])
def test_hfrrf_wants_the_whole_response_in_form_and_the_answer_right(response, gold, verdict):
    assert rewards.hfrrf(response, gold) == rewards.hfrrf(response, gold | {"truncated": False}) == verdict
    assert rewards.hfrrf(response, gold | {"truncated": True}) == 0


@pytest.mark.parametrize("response, soft, hard", [
    (tagged("B"), 1, 1), (tagged("C"), 0.5, 0), ("<answer>B</answer>", 0.5, 0), ("no idea", 0, 0),
])
def test_hfrrf_pays_nothing_for_half_of_it(response, soft, hard):
    """Beside the 1:1 sum of format and result that the paper's run without a cold start is paid."""
    assert composed("accuracy=0.5,format=0.5", response, PICK) == soft
    assert composed("hfrrf", response, PICK) == hard


def test_hfrrf_pushes_truncated_siblings_down():
    """Stage 1 of PTST: one of sixteen finishes; advantages with the sample standard deviation."""
    group = [rewards.hfrrf(tagged("B"), PICK)]
    group += [rewards.hfrrf(text, PICK | {"truncated": True}) for text in ("<think>r", tagged("B"), "B") * 5]
    advantages = {(r - statistics.mean(group)) / statistics.stdev(group) for r in group}
    assert group == [1] + [0] * 15 and sorted(advantages) == pytest.approx([-0.25, 3.75])


# ----- VL-Rethinker's rewards

THREE = record("A", "choice", choices=["3", "4"])


@pytest.mark.parametrize("gold, response, verdict, released", [  # released: its code, if known to differ
    (record("4"), f"{box(3)} no, {box(4)}", 1, None), (record("4"), f"{box(4)} no, {box(3)}", 0, None),
    (record("0.5"), box("\\frac{1}{2}"), 1, None), (record("3"), "\\boxed{3", 0, -1),
    (record("3"), f"{box(3)} or \\boxed{{3", 0, None), (record("3"), box(""), 0, -1),
    (record("3"), box(" "), 0, None),
    (record("17^\\circ"), box("17"), 1, None), (record("17"), box("17^\\circ"), 1, None),
    (record("1000"), box("1,000"), 1, None), (record("5"), box("x=5"), 1, None),
    (record("\\{2,1\\}"), box("\\{1,2\\}"), 1, None), (record("x^2-1"), box("(x-1)(x+1)"), 1, None),
    (record("3.1415926"), box("3.1416"), 0, None), (record("\\pi"), box("3.14"), 0, None),
    (record("2\\sqrt{3}"), box("3.46"), 0, None),
    (THREE, box("A"), 1, None), (THREE, box("A."), 1, None), (THREE, box("A. 3"), 1, None),
    (THREE, box("(A)"), 1, 0), (THREE, box("\\text{A}"), 1, 0), (THREE, box("a"), 1, 0),
    (THREE, box("Apple"), 0, 1), (THREE, box("AB"), 0, 1), (THREE, box("A or B"), 0, None),
    (record("Yes", "text"), box("yes"), 1, 0), (record("Red", "text"), box("red"), 1, 0),
    (record("L", "text"), box("Left"), 0, 1),
    (record("4"), "so it is 4", 0, 1), (record("4"), "", 0, None),
    (record("4"), "<answer>4</answer>", 0, None), (THREE, f"A, so {box('B')}", 0, None),
    (record("4"), f"<answer>4</answer> {box(3)}", 0, None),
    (record("4"), f"<answer>3</answer> {box(4)}", 1, None),
    (record("4"), f"{box(4)} " + "so " * 1300, 1, None),
    (record("5"), box("5 cm"), 1, None), (record("5"), box("5 \\text{ cm}"), 1, 0),
    (record("5"), box("5 m"), 1, 0),
    (record("50"), box("50\\%"), 1, 0), (record("50\\%"), box("50"), 1, None),
    (record("50\\%"), box("0.5"), 1, None), (record("0.5"), box("50\\%"), 1, None),
    (record("2"), box("9^{9^{9^9}}"), 0, None), (record("2"), "\\boxed{" * 15_000 + "2", 0, None),
])
def test_boxed_reads_the_last_box_and_nothing_else(gold, response, verdict, released):
    assert rewards.boxed(response, gold) == verdict != released
    assert rewards.boxed(response, gold | {"truncated": True}) == 0
    assert rewards.vl_rethinker(response, gold) == verdict  # never -1: a failure to parse is a wrong answer
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(rewards.boxed, response, gold).result() == verdict


@pytest.mark.parametrize("waits, fields, right, wrong", [
    (0, {}, 1.0, 0.0), (1, {}, 1.1, 0.0), (2, {}, 1.1, 0.0), (3, {}, 0.4, 0.0), (4, {}, 0.2, 0.0),
    (5, {}, 0.0, 0.0), (6, {}, -0.1, -0.1), (20_000, {}, -0.1, -0.1),
    (0, {"truncated": True}, -0.1, -0.1), (1, {"truncated": True}, 1.1, -0.1),  # the bonus overrides
    (3, {"truncated": True}, -0.1, -0.1),
    (0, {"forced": True}, 1.0, 0.0), (1, {"forced": True}, 1.0, 0.0), (4, {"forced": True}, 1.0, 0.0),
    (6, {"forced": True}, -0.1, -0.1), (1, {"forced": True, "truncated": True}, -0.1, -0.1),
    (3, {"forced": False, "truncated": False}, 0.4, 0.0),
])
def test_vl_rethinker_pays_for_one_or_two_reflections(waits, fields, right, wrong):
    gold = record("4") | fields
    for answer, score, verdict in ((4, right, 1), (3, wrong, 0)):
        text = "Wait, " * waits + box(answer)
        assert rewards.vl_rethinker(text, gold) == pytest.approx(score)
        assert rewards.boxed(text, gold) == (0 if fields.get("truncated") else verdict)


@pytest.mark.parametrize("text, count", [
    ("", 0), ("Wait, no. WAIT A moment. Alternatively, 3.", 3), ("wait. Wait! wait for it", 0),
    ("I await the bus", 0), ("wait, wait, wait", 2), ("wait another", 1), ("alternatively" * 9, 9),
])
def test_reflections_are_counted_as_released(text, count):
    assert rewards.reflections(text) == count


# ----- Reason-RFT's rewards

@pytest.mark.parametrize("response, strict, legacy", [
    ("<think>a</think><answer>1</answer>", 1, 1), ("<think>a</think>\n\n<answer>1</answer>", 1, 1),
    ("<think>a</think>\n<answer>\n3\n</answer>", 1, 1), ("<think></think><answer></answer>", 0, 1),
    ("<think>a</think><answer>1</answer>\n", 1, 0), (" <think>a</think><answer>1</answer>", 1, 0),
    ("<think>a</think> so <answer>1</answer>", 0, 0), ("<answer>1</answer>", 0, 0),
    ("<think>a</think><answer>1</answer><answer>2</answer>", 0, 1),
    ("<think>a</think><answer>1</answer><think>b</think><answer>2</answer>", 0, 1),
    ("<think><think>a</think></think><answer>1</answer>", 0, 1),
    ("<think>a</think> so </think><answer>1</answer>", 0, 1),
    ("<Think>a</Think><Answer>1</Answer>", 0, 0), ("<think></answer>", 0, 0), ("", 0, 0),
])
def test_released_format_reward_is_laxer(response, strict, legacy):
    assert rewards.format_think_answer(response, record("1")) == strict
    assert rewards.format_legacy(response, record("1")) == legacy


@pytest.mark.parametrize("response, value", [
    ("<summary>s</summary><caption>c</caption>\n<think>a</think> <answer>1</answer>", 1),
    ("<summary>s</summary><caption> </caption><think>a</think><answer>1</answer>", 0),
    ("<caption>c</caption><summary>s</summary><think>a</think><answer>1</answer>", 0),
    ("<think>a</think><answer>1</answer>", 0),
])
def test_format_of_the_caption_variant(response, value):
    assert rewards.format_caption(response, record("1")) == value
    assert rewards.build_prompt(record("x", task="transform_caption")).count("<caption>") == 1


OPTIONS = ["30", "45", "60", "75"]


@pytest.mark.parametrize("response, gold, exact, lenient, released", [  # released: training, evaluation
    (tagged("3"), "3", 1, 1, (1, 1)), (tagged(" 3\n"), "3", 1, 1, (1, 1)),
    (tagged("3.0"), "3", 0, 1, (0, 1)), (tagged("03"), "3", 0, 1, (0, 1)),
    (tagged("three"), "3", 0, 0, (0, 0)),
    ("I count 2 red and 1 blue so 3", "3", 1, 1, (1, 1)),
    ("I count 3 red and 1 blue so 4", "3", 0, 0, (0, 0)),
    ("<answer>2</answer><answer>3</answer>", "3", 1, 1, (0, 0)),  # the last tag counts
    ("<answer>3</answer><answer>2</answer>", "3", 0, 0, (1, 1)),
    (tagged("A"), "A", 1, 1, (1, 1)), (tagged("a"), "A", 0, 1, (0, 0)), (tagged("A. 30"), "A", 0, 1, (0, 0)),
    (tagged("(B)"), "B", 0, 1, (0, 0)),
    (tagged("$3$"), "3", 0, 1, (0, 1)), (tagged("1,000"), "1000", 0, 1, (0, 1)),
    (tagged("\\frac{1}{2}"), "0.5", 0, 1, (0, 1)),
    ("\\frac{1}{2}", "0.5", 1, 1, (1, 1)), ("1,000", "1000", 1, 1, (1, 1)),
    (tagged("3"), "<answer> 3 </answer>", 1, 1, (1, None)), ("", "3", 0, 0, (0, 0)),
])
def test_discrete_wants_the_gold_to_the_letter(response, gold, exact, lenient, released):
    kind = {"answer_type": "choice", "choices": OPTIONS} if gold in "AB" else {}
    assert rewards.discrete(response, record(gold, "number") | kind) == exact
    assert rewards.accuracy(response, record(gold, "number") | kind) == lenient


@pytest.mark.parametrize("answer, gold, value, released", [  # released: its code, if known to differ
    ("104.9", "100", 1, None), ("105", "100", 1, None), ("107.5", "100", 0.933013, None),
    ("110", "100", 0.75, None), ("112.5", "100", 0.5, None), ("115", "100", 0.25, None),
    ("118", "100", 0.043227, None), ("120", "100", 0, None), ("121", "100", 0, None), ("95", "100", 1, None),
    ("90", "100", 0.75, None), ("-110", "-100", 0.75, None), ("100", "-100", 0, None), ("52", "50", 1, None),
    ("0", "0", 1, 0), ("-0.0", "0", 1, 0), ("0.0000000001", "0", 1, 0), ("0.001", "0", 0, None),
    ("nan", "100", 0, math.nan), ("inf", "100", 0, None), ("-inf", "100", 0, None), ("nan", "0", 0, None),
    ("1e2", "100", 1, None), ("1_00", "100", 0, 1), ("1e999", "100", 0, None),
    ("30°", "30", 1, 0), ("3/2", "1.5", 1, 0), ("33°", "30", 0.75, 0), ("55%", "0.5", 0.75, 0),
    ("B", "B", 1, None), ("C", "B", 0, None), ("3 or 4", "3", 0, None), ("", "3", 0, None),
])
def test_numeric_pays_for_nearly_right_numbers(answer, gold, value, released):
    kind = {"answer_type": "choice", "choices": OPTIONS} if gold == "B" else {}
    assert rewards.numeric(tagged(answer), record(gold, "number") | kind) == pytest.approx(value, abs=1e-6)
    assert released is None or released != value


def test_numeric_reads_prose_and_pays_whatever_is_accurate():
    assert rewards.numeric("So the answer is 110.", record("100", "number")) == pytest.approx(0.75)
    assert rewards.numeric("\\frac{1}{2}", record("0.5", "number")) == 1
    assert rewards.numeric(tagged("0.01499"), record("0.01", "number", precision=2)) == 1
    assert rewards.numeric(tagged("\\sqrt{12}"), record("2\\sqrt{3}")) == 1


BOTH = "change_color(2, 'red'), change_size(0, 'small')"
RED = "change_color(2, 'red')"
CALL_TABLE = [  # answer, gold, (partial, full, penalty), the released code's if they differ
    (BOTH, BOTH, (1, 1, 1), None), ("change_size(0, 'small'), change_color(2, 'red')", BOTH, (1, 1, 1), None),
    (BOTH.replace("'", ""), BOTH, (1, 1, 1), None), (BOTH.replace(" ", ""), BOTH, (1, 1, 1), None),
    (f"[{BOTH}]", BOTH, (1, 1, 1), None), (f"\n{BOTH}\n".replace("), ", ")\n"), BOTH, (1, 1, 1), None),
    (BOTH.replace("'", '"'), BOTH, (1, 1, 1), (0, 0, 0)), (RED, BOTH, (0.5, 0.5, 0.5), None),
    (BOTH + ", change_shape(1, 'cube')", BOTH, (2 / 3, 2 / 3, 2 / 3), None),
    (BOTH.replace("red", "blue"), BOTH, (0.75, 0.5, 0.375), None),
    (BOTH.replace("2", "3"), BOTH, (0.75, 0.5, 0.375), None),
    ("change_color(3, 'blue'), change_size(0, 'small')", BOTH, (0.625, 0.5, 0.25), None),
    ("change_color(5, 'blue'), change_size(6, 'large')", BOTH, (0.25, 0, -0.5), None),
    ("change_shape(2, 'cube'), change_material(0, 'metal')", BOTH, (0, 0, 0), None),
    (f"{RED}, {BOTH}", BOTH, (2 / 3, 2 / 3, 2 / 3), None),
    (", ".join([RED] * 4), BOTH, (0.125, 0.125, 0.125), None),
    (f"foo(1, bar), {BOTH}", BOTH, (2 / 3, 2 / 3, 2 / 3), None),
    (BOTH.replace("red", "pink"), BOTH, (0.75, 0.5, 0.375), None),
    ("change_position(1, 'front_right')", "change_position(1, 'front_left')", (0.5, 0, -0.25), None),
    ("change_position(1, 'front-left')", "change_position(1, 'front_left')", (1, 1, 1), (0, 0, 0)),
    ("change_color(object_2, 'red')", RED, (0.5, 0, -0.25), None),
    ("Change_Color(2, 'Red')", RED, (1, 1, 1), (0, 0, 0)),
    ("change_color(2 , 'red')", RED, (1, 1, 1), (0, 0, 0)),
    ("change_color(2, 'red' )", RED, (1, 1, 1), (0, 0, 0)),
    (RED, f"{BOTH}, change_shape(1, cube), change_shape(3, cube)", (0.25, 0.25, 0.25), None),
    (f"{BOTH}, change_shape(1, cube), change_shape(3, cube)", RED, (0.25, 0.25, 0.25), None),
    ("none", BOTH, (0, 0, 0), None), ("", BOTH, (0, 0, 0), None), (RED, "none", (0, 0, 0), None),
    ("change_color(0, red), change_color(0, blue)", "change_color(0, green), change_color(1, blue)",
     (0.5, 0, -0.25), None),  # the released code: that or (0.375, 0, -0.375), by hash seed
    ("change_color(0, blue), change_color(0, red)", "change_color(0, green), change_color(1, blue)",
     (0.5, 0, -0.25), None),  # the released code: as above
    (f"{RED}, {RED}", f"{RED}, {RED}", (1, 1, 1), (0.5, 0.5, 0.5)),  # one gold, two equal moves
]


def calls(gold):
    return record(gold, "calls", task="transform")


@pytest.mark.parametrize("answer, gold, values, released", CALL_TABLE)
def test_function_rewards(answer, gold, values, released):
    for text in (tagged(answer), tagged(f"\n{answer}\n", "change_color(2, 'blue')"), answer, box(answer)):
        got = [rewards.REWARDS[f"functions{mode}"](text, calls(gold)) for mode in ("", "_full", "_penalty")]
        assert got == pytest.approx(values) and values != released
        assert rewards.accuracy(text, calls(gold)) == (values[0] == 1)


@pytest.mark.parametrize("response, gold, value, released", [  # released: training, evaluation
    (tagged("none", BOTH), BOTH, 0, (0, 0)), (f"<think>{BOTH}</think>", BOTH, 0, (1, 1)),
    (f"<think>{BOTH}</think> {RED}", BOTH, 0.5, (2 / 3, 1)), (BOTH, BOTH, 1, (1, 1)),
    (f"<answer>change_size(0, 'small')</answer><answer>{RED}</answer>", BOTH, 0.5, (0.5, 0.5)),
    (f"<answer>change_color(2, 'blue')</answer><answer>{RED}</answer>", RED, 1, (0.5, 0.5)),
    (tagged(f"\n{RED}\n", "change_color(2, 'blue')"), RED, 1, (1, 0.5)),
    (f"The answer is:\n{BOTH.replace('), ', ')' + chr(10))}", BOTH, 1, (1, 1)),
    (tagged("\n".join([RED] * 20)), RED, 0.05, (0.05, 1)), (f"答案是{RED}", RED, 1, (0, 0)),
])
def test_calls_are_read_from_the_answer(response, gold, value, released):
    assert rewards.functions(response, calls(gold)) == pytest.approx(value)
    assert rewards.accuracy(response, calls(gold)) == (value == 1)


@pytest.mark.parametrize("answer, gold", [("none", "none"), ("", "none"), (f"{RED}, {RED}", RED)])
def test_repeated_and_absent_calls_are_not_accurate(answer, gold):
    assert rewards.accuracy(tagged(answer), calls(gold)) == 0


def best_pairing(got, gold, near, far):
    """Score of the best assignment, by trying all: unequal calls of one function may not be left unpaired."""
    def weight(a, b):
        return 0 if a[0] != b[0] else near if a[1] == b[1] or a[2] == b[2] else far
    rest, missed = [c for c in got if c not in gold], [c for c in gold if c not in got]
    short, long = sorted((rest, missed), key=len)
    totals = [(sum(a[0] == b[0] for a, b in zip(short, order)), sum(map(weight, short, order)))
              for order in itertools.permutations(long, len(short))]
    return (len(got) - len(rest) + max(totals)[1]) / max(len(got), len(gold))


def test_calls_are_paired_the_best_way_whatever_their_order():
    rng = random.Random(0)
    pool = [(func, which, value) for func in ("f", "g") for which in "012" for value in "abc"]
    write = "{0[0]}({0[1]}, {0[2]})".format
    for _ in range(400):
        got, gold = (rng.sample(pool, rng.randint(1, 5)) for _ in range(2))
        for mode, near, far in (("", 0.5, 0.25), ("_full", 0, 0), ("_penalty", -0.25, -0.5)):
            score = rewards.REWARDS[f"functions{mode}"]
            text = tagged(", ".join(map(write, got)))
            assert score(text, calls(", ".join(map(write, gold)))) == pytest.approx(
                best_pairing(got, gold, near, far))


@pytest.mark.parametrize("text, marks, released", [
    ("First, a. Next, b. Finally, c.", 3, 3), ("Step 1: x", 1, 1), ("1. a\n2. b\n3. c", 3, 1),
    ("so\n- a\n* b", 2, 2), ("- a", 1, 0), ("Step 1: x\nStep 2: y\nStep 3: z\nStep 4: w", 3, 3),
    ("first, next", 0, 0), ("It is 3.", 0, 0), ("", 0, 0),
])
def test_steps(text, marks, released):
    assert rewards.steps(text, record("1")) == pytest.approx(marks / 3)
    assert released <= marks  # its code looks for a number at the start of the text alone


# ----- composition

def test_reward_spec():
    assert rewards.parse_reward_spec("accuracy=1, format=0.5") == {"accuracy": 1.0, "format": 0.5}
    assert rewards.parse_reward_spec("format") == {"format": 1.0}


@pytest.mark.parametrize("spec, words", [
    ("acuracy=1", "'accuracy'"), ("accuracy=1,fmt=1", "'format'"), ("accuracy=one", "bad weight 'one'"),
    ("accuracy=", "bad weight"), ("accuracy=nan", "bad weight"), ("accuracy=inf", "bad weight"),
    ("", "unknown reward ''"), ("format=1,format=2", "twice"),
])
def test_reward_spec_errors(spec, words):
    with pytest.raises(ValueError, match=words):
        rewards.parse_reward_spec(spec)


# ----- where and on what it runs

CASES = [("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}"), ("x^2-1", "(x-1)(x+1)"), ("(0,9)", "[0,9)"),
         ("2", "9^{9^{9^9}}")]


def test_threads_and_processes_agree_with_the_main_thread():
    here = [rewards.accuracy(box(answer), record(gold)) for gold, answer in CASES]
    with ThreadPoolExecutor(2) as pool:
        there = list(pool.map(lambda case: rewards.accuracy(box(case[1]), record(case[0])), CASES))
    assert there == here == [1, 1, 0, 0]
    code = ("import rewards; "
            "print([rewards.accuracy('\\\\boxed{%s}' % a, {'answer': g, 'answer_type': 'math'}) "
            f"for g, a in {CASES!r}])")
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert child.stdout.strip() == str(here)


BOMBS = [
    "9^{9^{9^9}}", "9^9^9^9", "9**9**9**9", "100000000!", "9!!!!!!", "(9!)!", "9" * 5000, "1e999999999",
    "10^{-999999}", "10^{99!}", "\\sum_{k=1}^{10000} k^k", "\\int e^{x^2}", "\\binom{99999}{4444}",
    "\\sqrt{" * 5000, "{" * 20000, "}" * 20000, "(" * 20000, "\\boxed{" * 20000, "\\frac{" * 3000,
    "<answer>" * 20000, "<think>" * 20000, "the answer is " * 20000, "x = " * 20000, "wait " * 20000,
    "1," * 20000, "1 " * 20000, "A " * 20000, "A, " * 60, "(A) " * 2000,
    "$" * 20000, "\\text{" * 5000, "\\" * 20000, "^" * 20000,
    "x" * (1 << 20), "\n" * (1 << 20), " " * (1 << 20), "nan", "inf", "-inf", "\x00\ud800",
    "1/0", "\\frac{1}{0}", "0^{-1}", "0/0", "٣", "²", "1e-99", "((x+1)^{99}+1)^{99}", "\\tan(x)" * 20,
    "+".join("abcdefghij" * 9), "\\begin{pmatrix}" * 12, "[1,2]\\cup" * 20,
    "\\boxed{3}, " * 10_000, "\\boxed{" * 14_000 + "3" + "}" * 14_000, "Wait, " * 17_000, "ß" * 100_000,
    "<think>" + "x" * 100_000 + "</think><answer>3</answer>", "<think><answer>" * 7000 + "3</answer></think>",
    "<think>x</think><answer>" + "3 " * 50_000 + "</answer>",
    "change_color(2, red)" * 20_000, "a(1,b)" * 20_000, "a(" * 20_000, "a(1," + " " * 20_000,
    "a(1,' b " * 9_000, "".join(f"change_color({i},c{i})" for i in range(2000)),
    "</think> " * 20_000, "\n1." * 20_000,
]
RANGES = {"vl_rethinker": (-0.1, 1.1), "functions": (0, 1), "functions_penalty": (-0.5, 1), "numeric": (0, 1),
          "functions_full": (0, 1), "steps": (0, 1), "agreement": (0, 1), "rise": (0, 1),
          "detection_legacy": (0, 1), "grounding_legacy": (0, 1), "distribution_legacy": (0, 1),
          "distribution_format": (0, 1), "grounding_giou": (0, 2), "visual_rft_iou": (0, 1),
          "visual_rft_conf": (0, 1)}


def hostile(rng):
    """A bomb or a random mixture of the pieces answers are made of, in a box, a tag, prose or nothing."""
    pieces = ["\\frac", "\\sqrt", "{", "}", "(", ")", "^", "_", "!", "9", "12", "x", "y", "+", "-", "*",
              "/", "=", "<", "\\pi", "\\sin", ",", " or ", "A", "(B)", "%", "\\%", "\\cup", "[", "]",
              "\\le ", "$", "\\boxed{", "<answer>", "</answer>", "e", ".", "\n"]
    body = rng.choice(BOMBS) if rng.random() < 0.2 else "".join(rng.choices(pieces, k=rng.randrange(1, 40)))
    frames = ["{}", "\\boxed{{{}}}", "<answer>{}</answer>", "<think>{}</think><answer>3</answer>",
              "the answer is {}."]
    return rng.choice(frames).format(body)


def test_hostile_text_is_graded_in_bounded_time():
    rng = random.Random(0)
    golds = [record("3", "number"), record("x^2+1"), record("\\sqrt{3}"), record("(1,2)"), record("x<3"),
             record("cat", "text"), record("A", "choice", choices=["3", "4"]),
             record("[[0, 0, 9, 9], [2, 0, 500, 70.5]]", "boxes"), record('{"joy": 1}', "distribution"),
             calls("change_color(2, red), change_color(3, red), change_color(2, blue), change_size(0, x)")]
    texts = [wrap.format(bomb) for bomb in BOMBS for wrap in ("{}", "\\boxed{{{}}}")]
    texts += [hostile(rng) for _ in range(800)]
    for i, text in enumerate(texts):
        for gold in golds if i < 2 * len(BOMBS) else [golds[i % len(golds)]]:
            for name, reward in rewards.REWARDS.items():
                start = time.process_time()  # seconds of this process, however busy the machine
                score = reward(text, gold)
                assert time.process_time() - start < 1, (name, text[:200])
                low, high = RANGES.get(name, (0, 1))
                assert low <= score <= high, (name, text[:200])
                assert name in RANGES or score in (0.0, 1.0), (name, text[:200])
