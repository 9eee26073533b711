r"""Text in, numbers out: prompts, answer extraction, grading, rewards. A leaf: imports no other file.

Every reward is `(response: str, record: dict) -> float`. The response is hostile input, because RL finds
every hole: no reward raises, hangs (formulas get a second, in a process that is killed then), or returns NaN,
whatever the model wrote. The record is trusted: data_prep, whose docstring names its fields, checks it on
load. The training loop adds what it knows of the response: truncated? (cut at the length limit), forced?
(made to rethink).

From a question to a reward:
  1. build_prompt: the template of the record's task, else of its answer type. It promises a form of answer.
  2. extract_answer: last <answer> tag, else last \boxed{}, else "the answer is ...", else the bare text.
     Tag and box are read strictly: one answer, nothing else. Prose, or a sentence in a slot, is read for its
     conclusion, without reasons, conditions and questions. What breaks off in mid-sentence has none.
  3. accuracy: compares letters, exact values, normalised words or calls; what is left goes to math-verify.
  4. REWARDS: accuracy, formats, and what the papers reward instead; parse_reward_spec reads their weights.

Conventions, where graders disagree: the last tag wins, the last box (boxes side by side are one list), a tag
over a box outside it, and a letter over the option text beside it; degree signs, labels ("Area =") and units
are ignored, but two units of a kind convert (2 km, 2000 m); 50% equals 50 and 0.5 (but 50 is not 0.5), 2
million 2 and 2000000; "not 5", "more than 5" and hedges ("A or B") say nothing; with `precision` half a unit
of the last decimal is allowed, else integers are exact, others agree to six digits; "√3 ≈ 1.73" is both;
sets and calls ignore order; spelled-out counts are numbers in prose only, and yes or no the question's words.
"""
import contextlib
import difflib
import functools
import gc
import itertools
import json
import logging
import math
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from fractions import Fraction

ANSWER_TYPES = ("choice", "number", "math", "text", "calls", "boxes", "distribution")
LONGEST = 200  # characters of an answer: more in a tag or box is prose
TAIL = 4000  # characters of a response that are read: answers come last, and it bounds the regexes

# ----- prompts: beside the parsers, since each template promises a form that extract_answer reads back

SCENE_RULES = """\
The first picture shows a scene at the start, the second one the same scene at the end, perhaps from another
side. Below, every object at the start is written as (object_id, shape, size, color, material).
Find out what was done to the objects. One to four of these functions turn the first scene into the second:
change_shape(object_id, value): cube, sphere or cylinder
change_size(object_id, value): small, medium or large
change_color(object_id, value): yellow, gray, cyan, blue, brown, green, red or purple
change_material(object_id, value): glass, metal or rubber
change_position(object_id, value): where the object went from where it stood, as the first picture shows it:
front: nearer to the viewer
behind: farther from the viewer
left: to the left
right: to the right
front_left: nearer and to the left
front_right: nearer and to the right
behind_left: farther and to the left
behind_right: farther and to the right"""

FORMS = {
    "choice": "the letter of the option you choose",
    "number": "the resulting number",
    "math": "the result, as a number or in LaTeX,",
    "text": "the answer, in a few words,",
    "calls": "the function calls, separated by commas,",
    "boxes": "all boxes, as [[x1, y1, x2, y2], ...] on a scale from 0 to 1000,",
    "ground": "one box, as [x1, y1, x2, y2] on a scale from 0 to 1000,",
    "distribution": "the probabilities, as a JSON object whose values add up to 1,",
}
PROMPTS = {
    "plain": "{question}",
    "counting": "{question} Think inside <think> </think>, then give the number inside <answer> </answer>.",
    **{name: "{question}\nWork it out step by step between <think> and </think>. Then write only " + form
       + " between <answer> and </answer>." for name, form in FORMS.items()},
    "boxed": "{question}\n\nSolve this step by step and close with the result in \\boxed{}.",
    "rethink": "{question}\n\nGuidelines: go one step at a time. Every few steps, stop and doubt what you"
               " have: ask whether it can be right, check it against the question and the picture, and"
               " repair what does not hold, opening such a pause with a word like \"wait\", \"hmm\" or"
               " \"alternatively\". Close with the result in \\boxed{}.",
    "pictured": "The picture shows a question. Work it out step by step between <think> and </think>."
                " Then write only its answer between <answer> and </answer>.",
    "pictured_choice": "The picture shows a question and its options. Work it out step by step between"
                       " <think> and </think>. Then write only the letter of the option you choose between"
                       " <answer> and </answer>.",
    # Reason-RFT's tasks (arXiv 2503.20752), reasoned or answered at once (_answer)
    **dict.fromkeys(["counting_answer", "structure_answer"], "{question} Give only the number."),
    "structure": "{question} Think inside <think> </think>, then give the number inside <answer> </answer>.",
    "structure_choice": "{question}\nThink inside <think> </think>, then give the letter of the right option"
                        " inside <answer> </answer>.",
    "structure_answer_choice": "{question}\nGive only the letter of the right option.",
    "transform": SCENE_RULES + "\n\n{question}\n\nThink inside <think> </think>, then give only the function"
                 " calls, separated by commas, inside <answer> </answer>.",
    "board": "{question} Think inside <think> </think>, then give the calls inside <answer> </answer>.",
    "board_answer": "{question} Give only the calls.",
    "transform_answer": SCENE_RULES + "\n\n{question}\n\nGive only the function calls, separated by commas.",
    "transform_caption": SCENE_RULES + "\n\n{question}\n\nSay inside <summary> </summary> how you will"
                         " go about it and inside <caption> </caption> what both pictures show. Then think"
                         " inside <think> </think> and give only the function calls, separated by commas,"
                         " inside <answer> </answer>.",
    # RISE's two hops (arXiv 2508.13229)
    "cot": "{question}\n\nThe answer is known to be {answer}\nIn at most 100 words, tell what in the picture"
           " shows it: things, shapes, textures, colors, surroundings. Somebody else has to find the answer"
           " from your text, so do not give it away: no coordinates, no probabilities, no class names.",
    "reconstruct": "{question}\n\nSomebody looked at the picture and wrote:\n{rationale}\n\nFrom this, write"
                   " only {form} between <answer> and </answer>.",
}
HAS_OPTIONS = re.compile(r"\(A\)[\s\S]*\(B\)|^\s*A\s*[.:)]|(?i:\b(?:choice|option)s?\s*:)", re.MULTILINE)


def build_prompt(record: dict) -> str:
    """User text of a record: its task's template, for options if there are any, else its answer type's."""
    question, choices = record["question"], record.get("choices") or []
    listed = HAS_OPTIONS.search(question) and all(choice in question for choice in choices)
    if choices and not listed:
        question += "".join(f"\n({chr(65 + i)}) {choice}" for i, choice in enumerate(choices))
    task = record.get("task")
    # the gold answer, by which Reason-RFT decides how to ask, would give itself away
    variant = f"{task}_choice" if HAS_OPTIONS.search(question) else task
    template = PROMPTS.get(variant) or PROMPTS.get(task) or PROMPTS[record["answer_type"]]
    return template.replace("{question}", question)  # not str.format: questions are full of braces


# ----- extraction: which part of a response is its answer

ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
BOX_GLUE = re.compile(r"(?:[\s$,;()\\]|q?quad|and\b|or\b|text\{[^{}]{,40}\})+")
CUE = re.compile(r"(?:\b(?:final answer|answers?|ans|correct (?:option|choice)s?|solution|result)\b"
                 r"(?:(?!not\b|n't)[^.:：\n]){,60}?(?:\b(?:is|are|be|equals)\b|[:：=→]|\s-\s)"
                 r"|final answer\s|^\W{,9}answer\W*\n|答案|答[:：]|结果|选(?!项)|\A(?=[-\d./]{1,20}\n+[A-Z])"
                 r"|\b(?:wait|actually|correction|on second thought)\b)[\s,:：=】是为]*(?:\\\[|\$\$)?\s*",
                 re.IGNORECASE + re.MULTILINE)
CUED_AFTER = re.compile(r"(?im)^(?:.*\. )?(?:so|thus|hence|therefore)?,?\s?(?!this|that|it|.{,40}answer is)"
                        r"(\S.{,60}?) is (?:the|our|my) (?:\w+ )?(?:answer|choice|option)\b")
SAID = re.compile(r"\b(?:is|are|was|were|choose|wait)\b", re.IGNORECASE)
BOLD = re.compile(r"(?<![\w)}\]])\*\*|\*\*(?![\w(-])|</s>")
# reasons, conditions and questions, whose numbers are not the answer
ASIDE = re.compile(r"(?<=[\w)\]}$%°,])\s(?:(?:because|since|assuming)\b(?:[^.!?;\n]|\.(?=\S))*"
                   r"|(?:whether|if|when|where)\b(?:[^.,!?;\n]|[.,](?=\S))*|\([^()]{,40}rounded[^()]*\))"
                   r"|(?<![^.!?\n])[^.!?\n]+\?(?=\s|$)", re.IGNORECASE)
