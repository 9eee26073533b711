"""RISE's rewards, leak detection and prompts: the worked numbers of its release beside the right ones."""
import itertools
import json
import random
import re
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import rewards  # noqa: E402

EMOTIONS = ["anger", "disgust", "fear", "joy", "sadness", "surprise", "neutral"]
IMD = ["laptop", "mouse", "backpack", "frying pan", "pencil sharpener", "digital clock", "paintbrush",
       "toilet tissue", "remote control", "bottlecap"]


def record(answer, kind, **fields):
    answer = answer if isinstance(answer, str) else json.dumps(answer)
    return {"id": "0", "question": "What {is} it?", "images": [], "answer": answer, "answer_type": kind,
            **fields}


def boxes(*gold, **fields):
    return record([*map(list, gold)], "boxes", **fields)


def mood(gold, classes=EMOTIONS):
    return record(gold, "distribution", meta={"classes": classes})


def said(answer, think="a b"):
    answer = answer if isinstance(answer, str) else json.dumps(answer)
    return f"<think>{think}</think><answer>{answer}</answer>"


def near(value):
    return pytest.approx(value, abs=6e-7)


# ----- distributions

GOLD = mood({"joy": .6, "surprise": .3, "neutral": .1})
E1 = {"joy": .5, "surprise": .3, "neutral": .2}
UNIFORM = dict.fromkeys(EMOTIONS, .142857)


@pytest.mark.parametrize("response, right, legacy, form", [
    (said(E1), .978761, .978761, 1),
    (said({"joy": .6, "surprise": .3, "neutral": .1}), 1, 1, 1),
    (said(E1, "0.6 of it"), .978761, .097876, 1),  # the legacy penalty is part of it, ours is `rise`
    (json.dumps(E1).join(["<think>a</think>", ""]), 0, .573017, 0),
    (said({"anger": 1}), 1.41e-5, 1.41e-5, 1),
    (said({"joy": 1}), .015379, .015379, 1),
    (said(UNIFORM), .578894, .578894, .999999),
    (said(E1, "a\nb"), .978761, .097876, 1),
    (said(f"\n{json.dumps(E1)}\n"), .978761, .573017, 1),
    (said({"joy": .5, "surprise": .3}), .375042, .375042, .818731),
    (said({"joy": 60, "surprise": .3, "neutral": .1}), 0, .001796, 0),
    (said('{"joy": 1e-05, "surprise": .3, "neutral": 0.1}'), .056800, .041356, .548817),
    (said(dict.fromkeys(EMOTIONS, 0)), 0, .573017, 0),
    (said("{}"), 0, .573017, 0), ("", 0, .573017, 0),
], ids=[*(f"E{i}" for i in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13)), "empty", "nothing"])
def test_distributions(response, right, legacy, form):
    assert rewards.agreement(response, GOLD) == near(right)
    assert rewards.distribution_legacy(response, GOLD) == near(legacy)
    assert rewards.distribution_format(response, GOLD) == near(form)


def test_divergence():
    gold, pred = ({**dict.fromkeys(EMOTIONS, 0.0), **d} for d in (json.loads(GOLD["answer"]), E1))
    assert rewards.divergence(gold, pred) == (near(.04007822), near(.00285714))


@pytest.mark.parametrize("classes, right", [(IMD, .947735), (IMD + list("abcdefghij"), .948209)])
def test_number_of_classes(classes, right):
    gold = mood({"backpack": 1}, classes)
    response = said({"backpack": .9, "mouse": .1})
    assert rewards.agreement(response, gold) == rewards.distribution_legacy(response, gold) == near(right)


def test_names_of_several_words_and_unknown_names():
    pan = mood({"frying pan": 1}, IMD)
    for answer in ({"frying pan": 1}, {"Frying_Pan": 1}, "frying-pan: 1.0", "{'frying  pan' : 1}"):
        assert rewards.agreement(said(answer), pan) == rewards.distribution_format(said(answer), pan) == 1
    assert rewards.distribution_legacy(said({"frying pan": 1}), pan) == 1
    assert rewards.agreement(said({"laptop": 1}), pan) < 1e-3
    assert rewards.distribution_legacy(said({"laptop": 1}), pan) == pytest.approx(9.5e-5, abs=1e-6)
    kit = mood({"carpenter's kit": .5, "mouse, computer mouse": .5}, [])
    for answer in (kit["answer"], str(json.loads(kit["answer"]))):  # JSON, and as Python writes it
        assert rewards.agreement(said(answer), kit) == 1
    cafe = record('{"Café": 1, "pub": 0}', "distribution")
    assert rewards.agreement("<answer>{'CAFÉ': 1}</answer>", cafe) == 1
    band = mood({"Band Aid": 1}, ["Band Aid", "band"])
    assert rewards.agreement(said({"Band Aid": 1}), band) == 1
    assert rewards.accuracy(said({"band aid": 1}), band) == 1
    assert rewards.accuracy(said({"band": 1}), band) == 0
    bookcase = mood({"bookcase": 1}, IMD)  # not one of the classes: released code pays any answer in full
    assert rewards.distribution_legacy(said({"bookcase": 1}), bookcase) == 1


@pytest.mark.parametrize("value, number", [
    ("1e-05", 1e-5), (".3", .3), ("5e-1", .5), ("1", 1), ("1.", 1), ("0.25", .25), ('"0.5"', .5),
    ("-0.1", None), ("1.5", None), ("nan", None), ("NaN", None), ("inf", None), ("1e9", None), ("0_1", None),
    ("half", None), ("60%", None), ("0.5.5", None),
])
def test_numbers(value, number):
    parsed = rewards.parse_distribution(said(f'{{"joy": {value}}}'), EMOTIONS)
    assert parsed == (number and {**dict.fromkeys(EMOTIONS, 0), "joy": number})


@pytest.mark.parametrize("answer", [
    "joy: 0.5, surprise: 0.3, neutral: 0.2", "joy: 0.5\nsurprise: 0.3\nneutral: 0.2",
    "{'Joy':.5,'SURPRISE':.3,'neutral':.2}", "{ joy : 0.5 , surprise : 0.3 , neutral : 0.2 }",
    "```json\n{\"joy\": 0.5,\n \"surprise\": 0.3, \"neutral\": 0.2}\n```",
    "- joy = 0.5\n- surprise = 0.3\n- neutral = 0.2\n- unheard of: 7",
    "{“joy”: 0.5, “surprise”: 0.3, “neutral”: 0.2}",
    '{"joy": "0.5", "surprise": "0.3", "neutral": "0.2", "no joy": "0.9"}',
])
def test_notations_of_distributions(answer):
    assert rewards.parse_distribution(said(answer), EMOTIONS) == {**dict.fromkeys(EMOTIONS, 0), **E1}
    assert rewards.agreement(said(answer), GOLD) == near(.978761)


def test_likeliest_class():
    tie = mood({"joy": .5, "fear": .5})
    assert rewards.accuracy(said({"joy": .5, "surprise": .3}), GOLD) == 1
    assert rewards.accuracy(said({"joy": .4, "surprise": .4}), GOLD) == 0
    assert rewards.accuracy(said(UNIFORM), GOLD) == 0
    for answer, right in (({"joy": .9}, 1), ({"joy": .5, "fear": .5}, 1), ({"anger": 1}, 0)):
        assert rewards.accuracy(said(answer), tie) == right


# ----- boxes

TWO = boxes([0, 0, 100, 100], [200, 200, 300, 300])
LISA = boxes([100, 100, 300, 300], task="ground")