SENTENCE_END = re.compile(r"(?<!\b[A-K])(?:[.?]|(?<!\d)!)(?=\s|$)|[。；]|．(?!\d)|，(?!-?\d)|\n|\"\s*\}")
UNFINISHED = re.compile(r"<think>|\b(?:an|the|that|this|[Tt]hen|need to|of|in|with|and|or|we|is|are)\s*$")


def extract_answer(response: str) -> str | None:
    """The answer a response commits to, as written (tag, box, clause or bare text), or None."""
    return _find_answer(response)[0] or None


def _find_answer(response: str) -> tuple[str, str]:
    """(answer, the prose it is from). Prose is "" for a slot, unless that holds a sentence."""
    slot = _slot(response)
    text = response.rpartition("</think>")[2][-TAIL:] if slot is None else slot
    text = BOLD.sub("", text).strip()
    if slot is not None and len(text) <= LONGEST and not (CUE.search(text) or SAID.search(text)):
        return text, ""
    prose = CUED_AFTER.sub(r"answer: \1", ASIDE.sub("", text)).strip()
    cues = [m.end() for m in CUE.finditer(prose) if m.end() < len(prose)]
    if UNFINISHED.search(prose) and not cues:
        return "", ""
    return SENTENCE_END.split(prose[cues[-1]:], maxsplit=1)[0].strip() if cues else prose, prose


def _slot(response: str) -> str | None:
    """Content of the last answer tag, or of the last box in it, or without a tag anywhere; or None."""
    text = response[-TAIL:]
    tags = ANSWER_TAG.findall(text)
    boxed = _last_box(tags[-1] if tags else text)
    return boxed if boxed is not None else tags[-1] if tags else None


def _last_box(text: str) -> str | None:
    r"""Content of the last \boxed{}, or of the list it ends; "" if it is never closed; None without box."""
    run = []
    for opened in reversed(re.split(r"\\boxed\s*\{", text)[1:]):
        braces = [*re.finditer(r"(?<!\\)[{}]", opened)]
        depths = itertools.accumulate(1 if brace[0] == "{" else -1 for brace in braces)
        end = next((brace.start() for brace, depth in zip(braces, depths) if depth < 0), None)
        if end is None or run and not BOX_GLUE.fullmatch(opened, end + 1):
            break
        run.insert(0, opened[:end].strip())
    return ", ".join(dict.fromkeys(run)) if run or r"\boxed" in text else None


# ----- notation: one spelling for what can be written in many ways

# what Unicode's own compatibility forms leave as it is
MACROS = r"\le \ge \neq \pi \pm \infty \cup \in \times \cdot \cdot".split()
SYMBOLS = str.maketrans("−–—‐⁄∶掳≈≃", "----/:°==")
SYMBOLS |= {ord(sign): f"{macro} " for sign, macro in zip("≤≥≠π±∞∪∈×·⋅", MACROS)}
LATEX = [(re.compile(pattern), repl) for pattern, repl in (
    (r"\\[dtc]frac", r"\\frac"), (r"\*\*", "^"), (r"\\mathrm\s*\{([a-zA-Z])\}", r"\1"),  # e, i, d: no units
    (r"(?:√|(?<![\\a-z])sqrt)\s*(?:(\d+|[a-z]\b)|\(([^()]*)\))?",
     lambda m: rf"\sqrt{{{m[1] or m[2]}}}" if m[1] or m[2] else r"\sqrt"),
    (r"\\frac\s*(\d)", r"\\frac{\1}"), (r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),
    (r"\\varnothing|∅", r"\\emptyset"), (r"\\([lg]eq)slant", r"\\\1"), (r"\\[\[\]]|\$\$", " "),
    (r"(?<![\\A-Za-z])(log|ln|sin|cos|tan|pi)(?![A-Za-z])", r"\\\1"),
    (r"\bx_\{?\d\}?\s*=", "x ="), (r"(?<=\d)(?: ?\n{1,3}|\|)(?=-?\d)", ", "),
)]
WORDS = {word: i for i, word in enumerate("""zero one two three four five six seven eight nine ten eleven
    twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty""".split())}
WORDS |= {f"{ten}ty": 10 * i for i, ten in enumerate("thir for fif six seven eigh nine".split(), 3)}
COUNT = rf"(?:{'|'.join(sorted(WORDS, key=len, reverse=True))})"
COUNTS = re.compile(rf"(?<!\d )\b{COUNT}(?:[\s-](?:hundred(?: and)?|{COUNT}))*\b", re.IGNORECASE)
NOTATION = [(re.compile(pattern, re.ASCII), repl) for pattern, repl in (
    (r"(?:(?<=\d)\s*(?:\\,)?(?:\\times|\\cdot|[x*])\s*(?:\\,)?|(?<![\w.^}\\]))"
     r"10\s?\^\s?(?:[{(]\s?([-+]?\d{1,3})\s?[})]|([-+]?\d{1,3}))(?!\d|\.\d)",
     lambda m: ("" if m[0][0] != "1" else "1") + "e" + (m[1] or m[2])),
    (r"\\(?:text(?:bf)?|math(?:rm|bf)|boldsymbol|mbox|operatorname)\s*\{((?:[^{}]|\{[^{}]*\})*)\}", r" \1 "),
    (r"(\d)\s*(?=\\frac\s*\{\s*\d+\s*\}\s*\{\s*\d+\s*\})", r"\1 "),
    (r"(?<![\w})^/])\\frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}", r"\1/\2"),
    (r"\^\s*\{?\s*(?:\\circ|∘)\s*\}?|\\degree|°|\{?\bdegrees?\b\}?", ""),
    (r"(?<![\d.,])[1-9]\d{,2}([, ]|\\[,;:! ]|,\\!|\{,\})\d{3}(?:\1\d{3})*(?!,?\d)",
     lambda m: m[0].replace(m[1], "")),
    (r"\\(?:left|right|[,!;:()\[\] $])|[$*`~]|__|\\q?quad", " "),
    (r"\s?\\?%|\s(?:percent|per cent|pct)\b", "%"), (r"\b([apAP])\.\s?([mM])\b\.?", r"\1\2"),
    (r"\\approx\b\s*", "="), (r"\\mu\b\s*", "μ"), (r"\\Omega\b\s*", "Ω"),
    (r"\b(?:negative|minus)\s(?=\.?\d|" + COUNTS.pattern + ")", "-"),
    (r"(?<![\w./^])(\d{1,6}) (?:and )?(\d{1,6})/(\d{1,6})(?![\d/])",
     lambda m: f"{int(m[1]) * int(m[3]) + int(m[2])}/{m[3]}"),
)]
# what SYMBOLS, LATEX and NOTATION rewrite, in brief
DRESSED = re.compile(r"[^\x00-\x7f]|[\\^$*`~{%]|\d[\s,]\d|degree|per ?cent|pct|sqrt|pi\b|negat|minus"
                     r"|\.\s?[mM]\b|log|ln|sin|cos|tan")
# a number that no longer number or formula goes on from, such as 2\sqrt{3}, 2x, 2+3i or 10:30
DIGITS = (r"(?:\d{1,30}(?:\.\d{1,30})?|\.\d{1,30})(?:[eE][-+]?\d{1,3})?(?:/\d{1,15})?"
          r"(?![\d/_]|[.:]\d|\^|[a-bd-fijnp-rt-z]\b|\s?\\(?:sqrt|pi|frac)|\s?[-+]\s?(?:\\|\d*[a-z]\b))")
NUMBER = r"(?<![\w.{^])(?<!\d:)(?:[-+]|(?<![\w)%] )[-+]\s)?[€£¥]?" + DIGITS  # no sign in "7 - 2"
SCALES = {"%": Fraction(1, 100), "thousand": 10**3, "million": 10**6, "billion": 10**9,
          "trillion": 10**12, "万": 10**4, "亿": 10**8}
# each kind of unit has a factor of its own: kg convert to g, yet to no number and to no m
SCALES |= {prefix + unit: 7**(20 + i) * Fraction(10)**power
           for i, unit in enumerate("m g L J V A W N F s Hz Pa eV".split())
           for prefix, power in zip(("", *"nμmckM"), (0, -9, -6, -3, -2, 3, 6))}
TIMES = {"sec": 1, "second": 1, "min": 60, "minute": 60, "h": 3600, "hr": 3600, "hour": 3600, "day": 86400}
SCALES |= {word + s: SCALES["s"] * seconds for word, seconds in TIMES.items() for s in ("", "s")}
SCALE = rf"(?:\s?({'|'.join(SCALES)})(?![A-Za-z/]|\s?(?:\^|\\cdot)))?"
UNIT_NAME = (r"(?:[cdkmμnpMGT]?(?:[gslLmhACFHJKNTVWΩ]|Hz|Pa|Wh|cal|eV|mol)|(?![或到])[\u4e00-\u9fff]+"
             r"|(?<=[\s/(])(?!and\b|or\b|plus\b|minus\b|times\b)[A-Za-z]{2,})"
             r"(?:(?:\s?\^)?\{?-?[1-4]\}?)?(?![A-Za-z])")
MEASURE = re.compile(rf"({NUMBER}){SCALE}"
                     rf"(?:\s?{UNIT_NAME}(?:(?:\s?(?:/|\\cdot)\s?\(?|\.?\s){UNIT_NAME}){{,3}}\)?)?", re.ASCII)
STATED = re.compile(r"\b(?:is|are|was|were|be|equals?)\b(?:an?\b|total|of|about|approximately|only|[^\w.+-])*"
                    rf"((?:[-+]\s?)?[€£¥]?{DIGITS}){SCALE}", re.ASCII)
INEQUALITY = r"\\(?:leq?|geq?|lt|gt)(?![a-z])|[<>]"
# what makes a formula or a hedge of the words around a number
FORMULA = re.compile(r"[\\^*+=<>/|\d!]|\b[a-zA-Z]\s?#|#\s?[a-zA-Z]\b|-\s?#|#-|\b(?:not?|or|minus|plus)\b")
REFUTED = re.compile(r"(?:(?i:(?:\b|can)not(?: be| equal to)?|n't|\b(?:(?:rather )?than|instead of|up to"
                     r"|at least|at most))\s|不是|[大小]于)(?i:option )?(?:-?\d[\d,.]*\b|\(?[A-K](?![A-Za-z])\)?)"
                     r"(?:,? but\b)?|\(?\b[A-K]\)? (?:(?:is|does) (?:wrong|incorrect|not)|can be)\b")
NEGATION = re.compile(r"\b(?:not|no|cannot|unable|impossible|unclear|without)\b|n't", re.IGNORECASE)
REFUSAL = re.compile(r"can(?:no|')t|unable to|impossible|insufficient|without |none of|no (?:info|option)"
                     r"|not (?:possible|enough|provide|specif|available|clear|contain|in the)", re.IGNORECASE)
VERB = re.compile(r"(?s).*(?:\b(?:is|are|be|equals|equal to|obtain|get|gives)\b:?|(?<=[a-z]):)\s+"
                  r"((?!equal to)(?:[^a-z].*|[a-z]\b.*))")
ROUNDED = re.compile(r"[\s,(]{,3}(?:\bor |\bwhich is )?(?:≈|\\approx\b|\b(?:about|approximately)\b)\s?")
ASSIGNED = re.compile(r"^(?:(?:[^=\d+*/<>^!-]{1,40}(?:[_ ]?\{?\d\}?)?)?\s?=\s?"
                      r"|(?:[\d\s+*/().-]|\\times|\\cdot){3,60}=\s?(?=[-.\d]))"
                      r"|\s?=\s?[A-Za-z]$")
FILLERS = set("a an the it they this that there its their is are was were be will would can could may to of"
              " than in on at for by with as and or also has have does do".split())
CALL = re.compile(r"\b(\w+)\s*\(\s*(\w+)\s*,[\s\"'`‘’“”]*([\w-]+)[\s\"'`‘’“”]*\)", re.ASCII)
# what a sentence says: "The bar is red", "Yes, it is", "red, not blue"
AROUND = re.compile(r"(?is)^(?!yes\b|no\b).*(?:\b(?:is|are|was|were|be|equals?|to|shows?|at|in|by|year)|:)\s"
                    r"|(?<=^yes),(?! no).*|(?<=^no),(?! yes).*|(?<=\w),? \(?not .*")
LETTER = re.compile(r"(?:(?i:option|choice|answer)s?[\s:]+|[选项]+)?"
                    r"[\[({【]?([A-Z]|[a-z](?=[\])}.:]|$))(?![\w'])((?:[\s.:?)\]}】]|-(?!\S))*)(.*)")
ITEMS = re.compile(r"\s?(?:[,;&、]\s?(?:and\b)?|\band\b)\s?|(?<=[A-K)])\s?(?=\(?[A-K](?![a-z]))")
HEDGE = re.compile(r"(?:^|\b(?:or|and)\s(?:maybe\s|else\s)?|[/,;、或]\s?)\(?[A-K]\)?(?![\w']| [a-z])"
                   r"|\s(?:\([A-K]\)|[A-K][.):])\s?\S")
HEDGED = re.compile(r"(?:\d|\b[A-K])\W{,3}(?:[a-z]{1,9}\W{1,3})?(?:\b(?i:n?or|possibly|perhaps|maybe)\b|[或能])"
                    r"[是为]?\W{,3}(?:[a-z]{1,15}\W{1,3}){,3}(?:\d|[A-K]\b)|\b(?:both|neither)\W{1,3}\d|^or\b"
                    r"|\b(?:between|is|are|be)\W{1,3}[-+\d./]+ and [-+\d./]+$"
                    r"|^\W*(?:is |from )*-?[\d.]+\W?(?:to|到)\W?[\d.]+\W*(?:之间)?$")
ORDINAL = re.compile(r"\b(?i:(first)|(second)|(third)|(fourth)|(fifth)) (?i:option|choice)\b")
LABELLED = re.compile(r"\(([A-K])\)|\b([A-K])\W? (?:fits|matches|is (?:the )?(?:correct|right))\b"
                      r"|^\W*([A-K])(?:[.):]|\W*$)|(?:选项|答案|是|选)\W*为?([A-K])"
                      r"|\b(?i:option|choice|letter|answer)s?\b[^.\n()]{,50}?(?: is:?|:) \W*([A-K])\b"
                      r"|\b(?i:option|choice|choose|select|pick|leaving|\w+ with)\W+([A-K]\b|[a-k](?=\)))"
                      r"|\b(?i:is|be|it's|leaves|so|thus|hence|therefore),? (?:\w+ly )?\W*([A-K])(?=\W*$)")
LISTING = re.compile(r"(?:^|\n)[^\w\n]{,4}A[.):][^\n]{,200}(?:\n[^\w\n]{,4}[B-Z][.):][^\n]{,200})+"
                     r"|\(A\)[^\n]{,80}?\(B\)[^\n]{,80}?\(C\)[^\n]*")  # options repeated, not chosen from


def _spelled(text: str) -> str:
    """Text with one sign for each thing, as ASCII and LaTeX: powers, full-width forms, roots, fractions."""
    text = re.sub(r"[¼-¾⅐-⅞]", r" \g<0>", text.replace("º", "°"))
    text = re.sub(r"[⁰¹²³⁴-⁹⁺⁻]+", r"^{\g<0>}", text)
    text = unicodedata.normalize("NFKC", text).translate(SYMBOLS)
    for pattern, repl in LATEX:
        text = pattern.sub(repl, text)
    return text


@functools.lru_cache(1024)  # golds and options come again with every response of a group
def _plain(text: str) -> str:
    if DRESSED.search(text):
        text = _spelled(text)
        for pattern, repl in NOTATION:
            text = pattern.sub(repl, text)
    text = " ".join(text.split()).lstrip(" ,:;\"'").rstrip(" .,:;\"'。")
    return text if text[1:2].isdigit() else text.lstrip(" .,:;\"'")  # ".5" is a number


def _squeezed(text: str) -> str:
    return re.sub(r"(?<!\d) | (?!\d)", "", text) if " " in text else text


@functools.lru_cache(1024)
def _value(text: str, alone: bool = True) -> tuple | None:
    """(number, what % or a unit makes of 1) of a plain text like "x = 5 km"; if not `alone`, among words."""
    text = ASSIGNED.sub("", text)
    number, around = MEASURE.search(text), MEASURE.sub("#", text, count=1)
    fits = around == "#" if alone else not (FORMULA.search(around) or REFUSAL.search(around))
    if not (number and fits):
        return None
    top, _, bottom = re.sub(r"[^\d./eE+-]", "", number[1]).partition("/")
    divisor = int(bottom or 1)
    return (Fraction(top) / divisor, SCALES.get(number[2], 1)) if divisor else None