@pytest.mark.parametrize("answer, right, legacy", [
    ([[0, 0, 100, 50], [210, 200, 310, 300]], .659091, .659091),
    ([[0, 0, 100, 100]], .5, 1),
    ([[0, 0, 100, 100], [200, 200, 300, 300], [500, 500, 600, 600]], .666667, .666667),
    ([[200, 200, 300, 300], [0, 0, 100, 100]], 1, 1),
    ([[0, 0, 100, 100]] * 2, .5, .5),
    ([], 0, 0), ("none", 0, 0),
    ([[100, 100, 0, 0], [5, 5, 5, 5]], 0, 0),  # inverted and empty
    ([[0, 0, 1e99, -1e99], [1e99, 1e99, 1e99, 1e99]], 0, 0),
    ([{"bbox_2d": [0, 0, 100, 100]}, {"bbox_2d": [200.0, 2e2, 300, 300.0]}], 1, 1),
    ("[ 0 , 0 , 100 , 100 ]\n[200,200,\n300,300]", 1, 1),
    ("[[0, 0, 100], [1, 2, 3, 4, 5], [a, 1, 2, 3]]", 0, 0),
    ([[0, 0, 100, 100], [200, 200, 200, 200]], .5, .5),  # [x, y, w, h] read as [x1, y1, x2, y2]
])
def test_boxes(answer, right, legacy):
    assert rewards.agreement(said(answer), TWO) == near(right)
    assert rewards.detection_legacy(said(answer), TWO) == near(legacy)
    assert rewards.accuracy(said(answer), TWO) == (right in (1, .659091))  # there the lower IoU is 0.5


def test_boxes_in_prose_are_not_an_answer():
    listed = "[[0,0,100,100],[200,200,300,300]]"
    assert rewards.agreement(said(listed, think=listed), TWO) == 1
    assert rewards.detection_legacy(said(listed, think=listed), TWO) == near(.1)
    assert rewards.detection_legacy(said(listed, think="here [0,0,100,100]"), TWO) == 1
    assert rewards.rise(said(listed, think="here [0,0,100,100]"), TWO) == near(.1)
    assert rewards.rise(said(listed, think="here [0,0,100,100]"), TWO, penalty=.5) == near(.5)
    assert rewards.rise(said(listed), TWO) == 1 == rewards.rise(rf"see \boxed{{{listed}}}", TWO)
    for response in (listed, f"<think>{listed}", f"<think>{listed}</think>", f"<answer>{listed}",
                     f"<think>{listed}</think><answer>x</answer>"):
        assert rewards.agreement(response, TWO) == 0


@pytest.mark.parametrize("answer, think, right, legacy, r1, form, giou", [
    ([150, 150, 350, 350], "a", .391304, .391304, .391304, 1, 1.311304),
    ([[150, 150, 350, 350]], "a", .391304, .391304, .391304, 0, 1.311304),
    ([-10, 150, 350, 350], "a", .365854, .365854, .365854, 0, 1.276965),
    ([150, 150, 350, 350], "[150, 150, 350, 350]", .391304, .03913, .195652, 1, 1.311304),
    # RISE-R1 pays for the gold box copied into the rationale
    ([150, 150, 350, 350], "as [100, 100, 300, 300]", .391304, .391304, .5, 1, 1.311304),
    ([100, 100, 300, 300], "a", 1, 1, 1, 1, 2), ([500, 500, 600, 600], "a", 0, 0, 0, 1, .2),
    ([300, 300, 100, 100], "a", 0, 0, 0, 1, 0), ("no box", "a", 0, 0, 0, 0, 0),
])
def test_single_boxes(answer, think, right, legacy, r1, form, giou):
    response = said(answer, think)
    assert rewards.agreement(response, LISA) == near(right)
    assert rewards.detection_legacy(response, LISA) == near(legacy)
    assert rewards.grounding_legacy(response, LISA) == near(r1)
    assert rewards.grounding_format(response, LISA) == form
    assert rewards.grounding_giou(response, LISA) == near(giou)
    assert rewards.grounding_format(f"[{answer}]", LISA) == 0


def test_assignment_is_the_best_one():
    rng = random.Random(0)
    for _ in range(150):
        gold, pred = ([(x := rng.randrange(8), y := rng.randrange(8), x + rng.randrange(9), y + 4)
                       for _ in range(rng.randrange(6))] for _ in range(2))
        short, long = sorted((gold, pred), key=len)
        best = max(sum(map(rewards.iou, short, some)) for some in itertools.permutations(long, len(short)))
        ious = rewards.matched(gold, pred)
        assert sum(ious) == pytest.approx(best, abs=1e-9) and len(ious) == len(short)
        rng.shuffle(gold)
        assert sum(rewards.matched(pred, gold)) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("n, m", [(100, 100), (90, 1000), (1, 1000)])
def test_long_answers_are_bounded(n, m):
    rng = random.Random(n)
    corners = [[rng.randrange(400), rng.randrange(400), rng.randrange(401, 999), 999] for _ in range(m + n)]
    start = time.perf_counter()
    for answer in (corners[n:], [[1, 2, 3, 4]] * m, corners[n:] + [[0, 0, 999, 999]] * m):
        assert 0 <= rewards.agreement(said(answer), boxes(*corners[:n])) <= 1
    assert time.perf_counter() - start < 2
    assert len(rewards.parse_boxes(said("[1,2,3,4]" * 300))) == 100


@pytest.mark.parametrize("answer, by_iou, by_confidence", [
    ([([0, 0, 100, 80], .9), ([500, 500, 600, 600], .3)], .4, .8),
    ([([0, 0, 100, 50], .9)], 0, .1),
    ([([0, 0, 100, 80], .9)] * 3, .4, .9),
    ([([0, 0, 100, 80], .2), ([0, 0, 100, 100], .9)], .5, .85),  # the surest goes first
    ([([0, 0, 100, 80], 9), ([200, 200, 300, 300], -3)], .9, .5), ([], 0, 0),
])
def test_visual_rft(answer, by_iou, by_confidence):
    text = json.dumps([{"Position": box, "Confidence": sure} for box, sure in answer])
    for tail in ("", ', {"Position": [1, 2, 3, 4], "Conf'):
        assert rewards.visual_rft_iou(said(text + tail), TWO) == near(by_iou)
        assert rewards.visual_rft_conf(said(text + tail), TWO) == near(by_confidence)


def test_classification():
    pan = record("frying pan", "text")
    for answer, right, loose in (("Frying pan", 1, 1), ("a pan", 0, 0), ("a frying pan or a laptop", 0, 1),
                                 ("pan", 0, 1), ("", 0, 0)):
        assert rewards.agreement(said(answer), pan) == right
        assert rewards.contains(said(answer), pan) == loose


@pytest.mark.parametrize("gold", [GOLD, TWO, LISA, mood({"Band Aid": 1}, ["Band Aid", "x"]),
                                  record("B", "choice", choices=["a", "b"])])
def test_the_gold_answer_is_right(gold):
    response = said(gold["answer"], "looks so")
    for reward in (rewards.accuracy, rewards.agreement, rewards.rise, rewards.format_think_answer):
        assert reward(response, gold) == 1


@pytest.mark.parametrize("kind", ["boxes", "distribution"])
@pytest.mark.parametrize("answer", ["", "none", "[[1, 2", '{"joy": 2}', "{}", "3"])
def test_another_response_may_stand_in_for_the_gold(kind, answer):
    """As in a vote of several responses: nothing raises, what cannot be read agrees with nothing."""
    for response in (said([[1, 2, 3, 4]]), said({"joy": 1}), said(answer), ""):
        assert {reward(response, record(answer, kind)) for reward in rewards.REWARDS.values()
                if reward.__name__[:6] != "format"} <= {0.0, 0.1, 1.0}
        assert rewards.accuracy(response, record(answer, kind)) == 0


# ----- leaks