def _same_value(got: tuple, gold: tuple, precision: float | None) -> bool:
    """Equal to the record's decimals, else six digits."""
    tolerance = 0 if gold[0].denominator == 1 else max(abs(got[0]), abs(gold[0])) / 10**6
    if precision is not None:
        tolerance = Fraction(1, 2 * 10 ** int(precision))
    return any(abs(x - y) <= tolerance for x, y in _readings(got, gold))


def _readings(got: tuple, gold: tuple) -> list:
    """Pairs of values to compare: a percentage on one side only is that number or that ratio."""
    (x, x_scale), (y, y_scale) = got, gold
    as_written = [(x, y)] if x_scale == y_scale or 1 in (x_scale, y_scale) else []
    return as_written + [(x * x_scale, y * y_scale)]


def _claims(answer: str, prose: str) -> list[str]:
    """Where prose commits itself: the clause after its last cue, then its sentences from the last one on."""
    clauses = ["is " + answer] * (answer != prose) + SENTENCE_END.split(prose)[::-1]
    lettered = [ORDINAL.sub(lambda m: f"option {chr(64 + m.lastindex)}", clause) for clause in clauses]
    return [REFUTED.sub(" ", clause) for clause in lettered]


def _conclusion(answer: str, prose: str) -> str:
    """The number that prose commits to: stated ("there are 3", "is 3"), else the last one of a sentence."""
    if answer == prose and REFUSAL.search(prose[-300:]):
        return ""
    for claim in _claims(answer, prose):
        text = COUNTS.sub(lambda words: _digits(words[0]), _plain(claim).lower())
        if HEDGED.search(text):
            return ""
        text = text.rpartition("=")[2]
        for number in list(STATED.finditer(text))[-1:] or list(MEASURE.finditer(text))[-1:]:
            return text[number.start(1):number.end()]
    return ""


# ----- grading

def accuracy(response: str, record: dict) -> float:
    """1.0 if the response's answer equals the record's or one of meta["accepted"], else 0.0.
    Boxes are right if each gold one has its own at an IoU of 0.5, distributions by the likeliest class."""
    if record["answer_type"] in ANNOTATIONS:
        return float(ANNOTATIONS[record["answer_type"]](response, record))
    answer, prose = _find_answer(response)
    grade = GRADERS[record["answer_type"]]
    sides = [answer] if answer == prose else _sides(answer)
    golds = [record["answer"], *(record.get("meta") or {}).get("accepted", [])]
    right = (grade(side, prose, _gold(gold), record) for gold in golds for side in sides)
    return float(answer != "" and any(right))


def _sides(answer: str) -> list[str]:
    """An answer, and if it is like "√3 ≈ 1.73" both sides of it; two numbers must agree."""
    sides = [side.strip(" )") for side in ROUNDED.split(answer)]
    values = [_value(_plain(side)) for side in sides]
    if len(sides) != 2 or not sides[0]:
        return [answer]
    agree = None in values or abs(values[0][0] - values[1][0]) <= abs(values[0][0]) / 100
    return [answer, *sides] if agree else sides[:1]


def _gold(gold: str) -> str:
    dressed = len(gold) > LONGEST or "<answer>" in gold or gold.count(r"\boxed") == 1
    return dressed and _find_answer(gold)[0] or gold


def _grade_choice(answer: str, prose: str, gold: str, record: dict) -> bool:
    choices = [_fold(choice) for choice in record.get("choices") or []]
    label = _labels(gold, choices)
    if not label:
        return _grade_text(answer, prose, gold, record)
    if prose:
        answer, prose = LISTING.sub("", answer), LISTING.sub("", prose)
    return label == (_labels(answer, choices)
                     or prose and _label_in(answer, prose, choices, record.get("question", "")))


def _labels(text: str, choices: list[str]) -> str:
    """Option letters a short text names ("B", "(b) 3 cm", an option's text, "A, C" -> "AC"); "" if none."""
    plain = REFUTED.sub("", _plain(text)).strip(" ,.()")
    items = {_label(item.strip(" \"'[]{}"), choices) for item in ITEMS.split(plain.strip("[]{}"))}
    return _label(plain, choices) or ("".join(sorted(items)) if all(items) else "")


def _label(item: str, choices: list[str]) -> str:
    """The option letter that a text names, by letter, text or both, if it names one; else ""."""
    if named := LETTER.fullmatch(item):
        letter, gap, rest = named.groups()
        at = ord(letter.upper()) - 65
        beside = not rest or at < len(choices) and _same_words(_fold(rest).strip("()"), choices[at])
        if at < (len(choices) or 26) and (beside or gap.strip(" -") and not HEDGE.search(rest)):
            return letter.upper()
    said = _fold(item)
    order = sorted(range(len(choices)), key=lambda i: choices[i] != said)  # as written, else by value
    return next((chr(65 + i) for i in order if _same_words(said, choices[i])), "")


def _label_in(answer: str, prose: str, choices: list[str], question: str) -> str:
    """The option letter that prose commits to, by letter, else by its value or text."""
    if HEDGED.search(answer[:60]) if answer == prose else HEDGE.search(answer, 1):
        return ""
    claims = _claims(answer, prose)
    for claim in claims:
        named = [m[m.lastindex] for m in LABELLED.finditer(unicodedata.normalize("NFKC", claim))]
        if named and ord(named[-1].upper()) - 65 < (len(choices) or 11):
            return named[-1].upper()
    if all(map(_value, choices)):
        return _label(_conclusion(answer, prose), choices)
    if REFUSAL.search(prose[-300:]):
        return "".join(chr(65 + i) for i, choice in enumerate(choices) if REFUSAL.search(choice))[:1]
    texts = "|".join(sorted(map(re.escape, filter(None, choices)), key=len, reverse=True))
    for claim in map(_fold, claims):
        if hits := re.findall(rf"(?<![\w.])(?:{texts})(?!\w|\.\d)", claim):
            hedge = len(set(hits)) > (1 if " or " in claim else max(len(choices) - 1, 2))
            return "" if hedge else chr(65 + choices.index(hits[0]))
    told = [(_content(claim), bool(NEGATION.search(claim))) for claim in claims]
    if sorted(choices) == ["no", "yes"]:  # then a sentence in the question's words is a yes
        asked = _content(question)
        said = [negated for words, negated in told if len(asked & words) > len(asked) / 2]
        return chr(65 + choices.index("no" if said[0] else "yes")) if said else ""
    return next((chr(65 + i) for words, negated in told for i, choice in enumerate(choices)
                 if _content(choice) <= words and not negated), "")


def _content(text: str) -> set[str]:
    """Beginnings of the words that carry a text's meaning."""
    return {word.rstrip("s")[:6] for word in re.findall(r"\w+", text.lower()) if word not in FILLERS}


def _fold(text: str) -> str:
    """Text reduced to its words: case, articles, punctuation and LaTeX dressing do not matter."""
    # a capital A further in is a name: "sample A has"
    plain = re.sub(r"\b(?:a|an|An|the|The)\s|^A\s|[\"'“”{}]", "", _plain(text))
    bare = re.sub(r"^\(([^()]*)\)$|^\[([^\[\]]*)\]$", r"\1\2", plain.lower().strip(" .,:;!?"))
    return bare or text.strip()  # "." is not "?", whatever is left of them


def _grade_math(answer: str, prose: str, gold: str, record: dict) -> bool:
    got, want = _plain(answer) or answer, _plain(gold) or gold  # "." is not "?", whatever is left of them
    if _squeezed(got) == _squeezed(want):
        return True
    if "=" in got and "=" in want and {got[0], want[0]} == {"x", "y"}:
        return False  # x = 5 and y = 5 are two lines
    if (want_value := _value(want)) and (got_value := _number(answer, prose)):
        return _same_value(got_value, want_value, record.get("precision"))
    if prose and REFUSAL.search(prose[-300:]):
        return False
    if want_value or record["answer_type"] == "number":
        return answer != prose and bool(re.search(r"[\\^*]|\d\s?=", got)) and _same_formula(answer, gold)
    return _same_formula(answer, gold)


def _number(answer: str, prose: str) -> tuple | None:
    plain = REFUTED.sub("", _plain(answer))
    return _value(plain) or (_value(_conclusion(answer, prose)) if prose else _value(plain, alone=False))


def _same_formula(answer: str, gold: str) -> bool:
    exact = ROUNDED.split(REFUTED.sub(" ", answer))[0] or answer
    got, want = _spelled(exact).strip(" .,\n").removeprefix(r"\(").removesuffix(r"\)"), _spelled(gold)
    if stated := VERB.match(got):
        return _grade_math(stated[1], "", want, {"answer_type": "math"})
    if "=" in got and "=" in want and re.search(r"\\frac\s*\{d|'", got + want):
        return False  # derivatives are not to be solved for
    if re.search(INEQUALITY, got) and not re.search(INEQUALITY, want):
        got, want = want, got  # math-verify takes an interval for the answer to an inequality, not vice versa
    return _math_equal(got, want)