CUP = boxes([120, 340, 560, 780], meta={"target": "cup"})
TUPLES = """[120, 340, 560, 780]|(120,340),(560,780)|x1=120, y1=340, x2=560, y2=780|120 340 560 780
<120;340;560;780>|[[120.0, 340.0], [560.0, 780.0]]|left 120, top 340, right 560, bottom 780|120-340-560-780
from (120, 340) to (560, 780)|x120y340X560Y780|120, 340 and 560 by 780|120.340.560.780|120x340x560x780
{"x_min": 120, "y_min": 340, "x_max": 560, "y_max": 780}|１２０, ３４０, ５６０, ７８０|0.12, 0.34, 0.56, 0.78
120\u200b,340,560\u200b,780|**120** **340** **560** **780**
starting at 120 on the left, and ending beside the shelf at 560""".replace("\n", "|").split("|")


@pytest.mark.parametrize("leak", TUPLES)
def test_boxes_are_leaks_in_any_notation(leak):
    text = f"A blue cup at {leak}, on a tray."
    assert rewards.leaks(text, CUP)
    clean = rewards.scrub(text, CUP)
    assert not re.search(r"120|340|560|780|12", clean) and "blue cup" in clean and "on a tray" in clean


@pytest.mark.parametrize("text, clean", [
    ("They enjoy the party.",) * 2, ("A fearless climber hangs on.",) * 2, ("Seen in 2020. All smile.",) * 2,
    ("Joy is visible.", ""), ("Strong joy everywhere", ""), ("It is 0.5 joy here. Calm sea.", "Calm sea."),
    ("Calm sea. It is 0.5. High waves.", "Calm sea. It is . High waves."),
    ("JOY!\nWide\neyes", "Wide eyes"), ("*joy* is it. Smiles.", "Smiles."),
    ("It is j o y. Smiles.", "Smiles."), ("", ""), (" . ", ""),
    ("_joy_ it is", ""), ("j\u200boy it is", ""), ("<answer>Smile <image> here</answer>", "Smile here"),
    ("About 60% or 60 percent of 3/5 or zero point six or 1e-3.", "About or of or or ."),
])
def test_scrub_of_distributions(text, clean):
    assert rewards.scrub(text, GOLD) == clean == rewards.scrub(clean, GOLD)


def test_scrub_of_boxes():
    text = ("In 2020. A cup [120, 340, 560, 780] with 2 plates, at 0.75, 120.5, 1e-3, one hundred twenty,"
            " or 121.")
    assert rewards.scrub(text, CUP) == "In 2020. A cup with 2 plates, at , , , , or ."
    assert rewards.scrub("[120, 340, 560, 780]", CUP) == ""


@pytest.mark.parametrize("gold, text, leaked", [
    (GOLD, "Joy and FEAR.", ["Joy", "FEAR"]), (GOLD, "It is 0.6", ["0.6"]),
    (GOLD, "It is .6, or 60 %", [".6", "60 %"]),
    (GOLD, "at 1 2 3 4", ["1 2 3 4"]), (mood({"frying pan": 1}, IMD), "A Frying-Pan", ["Frying-Pan"]),
    (record("frying pan", "text"), "A frying\npan, a laptop", ["frying\npan"]),
    (record("frying pan", "text", meta={"classes": IMD}), "a laptop", ["laptop"]),
    (record("B", "choice", choices=["cat", "dog"]), "a dog, (B), a cat", ["dog", "(B)"]),
    (record("B", "choice", choices=["cat", "dog"]), "the answer is B", ["answer is B"]),
    (CUP, "120, 340", ["120", "340"]), (CUP, "at 120", []), (CUP, "joy at 0.6", []),
])
def test_leaks(gold, text, leaked):
    assert rewards.leaks(text, gold) == leaked
    assert rewards.leaks(rewards.scrub(text, gold), gold) == []


INNOCENT = """
enjoy enjoys enjoyed enjoyment joyful joyous joyride joystick killjoy overjoyed fearless fearful fearsome
fearfully feared angered angrily angry anglers danger dangers hangers strangers rangers gangers manger sad
sadly saddest sadden sadder surprising surprisingly surprised unsurprised disgusting disgusted neutrality
neutralise neutron neutrals neutrino cupboard cups cupcake hiccup teacup buttercup frown frowning smile
smiles smiling grin teeth tears cry crying weep laugh laughing brows eyes mouth lips cheeks wrinkles gaze
stare pale blush trembling clenched fists wide open closed raised lowered relaxed tense calm still warm cold
bright dark shadow light sunlight window table chair shelf floor wall ceiling street car bus train bridge
river lake sea beach tree leaf flower grass dog cat bird horse sheep plate fork knife spoon bottle glass
bowl kettle pan pot stove oven sink lamp book paper pen pencil desk laptop screen keyboard clock watch phone
camera bag shoe hat coat shirt dress scarf glove ring crowd child adult man woman baby team player ball bat
net goal race winner medal flag banner sign round square tall short wide narrow left right above below
behind beside under over near far front back top bottom middle one two three four five first second third
single double several many few none all both half pair 2020 1998 x y x1 y2 3D 4K B2B 5 7 3rd
""".split()
NUMBERED = ["Bus 42 passes at 5.", "A 4-wheel car, model 911.", "Player 10 and player 7 run."]
SENTENCES = ["Seen in 2020.", "Two cups, 3 plates, 1 fork and 4 knives.", "He is 7 of 9.", "No. 5 is tall.",
             "They enjoy a fearless, joyful day.", "Version 2 of plan B.", "Left, right, left, right.",
             "Step 1: look. Step 2: compare.", "From 1998 to 2020, in 3 rooms.", *NUMBERED]


@pytest.mark.parametrize("gold", [GOLD, CUP], ids=["distribution", "boxes"])
def test_innocent_words_are_no_leaks(gold):
    assert len(set(INNOCENT)) + len(SENTENCES) >= 200
    assert [text for text in [*INNOCENT, *SENTENCES] if rewards.leaks(text, gold)] == []
    assert rewards.leaks(" ".join(word for word in INNOCENT if word.isalpha()), gold) == []
    assert rewards.leaks(" ".join(SENTENCES), gold) == []
    kept = [text for text in INNOCENT + SENTENCES if rewards.scrub(text, gold) == text]
    assert set(INNOCENT + SENTENCES) - set(kept) <= {*NUMBERED}  # 42, 911 and 10 could be coordinates


def hide_box(rng, box):
    """Four coordinates as a policy might smuggle them."""
    a, b, c, d = box
    if rng.random() < .2:
        a, b, c, d = (round(x / 1000, 3) for x in box)
    glue = rng.choice([", ", ",", " ", " ; ", " / ", "-", "|", "\n", "\t", ") (", "] [", " and ", " to "])
    open_, close = rng.choice(["[]", "()", "{}", "<>", "  ", "\"\"", "**"])
    return rng.choice([
        f"{open_}{a}{glue}{b}{glue}{c}{glue}{d}{close}", f"[[{a}, {b}], [{c}, {d}]]",
        f"({a},{b}) to ({c},{d})",
        f"x1={a} y1={b} x2={c} y2={d}", f"x{a}y{b}x{c}y{d}", f"left {a}, top: {b}, right {c}, bottom = {d}",
        f"it starts at {a} and reaches down to {d}; its sides lie at {b} across the room and {c} beyond",
        f"[{a}, [1, 2, 3, 4] {b}, {c}, {d}]", f"<{a}><{b}><{c}><{d}>",
        "\u200b,".join(map(str, (a, b, c, d)))])


def hide_class(rng, name):
    return rng.choice([name, name.upper(), name.title(), f"**{name}**", f"_{name}_", name.replace(" ", "_"),
                       " ".join(name), "-".join(name), name.replace(" ", "\n"), f"({name})", f"'{name}'",
                       name[0] + "\u200b" + name[1:], f"<b>{name}</b>", name.replace(" ", ". ")])