def _grade_text(answer: str, prose: str, gold: str, record: dict) -> bool:
    said = answer, AROUND.sub("", answer)
    return any(_same_words(_fold(text), _fold(gold), record.get("precision")) for text in said)


def _same_words(said: str, want: str, precision: float | None = None) -> bool:
    values = _value(said), _value(want)
    return _squeezed(said) == _squeezed(want) or bool(all(values) and _same_value(*values, precision))


def _grade_calls(answer: str, prose: str, gold: str, record: dict) -> bool:
    want = _calls(gold)
    return bool(want) and sorted(_calls(prose or answer)) == sorted(want)


def _calls(text: str) -> list[tuple[str, str, str]]:
    """(function, object id, value) of every call in a text; a made-up function is a wrong call, not none."""
    return [(func, which, value.replace("-", "_")) for func, which, value in CALL.findall(text.lower())]


# ----- symbolic equality, by a process that can be killed: no look at a formula tells what it will cost

# towers, factorials of factorials and endless numbers, which would only waste the judge's second
HOPELESS = re.compile(r"\d{16}|!\s*!|\d{4}\s*!|\de[-+]?\d{3}|\^\s*\{?\s*[-+]?\d{4}|\^[^+=,]*\^[^+=,]*\^")
WORD_LABEL = re.compile(r"^[\s$]*(?:\\text\s*\{[^{}]*\}|[A-Za-z][A-Za-z. ]{2,40}|[a-z]\s*\([a-z]\))?[\s$]*=")
UNIT_TAIL = re.compile(
    r"(?<=[\w}).])(?:[\s~$,]|\\[,; ])*(?:\\(?:text|mathrm|mbox)\s*\{[\s~]*(?!and\b|or\b)[A-Za-z/ ]+\}"
    r"|(?<![\\a-z])\{?(?:(?:square|cubic|sq\.?)\s?)?(?:units?|[cdkm]m|inches|feet|liters?)(?![A-Za-z])\}?)"
    r"[\s$]*(?:\^\s*\{?[23]\}?|[²³])?[\s$.]*$")