def hide_number(rng, p):
    return rng.choice([str(p), f"{p:.6f}", f"{p:.1e}", f"{p * 100:.0f}%", f"{p * 100:.0f} percent",
                       str(p).lstrip("0"), f"0,{str(p)[2:]}", f"{p * 100:.1f} %", f"={p};", f"({p})",
                       f"{p * 100:.0f}/100"])


def test_scrubbed_text_never_holds_the_annotation():
    rng = random.Random(0)
    for trial in range(10_000):
        words = rng.choices(INNOCENT, k=8) + rng.choices(SENTENCES, k=1)
        if trial % 2:
            box = [rng.randrange(*side) for side in ((10, 500), (10, 500), (501, 1000), (501, 1001))]
            gold, hidden = boxes(box), [hide_box(rng, box) for _ in range(2)]
            secrets = [str(side) for side in box]
        else:
            classes = EMOTIONS if rng.random() < .5 else IMD
            p = rng.randrange(51, 100) / 100
            told = dict(zip(rng.sample(classes, 2), (p, round(1 - p, 2))))
            gold = mood(told, classes)
            hidden = [hide_class(rng, rng.choice(classes)), *(hide_number(rng, p) for p in told.values())]
            secrets = [*classes, *(str(p)[k:] for p in told.values() for k in (0, 1))]
        for piece in hidden:
            words.insert(rng.randrange(len(words)), piece)
        clean = rewards.scrub(" ".join(words) + rng.choice([".", "", "\n"]), gold)
        found = [secret for secret in secrets
                 if re.search(rf"(?<![a-z0-9]){re.escape(secret)}(?![a-z0-9])", clean, re.IGNORECASE)]
        assert not found and rewards.leaks(clean, gold) == [], (words, clean)
        assert rewards.scrub(clean, gold) == clean, (words, clean)


@pytest.mark.parametrize("text", [
    "joy " * 5000, "0.5" * 5000, "1 2 3 " * 3000, "[1, " * 3000, "1 [" * 4000 + "2,3,4]" * 900, "9" * 9000,
    "a." * 9000, "x1" * 5000, "<" * 9000, "one hundred " * 900, "j o " * 3000, "\ufdfa" * 8000, "((((" * 2500,
    "1, , , " * 3000, "jo" * 900 + " joy " * 90 + "y " * 900, "<a" * 4000, "1." * 5000, "1" * 9000 + "%",
])
def test_hostile_rationales_are_scrubbed_in_bounded_time(text):
    for gold in (GOLD, CUP, mood({"bottlecap": 1}, IMD)):
        start = time.perf_counter()
        clean = rewards.scrub(text, gold)
        assert rewards.scrub(clean, gold) == clean and rewards.leaks(clean, gold) == []
        rewards.leaks(text, gold)
        assert time.perf_counter() - start < 1


# ----- prompts

@pytest.mark.parametrize("gold, shown, form", [
    (TWO, TWO["answer"], "all boxes, as [[x1, y1, x2, y2], ...]"),
    (LISA, LISA["answer"], "one box, as [x1, y1, x2, y2]"), (GOLD, GOLD["answer"], "JSON object"),
    (record("B", "choice", choices=["cat", "dog"]), "be (B) dog", "letter"),
    (record("frying pan", "text"), "frying pan", "few words"),
])
def test_prompts_of_both_hops(gold, shown, form):
    first, second = rewards.cot_prompt(gold), rewards.reconstruct_prompt(gold, "It {looks} so")
    assert shown in first and shown not in second and "It {looks} so" in second and form in second
    for prompt in (first, second):
        assert "What {is} it?" in prompt and not re.search(r"\{(question|answer|rationale|form)\}", prompt)
    assert form in rewards.build_prompt(gold) and "<think>" in rewards.build_prompt(gold)
    assert rewards.cot_prompt(gold | {"meta": {"cot_prompt": "own words"}}) == "own words"