def _marked(text: str) -> str:
    """Text as math-verify wants it: formulas in $..$, unless words show that it must look for them itself."""
    text = UNIT_TAIL.sub("", WORD_LABEL.sub("", text))
    text = re.sub(r"(?<=\d)([A-Za-z])(?=[A-Za-z]\b)", r"\1\\cdot ", text)  # 2ab is no 2 in a unit
    prose = len(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", text)) > 2
    return text if prose or re.search(r"\$.*\$|\\[(\[]|\\boxed", text) else f"${text.replace('$', '')}$"


@functools.lru_cache(4096)  # groups repeat their answers; what took too long is not tried again
def _math_equal(answer: str, gold: str) -> bool:
    if len(answer) > LONGEST or answer.count("{") != answer.count("}") or HOPELESS.search(answer):
        return False  # prose, cut off or hopeless
    return JUDGE.equal(answer, gold[:2 * LONGEST])


# computer algebra is slow until it has seen the like
WARM_UP = [("(x-1)(x+1)", "x^2-1"), (r"e^{-x}\log_2 8", r"\frac{3}{e^x}"), ("y=-2x+5", "y=5-2x"),
           (r"2\sqrt{3}\tan 45^\circ", r"\sqrt{12}"), (r"\{1,2\}", "1,2"), ("x>3", r"(3,\infty)"),
           (r"\begin{pmatrix}1\\a\end{pmatrix}", "|a-b|")]


class Judge:
    """Asks a child process whether two formulas are equal. The first question starts it; a fork has its own.
    What takes over a second, or too much memory, is unequal. Bombs share 5 seconds, and a tenth of the time
    that passes is added; then a question gets 0.1 s: n bombs cost 5 + n/10 seconds and a tenth of the run."""
    def __init__(self, second: float = 1.0):
        self.lock, self.process, self.cut_short = threading.Lock(), None, 0
        self.second, self.budget, self.asked = second, 5 * second, time.monotonic()

    def equal(self, answer: str, gold: str) -> bool:
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.start()
            before, self.asked = self.asked, time.monotonic()
            self.budget = min(self.budget + (self.asked - before) / 10, 5 * self.second)
            seconds, verdict = min(max(self.budget, self.second / 10), self.second), b""
            try:
                with contextlib.suppress(BrokenPipeError):
                    self.process.stdin.write(json.dumps([answer, gold, seconds]).encode() + b"\n")
                    verdict = self.process.stdout.read(1)  # the child's timer ends the wait
            finally:
                if not verdict:  # also at Ctrl-C: a verdict that comes late must not answer the next question
                    with self.process:
                        self.process.kill()
            if verdict == b"?":
                self.budget = max(self.budget - seconds, 0.0)
                if seconds < self.second and not self.cut_short:
                    print("formulas used up their time: a slow one may now be graded wrong", file=sys.stderr)
                self.cut_short += seconds < self.second
            return verdict == b"1"

    def start(self):
        """In a session of its own, so that no signal to our group reaches it: it ends when its input does."""
        process = subprocess.Popen([sys.executable, __file__], bufsize=0, start_new_session=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if process.stdout.read(1) != b"+":
            raise RuntimeError(f"{__file__}: the process that compares formulas did not start")
        self.process = process


JUDGE = Judge()
os.register_at_fork(after_in_child=JUDGE.__init__)  # the parent's ends with the parent: this drops its pipes


def _judge():
    """The child: says + when it is ready, then 1, 0 or ? (gave up) to each line [answer, gold, seconds]."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    from math_verify import parse, verify
    logging.disable()
    parsed = functools.lru_cache(256)(lambda text: parse(_marked(text), parsing_timeout=None))
    equal = lambda answer, gold: verify(parsed(gold), parsed(answer), timeout_seconds=None)
    for pair in WARM_UP:
        equal(*pair)
    gc.freeze()  # a worker then copies fewer pages
    os.write(1, b"+")
    sys.stdout = sys.stderr = open(os.devnull, "w")
    # a worker answers until the kernel ends it because its time is up, whatever it is doing; then the next
    while (worker := os.fork()) and os.waitpid(worker, 0)[1]:
        os.write(1, b"?")
    if worker:
        return  # it has no more questions
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    equal("(x-2)(x+2)", "x^2-4")  # copies the pages that any question needs, before time counts
    for line in sys.stdin.buffer:
        answer, gold, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        verdict = equal(answer, gold)
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(1, b"1" if verdict else b"0")


GRADERS = dict(zip(ANSWER_TYPES, (_grade_choice, _grade_math, _grade_math, _grade_text, _grade_calls)))


# ----- format and the registry

def format_think_answer(response: str, record: dict) -> float:
    """1.0 if the response is a non-empty think block, a non-empty answer block and nothing else, else 0.0."""
    return _is_blocks(response, "think", "answer")


def format_caption(response: str, record: dict) -> float:
    """The same for Reason-RFT's caption variant (arXiv 2503.20752): summary, caption, think, answer."""
    return _is_blocks(response, "summary", "caption", "think", "answer")


def _is_blocks(response: str, *names: str) -> float:
    text = response.strip()
    if any(text.count(f"<{name}>") != 1 or text.count(f"</{name}>") != 1 for name in names):
        return 0.0
    found = re.fullmatch(r"\s*".join(rf"<{name}>(.*)</{name}>" for name in names), text, re.DOTALL)
    return float(bool(found) and all(block.strip() for block in found.groups()))


def hfrrf(response: str, record: dict) -> float:
    """Vision-R1's reward (arXiv 2503.06749): 1.0 for format and accuracy at once, truncated 0.0."""
    whole = not record.get("truncated") and format_think_answer(response, record)
    return accuracy(response, record) if whole else 0.0


def boxed(response: str, record: dict) -> float:
    r"""VL-Rethinker's reward (arXiv 2504.08837): 1.0 if the last \boxed{} is right and nothing truncated."""
    box = not record.get("truncated") and _last_box(response[-TAIL:])
    return accuracy(rf"\boxed{{{box}}}", record) if box else 0.0


def vl_rethinker(response: str, record: dict) -> float:
    """What VL-Rethinker's released code pays, from -0.1 to 1.1; its paper's reward is plainly `boxed`.
    Truncated, or with six "wait", it starts at -0.1. If right and not forced to rethink, even so, it gets
    1.1 for one or two reflections of its own and else loses 0.2 for each, down to -0.1."""
    right = boxed(response, record | {"truncated": False})
    base = right if not record.get("truncated") and response.casefold().count("wait") < 6 else -0.1
    if not right or record.get("forced"):
        return base
    n = reflections(response)
    return 1.1 if n in (1, 2) else max(base - 0.2 * n, -0.1)


def reflections(response: str) -> int:
    """How often a response hesitates, counted as in VL-Rethinker's released code."""
    text = response.casefold()
    return sum(text.count(mark) for mark in ("wait,", "wait a", "alternatively"))


# ----- Reason-RFT's rewards

def format_legacy(response: str, record: dict) -> float:
    """Reason-RFT's format reward (arXiv 2503.20752) as its published runs were paid: blocks may be empty."""
    inner = response.removeprefix("<think>").removesuffix("</answer>")
    whole = len(response) - len(inner) == len("<think></answer>")
    return float(whole and bool(re.search(r"</think>\s*<answer>", inner)))


def discrete(response: str, record: dict) -> float:
    """Reason-RFT's reward for counts and letters (arXiv 2503.20752): 1.0 for the gold, in a tag exactly."""
    tags = ANSWER_TAG.findall(response[-TAIL:])  # the released code reads the first one
    gold = _gold(record["answer"]).strip()
    return float(tags[-1].strip() == gold != "") if tags else accuracy(response, record)


def numeric(response: str, record: dict) -> float:
    """Reason-RFT's mathematical reward (arXiv 2503.20752): `accuracy`, or 1.0 for a number up to 5% off the
    gold, 0.0 from 20% on, half a cosine wave between. For a zero only zero counts."""
    right = accuracy(response, record)
    got, want = _number(*_find_answer(response)), _value(_plain(_gold(record["answer"])))
    if right or not got or not want:
        return right
    off = min(abs(x - y) / (abs(y) or Fraction(1, 5 * 10**7)) for x, y in _readings(got, want))
    part = min(max((off - Fraction(1, 20)) / Fraction(3, 20), 0), 1)  # of the way from 5% to 20%
    return 0.5 * (1 + math.cos(math.pi * part))


def functions(response: str, record: dict) -> float:
    """Reason-RFT's function-based reward (arXiv 2503.20752) for calls, partial credit: from 0.0 to 1.0.
    Paired the best way there is, equal calls count 1, those with function and object or value in common 0.5,
    with the function alone 0.25: of the longer list's length, times the share of calls that repeat none."""
    return _paired_calls(response, record, near=0.5, far=0.25)


def functions_full(response: str, record: dict) -> float:
    """`functions` for equal calls alone, as in Reason-RFT's published runs (arXiv 2503.20752): 0.0 to 1.0."""
    return _paired_calls(response, record, near=0, far=0)


def functions_penalty(response: str, record: dict) -> float:
    """`functions` with -0.25 and -0.5 for unequal pairs (arXiv 2503.20752): -0.5 to 1.0, no answer 0.0."""
    return _paired_calls(response, record, near=-0.25, far=-0.5)


def _paired_calls(response: str, record: dict, near: float, far: float) -> float:
    answer, prose = _find_answer(response)
    said, gold = _calls(prose or answer), _calls(record["answer"])
    if not said or not gold:
        return 0.0
    wanted = Counter(gold)  # a gold that moves an object twice has two equal calls: no repetition then
    got = [call for call, n in Counter(said).items() for _ in range(min(n, max(wanted[call], 1)))]
    exact = (wanted & Counter(got)).total()
    rest, missed = [[*(Counter(a) - Counter(b)).elements()] for a, b in ((got, gold), (gold, got))]
    same_function = (Counter(c[0] for c in rest) & Counter(c[0] for c in missed)).total()
    # same object or value: any such pairing can be completed within its function, so the most is the best
    close = sum(matched(rest, missed, lambda a, b: a[0] == b[0] and (a[1] == b[1] or a[2] == b[2])))
    score = exact + near * close + far * (same_function - close)
    return score / max(len(got), len(gold)) * len(got) / len(said)


def steps(response: str, record: dict) -> float:
    """Reason-RFT's optional step reward (arXiv 2503.20752): a third for each mark of a step, up to 1.0."""
    marks = re.findall(r"(?m)Step \d+:|^\d+\.|^[-*]|(?:First|Second|Next|Finally),", response)
    return min(len(marks), 3) / 3


def length_bonus(lengths: list[int], right: list[bool]) -> list[float]:
    """Reason-RFT's optional length reward (arXiv 2503.20752), which needs the group: 0.5 for the shortest to
    -0.5. A wrong response never gains; equal lengths earn 0.0."""
    short, spread = min(lengths), max(lengths) - min(lengths)
    bonus = [0.5 - (length - short) / spread if spread else 0.0 for length in lengths]
    return [b if ok else min(0.0, b) for b, ok in zip(bonus, right)]


# ----- RISE: boxes and distributions, and rationales that must not give them away

MOST_BOXES = 100  # of an answer that are read, as in COCO's evaluation
REAL = r"[-+]?(?:\d{1,12}(?:\.\d{0,18})?|\.\d{1,18})(?:[eE][-+]?\d{1,2})?"
PAIR = re.compile(r"""(?:"([^"\n]{1,120})"|'([^'\n]{1,120})'"""
                  r"""|(?:^|[^\w\s]|\n)[ \t]*([^\W_][^:=,;{}"“”\n]{,119}))”?"""
                  r"""[ \t]*[:=]\s*["'“]?([^\s,;}"'”]{1,40})""")
BOX = re.compile(r"\[\s*" + r"\s*,\s*".join([f"({REAL})"] * 4) + r"\s*\]")


def parse_boxes(response: str) -> list[tuple]:
    """Boxes (x1, y1, x2, y2) in the answer: each innermost list of four numbers; [] without any."""
    return _boxes(_slot(response) or "")[:MOST_BOXES]


def _boxes(text: str) -> list[tuple]:
    return [tuple(map(float, box.groups())) for box in BOX.finditer(text)]


def parse_distribution(response: str, classes: Iterable[str]) -> dict | None:
    """Probability of each class by the `name: number` pairs in the answer (0 if not there); None without."""
    return _distribution(_slot(response) or "", classes)


def _distribution(text: str, classes: Iterable[str]) -> dict | None:
    said = dict.fromkeys(classes, 0.0)
    by_name = {_joined(name): name for name in classes}
    for *names, value in PAIR.findall(text):
        name = by_name.get(_joined("".join(names)))
        if name is None:
            continue
        if not re.fullmatch(REAL, value) or not 0 <= float(value) <= 1:
            return None
        said[name] = float(value)
    return said if any(said.values()) else None


def _joined(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).lower()


def iou(a: tuple, b: tuple) -> float:
    """Intersection over union of two boxes, from 0 to 1; empty and inverted ones have no intersection."""
    shared = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    return shared / (_area(a) + _area(b) - shared) if shared else 0.0


def _area(box: tuple) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)


def matched(some: list, others: list, worth: Callable = iou) -> list[float]:
    """worth(a, b), symmetric, of each pair of the one-to-one assignment with the largest sum.
    The Hungarian method, O(n^2 m). Index 0 of prices and of `owner` (row of a column) is a free place."""
    rows, columns = sorted((some, others), key=len)
    cost = [[-worth(a, b) for b in columns] for a in rows]
    row_price, price, owner = [0.0] * (len(rows) + 1), [0.0] * (len(columns) + 1), [0] * (len(columns) + 1)
    for row in range(1, len(rows) + 1):
        at, owner[0] = 0, row
        far, came_from = [0.0] + [math.inf] * len(columns), [0] * len(owner)
        done, free = [], set(range(len(owner)))
        while owner[at]:
            done.append(at)
            free.remove(at)
            for j in free:
                gap = far[at] + cost[owner[at] - 1][j - 1] - row_price[owner[at]] - price[j]
                if gap < far[j]:
                    far[j], came_from[j] = gap, at
            at = min(free, key=far.__getitem__)
        for j in done:
            row_price[owner[j]] += far[at] - far[j]
            price[j] -= far[at] - far[j]
        while at:
            owner[at], at = owner[came_from[at]], came_from[at]
    return [-cost[owner[j] - 1][j - 1] for j in range(1, len(owner)) if owner[j]]


def gold_boxes(record: dict) -> list[tuple]:
    """Boxes of a record's answer; [] if its answer is something else, so that rewards may meet any record."""
    return _boxes(record["answer"]) if record["answer_type"] == "boxes" else []


def gold_distribution(record: dict) -> dict:
    """Probability of each class (all that are named, unless meta["classes"] lists them), or {} likewise."""
    if record["answer_type"] != "distribution":
        return {}
    named = ("".join(names) for *names, _ in PAIR.findall(record["answer"]))
    classes = record.get("meta", {}).get("classes") or list(named)
    return _distribution(record["answer"], classes) or {}


def divergence(gold: dict, said: dict) -> tuple[float, float]:
    """(KL(gold || said), both clipped at 1e-10 and normalised, mean squared error of the values as given)."""
    p, q = _probabilities(gold), _probabilities(said)
    kl = sum(p[name] * math.log(p[name] / q[name]) for name in gold)
    return max(kl, 0.0), sum((gold[name] - said[name]) ** 2 for name in gold) / len(gold)


def _probabilities(values: dict) -> dict:
    clipped = {name: max(value, 1e-10) for name, value in values.items()}
    return {name: value / sum(clipped.values()) for name, value in clipped.items()}


def _boxes_are_right(response: str, record: dict) -> bool:
    gold, boxes = gold_boxes(record), parse_boxes(response)
    return len(gold) == len(boxes) and min(matched(gold, boxes), default=0) >= 0.5


def _likeliest_is_right(response: str, record: dict) -> bool:
    gold = gold_distribution(record)
    said = parse_distribution(response, gold) or {"": 1}
    got, right = ({name for name, p in pairs.items() if p == max(pairs.values())} for pairs in (said, gold))
    return got <= right


ANNOTATIONS = {"boxes": _boxes_are_right, "distribution": _likeliest_is_right}


def agreement(response: str, record: dict) -> float:
    """How well an answer reconstructs the annotation (RISE, arXiv 2508.13229), from 0.0 to 1.0: of boxes the
    IoUs of the best assignment / the longer list's length, of distributions exp(-KL/2 - MSE/2)."""
    if record["answer_type"] == "boxes":
        gold, boxes = gold_boxes(record), parse_boxes(response)
        return sum(matched(gold, boxes)) / max(len(gold), len(boxes), 1)
    if record["answer_type"] == "distribution":
        gold = gold_distribution(record)
        said = parse_distribution(response, gold)
        return math.exp(-0.5 * sum(divergence(gold, said))) if said else 0.0
    return accuracy(response, record)


def rise(response: str, record: dict, penalty: float = 0.1) -> float:
    """`agreement`, times `penalty` if what stands before the answer gives the annotation away."""
    return agreement(response, record) * (penalty if leaks(rationale_of(response), record) else 1)


def rationale_of(response: str) -> str:
    """What stands before the answer; "" if there is none."""
    return response[:max(response.rfind("<answer>"), response.rfind(r"\boxed"), 0)]


# ----- what gives an annotation away

LONGEST_RATIONALE = 8000  # characters that scrub keeps, and that leaks reads at a time
COUNTING = " ".join(map(str, range(20)))
NUMERALS = {word: str(i) for word, i in WORDS.items()}
NUMERALS |= {"hundred": "h", "thousand": "1000", "point": ".", "percent": "%"}
SHARES = {"half": 2, "halves": 2, "third": 3, "quarter": 4, "fifth": 5, "tenth": 10, "hundredth": 100}
SHARES = {share + s: f"/{parts}" for share, parts in SHARES.items() for s in ("", "s")}
SPELLINGS = NUMERALS | SHARES
NUMERAL, SPELLING = ("|".join(sorted(words, key=len, reverse=True)) for words in (NUMERALS, SPELLINGS))
SPELLED = re.compile(rf"(?<![^\W_])(?:{NUMERAL})(?:(?:[\W_]|(?<![^\W_])and(?![^\W_])){{,8}}(?:{SPELLING}))*"
                     r"(?![^\W_])", re.IGNORECASE)
PLAIN_NUMBER = r"(?<![^\W_])(?<!\d\.)[-+]?(?:\d+(?:\.\d+)?|\.\d+)(?![^\W_]|\.\d)"
BETWEEN = (r"(?:[\W_]|(?<![^\W_])(?:and|to|by|at|is|of|[xy](?:_?(?:min|max|[0-3]))?|left|top|right|bottom"
           r"|width|height|[wh])(?![^\W_])){1,24}")
TUPLE = re.compile(rf"[\[({{]{{,3}}(?:{PLAIN_NUMBER}(?:{BETWEEN}{PLAIN_NUMBER}){{3,}}"
                   r"|(?<!\d)\d+(?:[._/:;,x-]\d+){3,})[\])}]{,3}", re.IGNORECASE)
PROBABILITY = re.compile(r"(?<!\d)(?:\d*\.\d+(?:e[-+]?\d+)?(?:\s?%)?|\d+e[-+]?\d+"
                         r"|\d+\s?(?:%|percent\b)|\d+\s?[/⁄]\s?\d+|0,\d+|\d+ of 100?\b"
                         rf"|(?:\d+|{NUMERAL}) (?:out of|in) (?:100?|ten|a hundred)\b"
                         r"|(?!(?:1?\d|2[0-3]):[0-5]\d(?!\d))\d+(?:\s?:\s?\d+)+"  # "7:3", no time of day
                         rf"|\d+[\s-](?:{'|'.join(SHARES)})\b)", re.IGNORECASE)
APART = [re.compile(rf"(?<!\d)(?=(\d(?:[^\d\n]{{,3}}\d){{{n}}})(?!\d))") for n in (1, 2, 3)]  # "1a 2b 0c"
ON_SCALE = re.compile(r"\b\w*(?<!\d)(?:0{,2}[1-9]\d|0?[1-9]\d\d|1000)(?!\d)\w*")
MARKUP = re.compile(r"<[^<>\s]{1,40}>")  # <image>, <|im_end|> or <answer> would act in the next prompt
SENTENCES = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n+")


def leaks(text: str, record: dict) -> list[str]:
    """What in a rationale gives the annotation away, as written there or in digits; [] if nothing does.
    Lists of four numbers, always. For boxes also two coordinates of one of them, from 10 up; for
    distributions names of classes ("Joy", not "enjoy") and probabilities, else the gold answer.
    """
    text, names, found, said = _visible(text), _names(record), [], set()
    for start in range(0, len(text), LONGEST_RATIONALE - LONGEST):
        part = text[start:start + LONGEST_RATIONALE]
        digits = SPELLED.sub(_in_digits, part) if record["answer_type"] in ANNOTATIONS else part
        found += [m[0] for m in TUPLE.finditer(digits)] + [m[0] for m in names.finditer(part)]
        if record["answer_type"] == "distribution":
            found += [m[0] for m in PROBABILITY.finditer(digits)]
        for size in APART:
            said |= {re.sub(r"\D", "", number) for number in size.findall(digits)}
    for box in gold_boxes(record):
        told = said & {str(round(side)) for side in box}
        found += sorted(told) if len(told) > 1 else []
    return list(dict.fromkeys(found))


def _in_digits(run: re.Match) -> str:
    """Number words as digits, but for counting up."""
    said = _digits(run[0])
    return run[0] if f" {said} " in f" {COUNTING} " else said


def _digits(words: str) -> str:
    """Number words as digits: "hundred-and-twenty" 120, "three, four, zero" 3 4 0."""
    said = " ".join(SPELLINGS[word] for word in re.findall(SPELLING, words.lower()))
    said = re.sub(r"\b([2-9])0 ([1-9])\b(?! h)", r"\1\2", said)
    said = re.sub(r"\b(\d*[1-9] )?h\b( \d\d?\b(?! h))?",
                  lambda number: str(100 * int(number[1] or 1) + int(number[2] or 0)), said)
    return re.sub(r" ?\. ?", ".", said)


def scrub(text: str, record: dict) -> str:
    """A rationale without anything that states the annotation; "" if nothing is left. Idempotent.
    Sentences that name it go as a whole. Of the numbers go lists of four; for boxes and distributions
    fractions and spelled-out ones; for boxes also close digits and all from 10 to 1000: near misses do."""
    text = _visible(text[:LONGEST_RATIONALE])[:LONGEST_RATIONALE]
    for _ in range(8):  # what is cut out can bring the parts of a name or list together
        if (shorter := _scrub_once(text, record)) == text:
            return "" if leaks(text, record) else text
        text = shorter
    return ""


def _scrub_once(text: str, record: dict) -> str:
    marked = _names(record).sub("\0", MARKUP.sub(" ", text))
    text = TUPLE.sub(" ", " ".join(part for part in SENTENCES.split(marked) if "\0" not in part))
    if record["answer_type"] in ANNOTATIONS:
        text = PROBABILITY.sub(" ", text)
        text = SPELLED.sub(lambda run: run[0] if _in_digits(run) == run[0] else " ", text)
    if record["answer_type"] == "boxes":
        text = ON_SCALE.sub(" ", text)
        text = re.sub(r"(?<!\d)\d(?:[^\d\n]{1,3}\d)+(?!\d)", " ", text)
    return " ".join(text.split()) if re.search(r"\w", text) else ""


def _visible(text: str) -> str:
    """Text as it looks: no control or zero-width characters, one form of each letter and digit."""
    text = "".join(c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    return re.sub(r"\d", lambda digit: str(unicodedata.digit(digit[0])), unicodedata.normalize("NFKC", text))


def _names(record: dict) -> re.Pattern:
    """Finds words that are the annotation: class names, or the gold answer, a choice by text or letter."""
    kind, gold = record["answer_type"], record["answer"]
    names, found = record.get("meta", {}).get("classes", []), []
    if kind in ANNOTATIONS:
        names = list(gold_distribution(record))
    elif kind == "choice":
        found = [rf"\(\s*{gold}\s*\)", rf"\b(?:option|choice|answer|letter)\W{{,3}}(?:is\W{{,3}})?{gold}\b"]
        names = [*names, record["choices"][ord(gold) - 65]]
    else:
        names = [*names, gold]
    for letters in sorted((_joined(_visible(name)) for name in names), key=len, reverse=True):
        if letters:
            name = r"[\W_]{,3}".join(map(re.escape, letters))
            found.append(rf"(?<![^\W_]){name}(?![^\W_])")
    return re.compile("|".join(found) or r"(?!)", re.IGNORECASE)


def cot_prompt(record: dict) -> str:
    """RISE's first hop: asks for a rationale of the annotation, in a data set's words (meta) or our own."""
    answer = record["answer"]
    if record["answer_type"] == "choice":
        answer = f"({answer}) {record['choices'][ord(answer) - 65]}"
    own = record.get("meta", {}).get("cot_prompt")
    return own or build_prompt(record | {"task": "cot"}).replace("{answer}", answer)


def reconstruct_prompt(record: dict, rationale: str) -> str:
    """RISE's second hop: asks for the annotation, given a scrubbed rationale in place of the annotation."""
    form = FORMS.get(record.get("task")) or FORMS[record["answer_type"]]
    prompt = build_prompt(record | {"task": "reconstruct"}).replace("{form}", form)
    return prompt.replace("{rationale}", rationale)


# ----- rewards of RISE as released, and of Visual-RFT, which it descends from

def detection_legacy(response: str, record: dict) -> float:
    """RISE's box reward as released, 0.0 to 1.0: missing ones are free, thinking in numbers alone costs."""
    boxes = parse_boxes(response)
    listed = re.fullmatch(r"\s*\[[\d\s.,\[\]-]*\]\s*", _legacy_think(response))
    score = sum(matched(gold_boxes(record), boxes)) / max(len(boxes), 1)
    return score * (0.1 if listed else 1)


def grounding_legacy(response: str, record: dict) -> float:
    """RISE-R1's reward of single boxes as released, 0.0 to 1.0: those in the thoughts are answers, too."""
    gold, boxes = gold_boxes(record), _boxes(response[-TAIL:])[:MOST_BOXES]
    return sum(matched(gold, boxes)) / max(len(gold), len(boxes), 1)


def distribution_legacy(response: str, record: dict) -> float:
    """RISE's distribution reward as released, 0.0 to 1.0; a missing answer earns what all zeros would.
    Only lower-case one-word names are found, exponents and ".5" misread, values above 1 zeros. A decimal in
    the think block (the whole response, if that has a newline) costs."""
    tags = re.findall("<answer>(.*?)</answer>", response[-TAIL:])
    classes = dict.fromkeys(record.get("meta", {}).get("classes") or gold_distribution(record), 0.0)
    if record["answer_type"] != "distribution" or not classes:
        return 0.0
    gold, said = (classes | _legacy_pairs(t, classes) for t in (record["answer"], tags[-1] if tags else ""))
    leaked = re.search(r"\d\.\d", _legacy_think(response))
    return math.exp(-0.5 * sum(divergence(gold, said))) * (0.1 if leaked else 1)


def _legacy_think(response: str) -> str:
    think = re.search("<think>(.*?)</think>", response[:LONGEST_RATIONALE])
    return think[1] if think else response[:LONGEST_RATIONALE]


def _legacy_pairs(text: str, classes: dict) -> dict:
    pairs = re.findall(r"""(\w+)["']?:["']?(\d+(?:\.\d+)?)""", re.sub(r"[\s_]", "", text.lower()))
    return {name: float(p) for name, p in pairs if name in classes and float(p) <= 1}


def distribution_format(response: str, record: dict) -> float:
    """RISE's format reward of distributions: exp(-|sum - 1|) within think and answer blocks, else 0.0."""
    said = parse_distribution(response, gold_distribution(record))
    return math.exp(-abs(sum(said.values()) - 1)) * format_think_answer(response, record) if said else 0.0


def grounding_format(response: str, record: dict) -> float:
    """RISE's format reward of single boxes: 1.0 if the answer is one flat, non-negative box, else 0.0."""
    box = BOX.fullmatch((_slot(response) or "").strip())
    return float(bool(box) and min(map(float, box.groups())) >= 0) * format_think_answer(response, record)


def grounding_giou(response: str, record: dict) -> float:
    """Visual-RFT's reward of single boxes (arXiv 2503.01785): generalised IoU + 1, from 0.0 to 2.0."""
    pair = *gold_boxes(record)[:1], *parse_boxes(response)[:1]
    if len(pair) < 2 or not _area(pair[1]):
        return 0.0
    (gold, box), overlap = pair, iou(*pair)
    union = (_area(gold) + _area(box)) / (1 + overlap)
    hull = _area((*map(min, gold[:2], box[:2]), *map(max, gold[2:], box[2:])))
    return overlap + union / hull


def visual_rft_iou(response: str, record: dict) -> float:
    """Visual-RFT's IoU reward (arXiv 2503.01785): IoUs of hits / the longer list's length, 0.0 to 1.0."""
    hits = _hits(response, record)
    return sum(overlap for overlap, _ in hits) / max(len(gold_boxes(record)), len(hits), 1)


def visual_rft_conf(response: str, record: dict) -> float:
    """Visual-RFT's confidence reward, 0.0 to 1.0: mean of hits and of 1 - misses: a miss at 0 earns 1."""
    hits = _hits(response, record)
    return sum(sure if overlap else 1 - sure for overlap, sure in hits) / max(len(hits), 1)


def _hits(response: str, record: dict) -> list[tuple[float, float]]:
    """(IoU or 0 for a miss, confidence) of each {"Position": box, "Confidence": number} in the answer: the
    surest goes first and takes the free gold box it overlaps most, if by more than half."""
    said = {}
    for part in re.findall(r"\{[^{}]*\}", _slot(response) or "")[:MOST_BOXES]:
        box, sure = BOX.search(part), re.search(rf"confidence\W{{1,4}}?({REAL})", part, re.IGNORECASE)
        if box and sure:
            said.setdefault(tuple(map(float, box.groups())), min(max(float(sure[1]), 0.0), 1.0))
    free, hits = gold_boxes(record), []
    for box, sure in sorted(said.items(), key=lambda item: -item[1]):
        overlap, best = max(((iou(gold, box), gold) for gold in free), default=(0.0, None))
        hits.append((overlap if overlap > 0.5 else 0.0, sure))
        if overlap > 0.5:
            free.remove(best)
    return hits


def contains(response: str, record: dict) -> float:
    """Visual-RFT's classification reward: 1.0 if answer or gold contains the other, even an "a"."""
    said, gold = (_joined(text) for text in (_slot(response) or "", _gold(record["answer"])))
    return float(bool(said and gold) and (said in gold or gold in said))


REWARDS = {"format": format_think_answer} | {reward.__name__: reward for reward in (
    accuracy, hfrrf, boxed, vl_rethinker, format_legacy, format_caption, discrete, numeric, functions,
    functions_full, functions_penalty, steps, agreement, rise, detection_legacy, grounding_legacy,
    distribution_legacy, distribution_format, grounding_format, grounding_giou, visual_rft_iou,
    visual_rft_conf, contains)}


def parse_reward_spec(spec: str) -> dict[str, float]:
    """Weights by name from "accuracy=1,format=0.5" (a bare name weighs 1); ValueError names what is wrong."""
    weights = {}
    for part in spec.split(","):
        name, given, weight = (piece.strip() for piece in part.partition("="))
        if name not in REWARDS:
            near = difflib.get_close_matches(name, REWARDS, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown reward {name!r} in {spec!r}: did you mean {near!r}?")
        if name in weights:
            raise ValueError(f"reward {name!r} is given twice in {spec!r}")
        if given and not re.fullmatch(REAL, weight):
            raise ValueError(f"bad weight {weight!r} for reward {name!r} in {spec!r}: not a finite number")
        weights[name] = float(weight) if given else 1.0
    return weights


if __name__ == "__main__":
    _judge()
