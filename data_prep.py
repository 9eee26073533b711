r"""Data for every stage: one record schema, readers for the formats met in the wild, training sets from them.

    python data_prep.py    # the mini suite, drawn here: data/mini; and a tiny model to train on it: out/tiny

A record is one JSON line, or the same dict in memory:
    id           str   unique within a file
    question     str   may hold one `<image>` per image; without any, all images come before the text
    images       list  paths relative to the file (absolute once read), PIL images, or {"bytes", "path"} dicts
                       as `datasets` stores them (those in a parquet or Arrow file stay there: Embedded);
                       may be empty. A path may be of any file that you can read, but no pipe or device
    answer       str   the gold answer: an option's letter (several: "A, C"), function calls, JSON (boxes
                       [[x1, y1, x2, y2], ..] on a scale from 0 to 1000, probabilities {name: p}), else bare
                       text or LaTeX without $ or \boxed
    answer_type  str   one of rewards.ANSWER_TYPES: how a response is prompted for and graded
    choices      list  optional: option texts in order, the first one is A
    precision    int   optional: decimals to which a number is compared
    response     str   optional: a full target response, what sft.py learns
    system       str   optional: a system turn before the question
    task, source str   optional: `task` may pick a prompt, both group metrics
    meta         dict  optional: anything else worth keeping; `accepted` lists further answers that are right,
                       `classes` those of a distribution; RISE's `target` and `cot_prompt` (its first hop, in
                       the data set's own words)
RL needs `answer`, SFT needs `response`. An absent `answer_type` is inferred on reading.

A .jsonl, .json, .parquet, .arrow, .tsv, .csv, a folder of them or a Hub id is read if its columns are of
    records       the schema above
    MATH-Vision   id, question, options, answer, image, level, subject (the Hub form adds decoded_image)
    MathVista     question, image, choices, unit, precision, answer_type, metadata
    MathVerse     problem_version, question, answer, image, metadata
    MMMU, -Pro    id, options, answer, and question and image_1 .. image_7, or image (vision)
    MEGA-Bench    task_name, query_text, query_media, answer, metric_info, ..
                  (some metrics; data.zip must have been unpacked beside the file)
    Geometry3K    annotat_text, choices, answer: ID/data.json and ID/img_diagram.png, as first published
    RISE          problem, image, image_path, target, and answer or solution (boxes or probabilities)
    boxes         image, target, bbox (one box or a list; x1, y1, x2, y2 from 0 to 1000, or in pixels with the
                  columns width and height; x, y, width, height if the column box_format is xywh)
    COCO          an instances JSON, one record per image and category; crowds are left out
    distribution  image, distribution ({name: p})
    classes       a folder that holds a folder of images for each class
    EasyR1        images, problem, answer (Geometry3K on the Hub; its letters in `ground_truth` are ignored)
    ViRL39K       question, answer, image, qid, category, source, PassRate_32BTrained, PassRate_7BBase
                  (39Krelease.parquet, or its folder; images.zip must have been unpacked beside it)
    Reason-RFT    id, image, problem, cot, and answer or solution (its meta-JSON; `cot` is not read here)
    ShareGPT      messages or conversations (a user and an assistant, perhaps a system turn first), image or
                  images, perhaps system: as LLaMA-Factory reads it, both files of Vision-R1-cold included.
                  A turn may be a list of parts, as for OpenAI and Qwen; where an answer is needed, an
                  assistant's short turn is the gold (VLM-R1)
    verl          prompt (turns), images, reward_model.ground_truth
    generic       question, problem, query or prompt; answer, solution or ground_truth; images, image, img,
                  image_url or image_1, ..; if any, choices, options or A, B, .., or listed in the question;
                  hint or context, system, answer_type (EMMA, ScienceQA, VLMEvalKit's TSV files)
There an image is a path, file:// or base64, alone or as {"path" | "url" | "bytes"}; options are a list, an
object or {letter, content}; a gold is an option's letter, text or place, or several, or what a solution ends
with. What cannot be used (a video, an object or NaN as gold, an image on the web) is left out and counted.
A Hub id may name a configuration, `MMMU/MMMU:Art`, or with `MMMU/MMMU:*` all of them one after the other.

--source records copies the rows that can be used to OUT/SPLIT.jsonl, images of other folders to OUT/images:
    python data_prep.py --source records --input hiyouga/geometry3k --split test --out data/geometry3k
    python data_prep.py --source records --input downloads/test.parquet --out data/mathvision
    python data_prep.py --source records --input downloads/ViRL39K --pass_rate 0.1 0.9 --out data/virl39k
    python data_prep.py --source records --input instances_train2017.json --image_root DIR --out data/coco

--source reason_rft builds one of the training sets of Reason-RFT (arXiv 2503.20752) from its meta-JSON:
    python data_prep.py --source reason_rft --input META.json --form stage1 --image_root images --out data/rft
    ans_sft   prompt without tags -> the bare answer            stage1  cot_sft of the first --stage1_n rows
    cot_sft   prompt with tags -> think and answer blocks       stage2  rl of the rows after them, or of all
    rl        prompt with tags, no response
    sharegpt  ans_sft, cot_sft and stage1 for LLaMA-Factory, and OUT/dataset_info.json
It writes OUT/INPUT_FORM.jsonl (.json for sharegpt), whose images stay where they are, and a manifest: counts,
ranges of the rows used (from 1), each row left out with its reason. No later row takes its place.

--source bridge makes cold-start data as Vision-R1 does (arXiv 2503.06749), from any records with an answer:
    python data_prep.py --source bridge --input data/geometry3k/train.jsonl --out data/cold \
        --vlm_url http://gpu1:8000/v1 --vlm_model Qwen/Qwen2.5-VL-72B-Instruct \
        --reasoner_url http://gpu2:8000/v1 --reasoner_model deepseek-ai/DeepSeek-R1
A record's own response, such as LLaVA-CoT's or Mulberry's, saves the VLM's first call. Keys are read from
VLM_API_KEY and REASONER_API_KEY, else OPENAI_API_KEY, and go nowhere but into the requests. It writes
OUT/SPLIT.jsonl, a manifest, and OUT/calls.jsonl, a line per reply: the same command goes on from there.

Every error is a ValueError of one line that names the file or id at fault.
"""
import argparse
import ast
import base64
import bisect
import csv
import dataclasses
import difflib
import fcntl
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import signal
import stat
import string
import sys
import threading
import time
import urllib.parse
import urllib.request
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from tqdm import tqdm

import rewards

FIELDS = {"id": str, "question": str, "images": list, "answer": str, "answer_type": str, "choices": list,
          "precision": int, "response": str, "system": str, "task": str, "source": str, "meta": dict}
LETTERS = [*string.ascii_uppercase]
MIN_SIDE = 28              # pixels: a merged vision token of the Qwen-VL family, which refuses smaller images
MAX_RATIO = 200            # longer side / shorter side, the same family's limit
MAX_DECODED = 100_000_000  # pixels: 300 MB once decoded; a larger header is a mistake or a decompression bomb
MAX_ENCODED = 3 * MAX_DECODED  # bytes of an image file: no sound one takes more than its pixels do


# ----- records -----
def check_record(record: dict, where: str, need: tuple = ("answer",)) -> dict:
    """Return `record` as it is if it keeps the schema in the module docstring.

    `where` says in messages which file and row this is; `need` names the fields the stage cannot do without.
    Raises ValueError: one line with `where`, the id, the field and what is wrong with it.
    """
    def refuse(field, problem):
        raise ValueError(f"{where} (id {record.get('id')!r}): field {field!r} {problem}")

    for field in record:
        if field not in FIELDS:
            near = difflib.get_close_matches(field, FIELDS, 1, 0)[0]
            refuse(field, f"is unknown; did you mean {near!r}? (extra values go into 'meta')")
    for field in ("id", "question", "images", "answer_type", *need):
        if field not in record:
            refuse(field, "is missing")
    for field, value in record.items():
        if not isinstance(value, FIELDS[field]):
            refuse(field, f"must be {FIELDS[field].__name__}, not {type(value).__name__}")
    for field in ("id", *need):
        if not record[field].strip():
            refuse(field, "is empty")
    for field, kinds in (("images", (str, Path, dict, Image.Image)), ("choices", str)):
        for item in record.get(field, []):
            if not isinstance(item, kinds):
                refuse(field, f"cannot hold {type(item).__name__}")

    kind, choices = record["answer_type"], record.get("choices", [])
    if kind not in rewards.ANSWER_TYPES:
        refuse("answer_type", f"is {kind!r}, not one of {', '.join(rewards.ANSWER_TYPES)}")
    if kind in rewards.ANNOTATIONS and "answer" in record:
        try:
            check_annotation(kind, json.loads(record["answer"]), record.get("meta", {}).get("classes"))
        except ValueError as error:
            refuse("answer", f"of type {kind!r} {error}")
    if kind == "choice" and not choices:
        refuse("choices", "is missing, and answer_type is 'choice'")
    letters = LETTERS[:len(choices)]
    if kind == "choice" and not set(record.get("answer", "A").split(", ")) <= set(letters):
        refuse("answer", f"must be a letter A-{letters[-1]}, not {record['answer']!r}")
    places = "\n".join([record["question"], *choices]).count("<image>")
    if places not in (0, len(record["images"])):
        refuse("images", f"has {len(record['images'])} entries for {places} <image> placeholders")
    return record


def check_annotation(kind: str, value, classes: list[str] | None) -> None:
    """Raises ValueError unless `value` is boxes on the scale, or probabilities of known `classes`."""
    def is_box(box):
        return (isinstance(box, list) and len(box) == 4
                and all(isinstance(side, (int, float)) and 0 <= side <= 1000 for side in box))

    if kind == "boxes":
        if not isinstance(value, list) or not value or not all(map(is_box, value)):
            raise ValueError("must be a JSON list of boxes [x1, y1, x2, y2] from 0 to 1000")
        if wrong := [box for box in value if box[0] >= box[2] or box[1] >= box[3]]:
            raise ValueError(f"holds {wrong[0]}, which is not x1 < x2, y1 < y2")
    elif not isinstance(value, dict) or not all(isinstance(p, (int, float)) for p in value.values()):
        raise ValueError("must be a JSON object of probabilities")
    elif unknown := [name for name in value if classes and name not in classes]:
        raise ValueError(f"holds {unknown[0]!r}, which is not in meta['classes']")
    elif not all(0 <= p <= 1 for p in value.values()) or abs(sum(value.values()) - 1) > 0.02:
        raise ValueError(f"must add up to 1, not {sum(value.values()):g}")


def check_records(records: list[dict], source: str, need: tuple = ("answer",)) -> list[dict]:
    """Return `records` if there are any, all pass check_record and no id repeats. Raises ValueError."""
    if not records:
        raise ValueError(f"{source}: no records")
    first_row = {}
    for row, record in enumerate(records, 1):
        check_record(record, f"{source} row {row}", need)
        earlier = first_row.setdefault(record["id"], row)
        if earlier != row:
            raise ValueError(f"{source} row {row}: id {record['id']!r} was already used in row {earlier}")
    return records


def build_messages(record: dict) -> list[dict]:
    """The user's turn for a processor's apply_chat_template, after a system turn if the record has one.

    Turns hold text parts and {"type": "image"} marks, no pixels. The k-th mark stands for
    record["images"][k]; the user's text is rewards.build_prompt(record).
    """
    turns = [{"role": "user", "content": prompt_parts(rewards.build_prompt(record), record["images"])}]
    if record.get("system"):
        turns.insert(0, {"role": "system", "content": [{"type": "text", "text": record["system"]}]})
    return turns


def prompt_parts(text: str, images: list) -> list[dict]:
    """A prompt's text parts and image marks: one for each `<image>`, without any all images come first."""
    first, *rest = text.split("<image>")
    content = [] if rest else [{"type": "image"} for _ in images]
    content.append({"type": "text", "text": first})
    for text in rest:
        content += [{"type": "image"}, {"type": "text", "text": text}]
    return [part for part in content if part.get("text") != ""]


# ----- images -----
class BadImage(ValueError):
    """An image that cannot be used; the message is one line that starts with the file's name."""


def load_image(ref: str | Path | dict | Image.Image, max_pixels: int) -> Image.Image:
    """Decode one entry of record["images"] to upright RGB of at most `max_pixels` (width x height).

    The aspect ratio is kept. A shorter side under MIN_SIDE is enlarged to it, even past `max_pixels`.
    Raises BadImage: missing, damaged or truncated, over MAX_DECODED pixels, aspect ratio over MAX_RATIO.
    """
    if isinstance(ref, Image.Image):
        name = getattr(ref, "filename", "") or "PIL image"
    elif isinstance(ref, Embedded):
        name = f"image in row {ref['row'] + 1} of {ref['file']}"
    else:
        name = ref["path"] or "embedded image" if isinstance(ref, dict) else ref
    try:
        image = ref if isinstance(ref, Image.Image) else Image.open(io.BytesIO(image_bytes(ref)))
        short, long = check_size(image)
        image = to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow raises OSError, SyntaxError, EOFError, struct.error and more
        raise BadImage(f"{name}: {image_fault(error)}") from error
    scale = max(min(1, (max_pixels / (short * long)) ** 0.5), MIN_SIDE / short)
    size = tuple(max(MIN_SIDE, int(side * scale)) for side in image.size)
    return image if scale == 1 else image.resize(size, Image.Resampling.BICUBIC)


def check_size(image: Image.Image) -> tuple[int, int]:
    """(shorter, longer side), known from the header, so nothing is decoded. Raises ValueError on extremes."""
    short, long = sorted(image.size)
    if short * long > MAX_DECODED:
        raise ValueError(f"{short * long} pixels, the limit is {MAX_DECODED}")
    if long > MAX_RATIO * short:
        raise ValueError(f"aspect ratio of {image.width}x{image.height} is over {MAX_RATIO}")
    return short, long


def image_fault(error: Exception) -> str:
    """One line on why Pillow, or check_size, refused an image."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    reason = getattr(error, "strerror", None) or str(error)  # str() of a missing file repeats its path
    return " ".join(reason.split())


@functools.lru_cache(maxsize=1 << 17)  # many questions are about one image
def header_fault(path: str) -> str:
    """Why load_image is sure to refuse a file, or "" if its header gives no reason. Decodes no pixel."""
    try:
        check_file(path)
        with Image.open(path) as image:
            check_size(image)
    except Exception as error:  # Pillow raises OSError, SyntaxError, EOFError, struct.error and more
        return image_fault(error)
    return ""


def to_rgb(image: Image.Image) -> Image.Image:
    """To RGB, wide levels scaled by their own range, transparency on white. Raises ValueError on floats."""
    if image.mode == "F":
        raise ValueError("float pixels have no agreed range")
    if image.mode.startswith("I"):  # convert("L") alone clips at 255, which turns most 16-bit scans white
        image = image.convert("I")
        darkest, brightest = image.getextrema()
        black = min(darkest, 0)
        # a 12-bit scan is stored in 16 bits, and what is wider in 32
        white = next((top for top in (255, 4095, 65535) if brightest <= top), brightest)
        scale = 255 / (white - black)
        image = image.point(lambda level: level * scale + (0.5 - black * scale)).convert("L")
    if image.has_transparency_data:  # dropping alpha shows the hidden colour, often black under black lines
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def image_bytes(ref: str | Path | dict) -> bytes:
    """The encoded image behind a path or a {"bytes", "path"} dict. Raises OSError without such a file."""
    held = ref["bytes"] if isinstance(ref, dict) else None
    if held:
        return held
    path = ref["path"] if isinstance(ref, dict) else ref
    if not path:
        raise OSError("neither bytes nor a path")
    check_file(path)
    return Path(path).read_bytes()


def check_file(path: str | Path) -> None:
    """Raises OSError unless `path` is a regular file of bearable size: /dev/zero never ends."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError("not a regular file")
    if found.st_size > MAX_ENCODED:
        raise OSError(f"{found.st_size} bytes, the limit is {MAX_ENCODED}")


# ----- formats -----
class LeftOut(ValueError):
    """A sound row that cannot be used here: (reason, as it is counted; perhaps details)."""


ROLES = {"id": ("id", "pid", "qid", "sample_index", "index"),
         "question": ("question", "problem", "query", "prompt"),
         "context": ("hint", "context"), "choices": ("choices", "options"),
         "answer": ("answer", "solution", "ground_truth"), "response": ("response",),
         "image": ("images", "decoded_image", "image", "image_path", "image_1", "img", "image_url")}
CHATS = ("messages", "conversations", "prompt")  # columns that may hold turns
LONGEST_GOLD = 100  # characters of an assistant's turn, or of a solution, that can be a bare answer
SPEAKERS = {"human": "user", "gpt": "assistant", "model": "assistant"}
# columns that from_generic keeps in meta
FACTS = ("subject", "category", "l2-category", "topic", "skill", "task", "grade", "level", "type", "subfield",
         "topic_difficulty", "problem_type_goal")
MARK = re.compile(r"<image[ _]?(\d+)>")
# no answer holds control characters: they are \alpha, \boxed, \vec, \frac that lost an escape on their way
BROKEN_ESCAPES = str.maketrans({"\a": r"\a", "\b": r"\b", "\v": r"\v", "\f": r"\f"})
BALANCED = r"[^{}]*(?:\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}[^{}]*)*"  # braces at most two deep
WRAPPED = re.compile(r"(?s)<answer>(.*)</answer>|\$\$([^$]*)\$\$|\$([^$]*)\$|"
                     rf"\\(?:boxed|text)\{{({BALANCED})\}}")
NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)")
# ViRL39K, in meta: how often the 7B base model (asked on half of the rows) and the trained 32B are right
PASS_RATES = {"pass_rate_7b": "PassRate_7BBase", "pass_rate_32b": "PassRate_32BTrained"}


def clean_answer(answer) -> str:
    r"""A gold answer as bare text: no outer blanks, <answer>, $ or \boxed{}; broken LaTeX escapes mended."""
    answer = str(answer).translate(BROKEN_ESCAPES).strip()
    while wrapped := WRAPPED.fullmatch(answer):
        answer = wrapped[wrapped.lastindex].strip()
    return answer


def read_golds(answer) -> list:
    """The golds of a cell: a single one, or a list of what is right. Raises LeftOut on what is no answer."""
    golds = answer if isinstance(answer, list) else [answer]
    spelled = literal(answer)
    if isinstance(spelled, list) and all(isinstance(gold, str) for gold in spelled):
        golds = spelled  # "['A', 'C']" of a text format; [1, 2] may be an interval
    for gold in golds:
        if isinstance(literal(gold), dict):
            raise LeftOut("its answer is an object")
        if isinstance(gold, list):
            raise LeftOut("its answer holds lists")
        if gold is None or isinstance(gold, float) and not math.isfinite(gold):
            raise LeftOut(f"its answer is {gold}")
    if not golds:
        raise LeftOut("its answer is an empty list")
    if len(golds) > 1 and not all(isinstance(gold, str) for gold in golds):
        raise LeftOut("its answer is a list of numbers")  # a box, a vector, alternatives: nobody can tell
    return golds


def gold_text(gold) -> str:
    """A gold as bare text, taken out of a worked solution that ends in a tag, a box or after ####."""
    text = clean_answer(gold)
    before, box, _ = text.partition(r"\boxed")
    in_prose = box and re.search("[A-Za-z]{3,}", before)
    if "<answer>" in text or in_prose:
        text = rewards.extract_answer(text) or text
    elif "\n####" in text:
        text = text.rpartition("####")[2]
    return clean_answer(text)


def infer_type(answer: str) -> str:
    """answer_type of a gold answer without choices: number, math (LaTeX, operators, units) or text."""
    if NUMBER.fullmatch(answer):
        return "number"
    has_words = re.search(r"[A-Za-z]{3,}", answer)
    if re.search(r"[\\^√π${]", answer) or not has_words and re.search(r"[\d=+*/<>]", answer):
        return "math"
    return "text"


def read_options(value) -> tuple[list[str], list]:
    """(labels, options) of a list, of {label: option}, or of {label, option} in a list or as two columns.

    Raises LeftOut on options that are no texts, or too many.
    """
    value = listed_options(value) or literal(value) if isinstance(value, str) else value
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        value = [dict(zip(value, cells)) for cells in zip(*value.values())]
    if isinstance(value, dict):
        pairs = sorted(value.items())
    else:
        items = as_list(value)
        pairs = [labelled(option, chr(65 + k)) for k, option in enumerate(items)]
    pairs = [(str(label), option) for label, option in pairs if option is not None]
    if len(pairs) > len(LETTERS):
        raise LeftOut(f"it has more than {len(LETTERS)} options")
    bare = [re.fullmatch(rf"(?s)\(?{re.escape(label)}[).:]\s*(.+)", str(option)) for label, option in pairs]
    if all(bare):  # each says its letter again
        pairs = [(label, text[1]) for (label, _), text in zip(pairs, bare)]
    return [label for label, _ in pairs], [option for _, option in pairs]


def labelled(option, letter: str) -> tuple:
    """(label, option) of an item of a list of options, `letter` if it has no label of its own."""
    if not isinstance(option, dict):
        return letter, option
    own = [option[name] for name in ("letter", "label", "key", "id") if option.get(name) is not None]
    texts = [option[name] for name in ("content", "text", "value", "option") if name in option]
    if not texts:
        raise LeftOut("its options are no texts")
    return (own or [letter])[0], texts[0]


def option_letter(gold, labels: list[str], options: list) -> str:
    """The letter of the option that a gold names, by its label, text or 0-based place; "" if it names none.

    What is said exactly comes first: "B" is the second option even if the first one's text is B.
    """
    number = isinstance(gold, (int, float)) and not isinstance(gold, bool)
    if number and gold in options:
        return LETTERS[options.index(gold)]
    if number and gold in range(len(options)) and str(gold) not in labels:
        return LETTERS[int(gold)]
    text = gold_text(gold)
    texts = [str(option) for option in options]
    if isinstance(gold, bool) and {"yes", "no"} <= {each.casefold() for each in texts}:
        text = "yes" if gold else "no"
    for names in labels, texts:
        if text in names:
            return LETTERS[names.index(text)]
    bare = text.strip(" (){}.:").casefold()
    for names in texts, labels:
        folded = [name.strip(" (){}.:").casefold() for name in names]
        if bare and bare in folded:
            return LETTERS[folded.index(bare)]
    both = re.fullmatch(r"\(?(\w+)[).:]+\s*(.+)", text)  # "B. dog", "(B) dog"
    if both and both[1] in labels and both[2] == texts[labels.index(both[1])].strip():
        return LETTERS[labels.index(both[1])]
    return ""


def option_letters(golds: list, labels: list[str], options: list) -> str:
    """The options that golds name: "A, C" of ["A", "C"], "AC" or "(A) and (C)"; "" if they name others."""
    letters = [option_letter(gold, labels, options) for gold in golds]
    if letters == [""]:
        letters = re.sub(r"\band\b|[\s,;&.()]", "", gold_text(golds[0]))
        letters = letters if letters.isupper() and set(letters) <= {*labels} & {*LETTERS} else ""
        letters = [LETTERS[labels.index(letter)] for letter in letters]
    return ", ".join(sorted(set(letters))) if all(letters) else ""


def answer_fields(answer, choices: list | None = None, labels: list[str] = LETTERS) -> dict:
    """The record fields `answer`, unless it is None, and `choices`, unless there are none. Raises LeftOut.

    With choices the gold becomes their letter or letters. Without them a list holds several golds of which
    any is right: the others go into meta.
    """
    fields = {"choices": [str(choice) for choice in choices]} if choices else {}
    if answer is None:
        return fields
    golds = read_golds(answer)
    letters = option_letters(golds, labels[:len(choices)], choices) if choices else ""
    first, *others = map(gold_text, golds)
    if others and not letters:
        fields["meta"] = {"accepted": others}
    return fields | {"answer": letters or first}


def pick(row: dict, role: str):
    """The row's value for a role: the first that is not empty, else an empty one, else None."""
    values = [row[column] for column in ROLES[role] if row.get(column) is not None]
    return next((value for value in values if value not in ("", [])), values[0] if values else None)


def literal(value):
    """The Python list or dict that a string spells, as text formats store them; anything else as it is."""
    try:
        return ast.literal_eval(value) if isinstance(value, str) and value[:1] in ("[", "{") else value
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value


def as_list(value) -> list:
    """The items of a list, or of a string that spells one; a single value is one item, an empty one none."""
    value = literal(value)
    return value if isinstance(value, list) else [] if value in (None, "") else [value]


def row_images(row: dict) -> list:
    """The row's images, be there none, one or many, as paths or as bytes."""
    return [ref for ref in as_list(pick(row, "image")) if ref not in (None, "")]


def place_images(texts: list[str], images: dict) -> tuple[list[str], list]:
    """Turn the marks <image 1>, <image_2>, .. into `<image>`; returns the texts and the images in that order.

    An image without a mark comes before the first text; a mark met again, or without an image, becomes words.
    """
    placed = []

    def place(mark):
        if (k := int(mark[1])) in placed or k not in images:
            return f"(image {k})"
        placed.append(k)
        return "<image>"

    texts = [MARK.sub(place, text) for text in texts]
    if not placed:
        return texts, [*images.values()]
    rest = [k for k in images if k not in placed]
    return ["<image>" * len(rest) + texts[0], *texts[1:]], [images[k] for k in rest + placed]


def from_record(row: dict, index: int) -> dict:
    """The schema at the top of this file."""
    return row


def from_mathvision(row: dict, index: int) -> dict:
    """MATH-Vision: <image1>..<image7> name parts of one composite picture, so they turn into words."""
    def mention(text):
        return MARK.sub(r"(image \1)", text).strip()

    choices = [mention(option) for option in as_list(pick(row, "choices"))]
    bare = [option.strip("().") for option in choices]
    if bare == LETTERS[:len(bare)]:  # options drawn in the picture have only a name here: "(A)", "A)" or "A"
        choices = bare
    return {"id": str(pick(row, "id")), "question": mention(row["question"]), "images": row_images(row),
            **answer_fields(row["answer"], choices), "source": "mathvision",
            "meta": {"level": int(row["level"]), "subject": row.get("subject") or row["category"]}}


def from_rise(row: dict, index: int) -> dict:
    """RISE (arXiv 2508.13229): its problem states the annotation, so it is kept for the first hop alone."""
    gold = pick(row, "answer")
    try:
        if isinstance(gold, str):
            gold = json.loads(clean_answer(gold).replace("'", '"'))
    except ValueError as error:
        raise ValueError(f"answer {gold[:60]!r} is neither boxes nor probabilities") from error
    row = {"id": index, **row, "bbox": gold, "distribution": gold}
    record = from_distribution(row, index) if isinstance(gold, dict) else from_boxes(row, index)
    meta = {**record["meta"], "target": row["target"], "cot_prompt": row["problem"]}
    return record | {"source": "rise", "meta": meta}


def from_boxes(row: dict, index: int) -> dict:
    """Boxes of what `target` says: one is asked for as in LISA, a list as in COCO."""
    bbox, size = row["bbox"], (row.get("width", 1000), row.get("height", 1000))
    if not isinstance(bbox, list) or not bbox:
        raise ValueError(f"bbox {bbox!r} is neither a box nor a list of boxes")
    single = not isinstance(bbox[0], list)
    boxes = [scaled_box(box, size, row.get("box_format", "xyxy")) for box in ([bbox] if single else bbox)]
    asked = "Which part of the picture is meant: {}?" if single else "Find every {} in the picture."
    return {"id": str(row.get("id", index)), "question": asked.format(row["target"]),
            "images": row_images(row), "answer": json.dumps(boxes), "answer_type": "boxes",
            "task": "ground" if single else "detect", "meta": {"target": row["target"]}}


def scaled_box(box: list, size: tuple[int, int], box_format: str) -> list[int]:
    """[x1, y1, x2, y2] from 0 to 1000 of a box in pixels, xyxy or xywh. Raises ValueError if it is no such.

    The conventions cannot be told apart in general, so what a box says must at least be possible.
    """
    if box_format not in ("xyxy", "xywh"):
        raise ValueError(f"box_format is {box_format!r}, not xyxy or xywh")
    if not isinstance(box, list) or [*map(isinstance, box, [(int, float)] * 9)] != [True] * 4:
        raise ValueError(f"bbox {box!r} is not four numbers")
    x, y, right, bottom = box
    if box_format == "xywh":
        right, bottom = x + right, y + bottom
    if not (-1 <= x < right <= size[0] + 1 and -1 <= y < bottom <= size[1] + 1):
        raise ValueError(f"bbox {box} is no {box_format} box within {size[0]}x{size[1]}")

    def scaled(value, side):
        return min(max(round(1000 * value / side), 0), 1000)

    width, height = size
    x1, x2 = scaled(x, width), scaled(right, width)
    y1, y2 = scaled(y, height), scaled(bottom, height)
    return [min(x1, 999), min(y1, 999), max(x2, x1 + 1), max(y2, y1 + 1)]  # an object is never empty


def from_distribution(row: dict, index: int) -> dict:
    """Probabilities by name, as in EMO6."""
    classes = list(row["distribution"])
    return {"id": str(row.get("id", index)), "question": distribution_question(classes),
            "images": row_images(row), "answer": json.dumps(row["distribution"], ensure_ascii=False),
            "answer_type": "distribution", "meta": {"classes": classes}}


def distribution_question(classes: list[str]) -> str:
    return f"How likely is each of these: {', '.join(classes)}?"


def from_class(row: dict, index: int) -> dict:
    """An image of one of several classes, as class_rows finds them."""
    return {"id": row["id"], "question": f"Which of these is in the picture: {', '.join(row['classes'])}?",
            "images": row_images(row), "answer": row["class"], "answer_type": "text", "task": "classify",
            "meta": {"classes": row["classes"]}}


def from_easyr1(row: dict, index: int) -> dict:
    """EasyR1's columns: open questions, even where Geometry3K also lists `choices` and the right letter."""
    return from_generic(row | {"choices": None, "options": None}, index)


LABELS = [re.compile(label) for label in (r"(?<!\S)([A-K])\s?[.:)]\s*", r"\(([A-K])\)\s*")]


def listed_options(question: str) -> list[str]:
    """Texts of the options that a question lists as A., B., .. or (A), (B), ..: its longest list, or none."""
    listed = []
    for label in LABELS if rewards.HAS_OPTIONS.search(question) else []:
        marks = list(label.finditer(question))
        for i in range(len(marks)):
            run = []
            for mark in marks[i:]:
                if mark[1] == LETTERS[len(run)]:
                    run.append(mark)
            listed = max(run, listed, key=len)  # of equal ones the last: letters named earlier may be points
    ends = [mark.start() for mark in listed[1:]] + [len(question)]
    texts = [question[mark.end():end].strip().partition("\n")[0] for mark, end in zip(listed, ends)]
    # an option that is a picture, or drawn in one, has only its letter for a name
    texts = [text.replace("<image>", "").strip(" ,;") or letter for text, letter in zip(texts, LETTERS)]
    return texts if len(texts) > 1 else []


def from_virl39k(row: dict, index: int) -> dict:
    """ViRL39K (VL-Rethinker, arXiv 2504.08837): options are in the question, a pass rate of -1 is unknown."""
    images = [ref for ref in as_list(row["image"]) if ref]
    question = row["question"]
    if question.count("<image>") != len(images):  # some rows lost a mark: images first, as its authors prompt
        question = question.replace("<image>", "").strip()
    meta = {"category": row["category"], "source": row["source"]}
    for name, column in PASS_RATES.items():
        rate = row.get(column)
        meta[name] = rate if rate is not None and rate >= 0 else None  # NaN is not >= 0 either
    return {"id": str(row["qid"]), "question": question, "images": images,
            **gold_fields({"answer": row["answer"]}, question), "source": "virl39k", "meta": meta}


CALL_VALUES = {"change_size": "small medium large",
               "change_color": "yellow gray cyan blue brown green red purple",
               "change_material": "glass metal rubber", "change_shape": "cube sphere cylinder",
               "change_position": "front behind left right front_left front_right behind_left behind_right"}


def check_calls(answer: str) -> None:
    """Raises ValueError unless `answer` is one or more calls of Reason-RFT's functions on allowed values."""
    calls = rewards.CALL.findall(answer)
    if rest := rewards.CALL.sub("", answer).strip(" ,;\n[]"):
        raise ValueError(f"answer holds {rest[:40]!r} besides calls")
    if not calls:
        raise ValueError("answer holds no call, and two images make it a transformation")
    for function, _, value in calls:
        if value not in CALL_VALUES.get(function, "").split():
            raise ValueError(f"answer holds {function}(.., {value!r}), no such function or value")


def from_reason_rft(row: dict, index: int) -> dict:
    """A row of Reason-RFT's meta-JSON, as RL takes it. Two images or calls make it a transformation.

    A gold that is exactly one letter A-D, or the text of an option that the question lists, makes a choice.
    """
    question, answer, images = pick(row, "question"), pick(row, "answer"), row_images(row)
    images = [ref["path"] if isinstance(ref, dict) else ref for ref in images]
    if not isinstance(question, str) or not question.strip():
        raise ValueError("problem is missing or empty")
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)) or not str(answer).strip():
        raise ValueError("answer is missing, empty or no text")
    if not images or not all(isinstance(ref, str) and ref for ref in images):
        raise ValueError("image is missing, empty or no path")
    if question.count("<image>") != len(images):  # often one mark for two images
        question = question.replace("<image>", "").strip()
    name = index if row.get("id") is None else row["id"]
    record = {"id": str(name), "question": question, "images": images}
    gold, options = clean_answer(answer), listed_options(question)
    if len(images) == 2 or any(function in CALL_VALUES for function, *_ in rewards.CALL.findall(gold)):
        check_calls(gold)
        if len(images) != 2:
            raise ValueError(f"a transformation has 2 images, not {len(images)}")
        return record | {"answer": gold, "answer_type": "calls", "task": "transform",
                         "source": "reason_rft_transformation",
                         "meta": {"steps": len(rewards.CALL.findall(gold))}}
    if gold in LETTERS[:max(len(options), 4)] or gold in options:
        fields = answer_fields(gold, options or LETTERS[:4]) | {"answer_type": "choice"}
    else:
        fields = {"answer": gold, "answer_type": infer_type(gold)}
    of_structure = re.search("geomath|structure", record["id"])
    if gold.isdecimal() and fields["answer_type"] == "number" and not of_structure:
        return record | fields | {"task": "counting", "source": "reason_rft_counting"}
    return record | fields | {"task": "structure", "source": "reason_rft_structure"}


def sharegpt_prompt(record: dict) -> str:
    """The prompt as LLaMA-Factory wants it: one `<image>` per image, where build_messages puts them."""
    prompt = rewards.build_prompt(record)
    return prompt if "<image>" in prompt else "<image>" * len(record["images"]) + prompt


# column of the turns; in a turn who speaks and what; user and assistant; column of the images.
# Vision-R1-cold (arXiv 2503.06749) is one file of each of the last two.
LAYOUTS = {"sharegpt": ("messages", "role", "content", "user", "assistant", "image"),
           "llava_cot": ("conversations", "from", "value", "human", "gpt", "image"),
           "mulberry": ("conversations", "from", "value", "user", "assistant", "images")}


def to_sharegpt(record: dict, layout: str = "sharegpt") -> dict:
    """A record with a response as a ShareGPT row; the columns after the turns let from_sharegpt restore it.

    The image column is always a list, because one file must not hold both strings and lists there.
    """
    turns, speaker, text, user, assistant, images = LAYOUTS[layout]
    others = {field: value for field, value in record.items() if field not in ("id", "images", "response")}
    return {"id": record["id"], images: record["images"],
            turns: [{speaker: user, text: sharegpt_prompt(record)},
                    {speaker: assistant, text: record["response"]}], **others}


def read_turns(row: dict, column: str) -> dict:
    """The row with its turns as {"role", "content": text}, and the images shown in them as its images.

    Raises KeyError or TypeError on what are no turns, LeftOut if one shows a video.
    """
    stored, turns, shown = row[column], [], []
    for turn in json.loads(stored) if isinstance(stored, str) else stored:
        speaker = turn["from"] if "from" in turn else turn["role"]
        content = turn["value"] if "value" in turn else turn["content"]
        turns.append({"role": SPEAKERS.get(speaker, speaker), "content": read_parts(content, shown)})
    return row | {column: turns} | ({"images": shown} if shown else {})


def read_parts(content, shown: list) -> str:
    """The text of a turn, `<image>` where it shows an image; `shown` gets those that are in it."""
    if isinstance(content, str):
        return content
    text = ""
    for part in content if isinstance(content, list) else [content]:
        part = {"text": part} if isinstance(part, str) else part
        kind = part.get("type") or ""
        if "video" in kind or "audio" in kind or part.get("video"):
            raise LeftOut("it shows a video" if "audio" not in kind else "it plays a sound")
        ref = next((part[key] for key in ("image_url", "image", "url", "path") if part.get(key)), None)
        if ref is not None:
            shown.append(ref)
        text += "<image>" if ref is not None or "image" in kind else part["text"]
    return text


def questions(row: dict, index: int) -> list[dict]:
    """The row, or where a LLaVA conversation has several questions about an image one row for each.

    What came before is not in them: Vision-R1, too, had each question answered by itself.
    """
    turns = row.get("conversations")
    if not isinstance(turns, list) or len(turns) < 4:
        return [row]
    row = read_turns(row, "conversations")
    turns, first = row["conversations"], len(turns) % 2  # a system turn
    return [row | {"conversations": turns[:first] + turns[k:k + 2], "id": f"{row.get('id', index)}.{k // 2}"}
            for k in range(first, len(turns), 2)]


CONCLUSION = re.compile(r"<CONCLUSION>(.*?)</CONCLUSION>", re.DOTALL)  # LLaVA-CoT's answer tag


def stated_answer(response: str) -> str | None:
    """The answer that a response names in a tag, a box or words ("the answer is"), else None."""
    text = CONCLUSION.sub(r"<answer>\1</answer>", response)
    said = rewards.extract_answer(text)
    return said.strip(" :*") if said and said != text[-rewards.TAIL:].strip() else None


def from_sharegpt(row: dict, index: int) -> dict:
    """Turns of one question and perhaps its answer, in any of LAYOUTS; to_sharegpt's columns may be missing.

    Without them, or where the prompt is no longer theirs, the question is the user's text as it stands.
    """
    column = next((name for name in CHATS if row.get(name) is not None), "messages")
    row = read_turns(row, column)
    said = [(turn["role"], turn["content"]) for turn in row[column]]
    record = {field: row[field] for field in FIELDS if row.get(field) is not None}
    if said and said[0][0] == "system":
        record["system"] = said.pop(0)[1]
    speakers, gold = [speaker for speaker, _ in said], pick(row, "answer")
    if speakers != ["user", "assistant"] and (speakers != ["user"] or gold is None):
        raise ValueError(f"{column} are by {', '.join(map(str, speakers))}, not by user, assistant")
    prompt, response = said[0][1], said[1][1] if said[1:] else row.get("response")
    name = row.get("id")
    record |= {"id": str(index if name is None else name), "images": row_images(row), "response": response}
    if {"question", "answer_type"} <= set(record) and sharegpt_prompt(record) == prompt:
        return record
    if column == "conversations":  # LLaVA's ids name a picture or a source, which repeats
        paths = [ref for ref in record["images"] if isinstance(ref, str)]
        record["id"] = f"{name or (paths or [''])[0]}:{index}"
    if gold in (None, "") and response:
        gold = stated_answer(response)
    record = {field: record[field] for field in record if field not in ("answer", "answer_type", "choices")}
    return record | {"question": prompt, "task": "plain", **gold_fields(row | {"answer": gold}, prompt)}


def gold_fields(row: dict, question: str) -> dict:
    """answer_fields of a row, whose options are in a column, in columns A, B, .. or in the question.

    Raises LeftOut on a gold that cannot be one.
    """
    gold = pick(row, "answer")
    if gold == row.get("solution") and len(str(gold)) > LONGEST_GOLD:
        gold = stated_answer(gold_text(gold)) or gold_text(gold)
        if len(gold) > LONGEST_GOLD:
            raise LeftOut("its solution states no answer")
    labels, options = read_options(pick(row, "choices"))
    if not options:
        labels = [letter for letter in LETTERS if row.get(letter) not in (None, "")]
        options = [row[letter] for letter in labels]
    if not options and gold is not None:
        listed = listed_options(question)
        labels = LETTERS[:len(listed)]
        # one of them only: the gold AB may well be a segment
        options = listed if all(option_letter(each, labels, listed) for each in read_golds(gold)) else []
    return answer_fields(gold, options, labels)


def from_generic(row: dict, index: int) -> dict:
    """Any row with a question, images, and an answer or a response; options in a list or columns A, B, .."""
    if isinstance(row.get("prompt"), list) and pick(row, "question") is row["prompt"]:  # TRL's turns
        return from_sharegpt(row, index)
    asked = "\n".join(filter(None, (pick(row, "context"), pick(row, "question"))))
    kind, gold = row.get("answer_type"), pick(row, "answer")
    if kind in rewards.ANNOTATIONS and gold is not None:
        fields = {"answer": gold if isinstance(gold, str) else json.dumps(gold, ensure_ascii=False)}
    else:
        fields = gold_fields(row, asked)
    numbered = {k: row[f"image_{k}"] for k in range(1, 10) if row.get(f"image_{k}")}
    texts, images = place_images([asked, *fields.get("choices", [])],
                                 numbered or dict(enumerate(row_images(row), 1)))
    if "choices" in fields:
        fields["choices"] = texts[1:]
    name, precision = pick(row, "id"), row.get("precision")
    facts = {fact: row[fact] for fact in FACTS if row.get(fact) is not None} | fields.get("meta", {})
    return fields | {
        "id": str(index if name is None else name), "question": texts[0], "images": images,
        "answer_type": kind if kind in rewards.ANSWER_TYPES and "choices" not in fields else None,
        "response": row.get("response"), "system": row.get("system"),
        "precision": None if precision is None else int(float(precision)), "meta": facts or None}


def from_mathvista(row: dict, index: int) -> dict:
    """MathVista: a gold option is its text, even if that is another's letter; numbers have a set form."""
    places, unit, options = row["precision"], row["unit"], as_list(row["choices"])
    form = {"integer": "Give a whole number.", "list": "Give a Python list.",
            "float": f"Decimal places: {places:g}." if places else ""}
    words = row["question"], unit and f"(unit: {unit})", form.get(row["answer_type"])
    letters = [letter for letter, option in zip(LETTERS, options) if option == row["answer"]]
    gold, *accepted = letters or [row["answer"] or None]  # three rows list the gold option twice
    return from_generic(row | {"question": " ".join(filter(None, words)), "answer": gold}, index) | {
        "source": "mathvista", "answer_type": None, "meta": literal(row["metadata"]) | {"accepted": accepted}}


def from_mathverse(row: dict, index: int) -> dict:
    """MathVerse: a question lists its options, or is in the picture (Vision Only). A gold may be several."""
    question, gold = ((row[column] or "").replace("掳", "°") for column in ("question", "answer"))
    options = listed_options(question or row.get("question_for_eval") or "")
    if not options and row["question_type"] == "multi-choice":
        options = LETTERS[:6]
    golds = gold.splitlines()
    if option_letters(golds, LETTERS[:len(options)], options):
        gold = golds
    else:
        options = []
    return from_generic(row | {"question": question, "choices": options, "answer": gold}, index) | {
        "source": "mathverse", "task": None if question else "pictured",
        "meta": {"version": row["problem_version"], **literal(row["metadata"])}}


DISCIPLINES = {subject: discipline for discipline, subjects in {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine "
                           "Pharmacy Public_Health",
    "Humanities and Social Science": "History Literature Psychology Sociology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics "
                            "Energy_and_Power Materials Mechanical_Engineering"}.items()
    for subject in subjects.split()}


def from_mmmu(row: dict, index: int) -> dict:
    """MMMU, and MMMU-Pro, whose `vision` rows have the question in the picture. A hidden gold is "?"."""
    subject = row.get("subject") or "_".join(row["id"].split("_")[1:-1])  # validation_Art_Theory_1
    gold, *accepted = map(str, as_list(row["answer"]) or "?")
    record = from_generic(row | {"answer": None if gold == "?" else gold}, index)
    facts = {"subject": subject, "discipline": DISCIPLINES.get(subject), "accepted": accepted}
    return record | {"source": "mmmu", "task": None if row.get("question") else "pictured",
                     "meta": (record["meta"] or {}) | {fact: value for fact, value in facts.items() if value}}


# MEGA-Bench's metrics that a grader of rewards.py stands for. Not covered: answers of several fields, lists,
# sets and dicts, boxes, points and distances, similarities, programs, plans, and those of a judge model.
MEGA_BENCH = {"exact_str_match": "text", "exact_str_match_case_insensitive": "text",
              "simple_str_match": "text", "multi_ref_phrase": "text", "positive_int_match": "number",
              "latex_expr_equality": "math", "general_single_numerical_match": "number",
              "boxed_single_numerical_match": "number"}


def from_mega_bench(row: dict, index: int) -> dict:
    """MEGA-Bench: rows with images and one answer under a metric of MEGA_BENCH. Raises LeftOut for others."""
    golds = {field: gold for field, gold in literal(row["answer"]).items() if not field.startswith("##")}
    metrics = literal(row["metric_info"])["field_score_function"]
    media = sum((as_list(row[f"{part}_media"]) for part in ("global", "example", "query")), [])
    if len(golds) != 1 or (metric := metrics.get(*golds)) not in MEGA_BENCH:
        raise LeftOut("its metric is not covered")
    if not all(path.lower().endswith((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")) for path in media):
        raise LeftOut("it shows a video")
    question = "\n".join(filter(None, (row["task_description"], row["example_text"], row["query_text"])))
    if question.count("<image>") != len(media):
        question = question.replace("<image>", "").strip()
    [gold] = golds.values()
    gold, *accepted = map(clean_answer, as_list(gold) if metric == "multi_ref_phrase" else [gold])
    return {"id": str(row["id"]), "question": question, "images": media, "answer": gold,
            "answer_type": MEGA_BENCH[metric], "source": "mega-bench",
            "meta": {"task": row["task_name"], "accepted": accepted}}


def from_geometry3k(row: dict, index: int) -> dict:
    """Geometry3K as first published: four options, a folder for each problem."""
    images = [f"{row['id']}/img_diagram.png"]
    return from_generic(row | {"question": row["annotat_text"], "images": images}, index) | {
        "source": "geometry3k"}


# the first match wins; anything else is from_generic's, if it has a column for every role
FORMATS = [
    ({"messages"}, from_sharegpt),
    ({"conversations"}, from_sharegpt),
    ({"id", "question", "images", "answer_type"}, from_record),
    ({"id", "question", "images", "response"}, from_record),
    ({"id", "question", "options", "answer", "image", "level", "subject"}, from_mathvision),
    ({"index", "question", "choices", "answer", "image", "level", "category"}, from_mathvision),
    ({"question", "image", "choices", "unit", "precision", "answer_type", "metadata"}, from_mathvista),
    ({"problem_version", "question", "answer", "image", "metadata"}, from_mathverse),
    ({"id", "question", "options", "answer", "image_1"}, from_mmmu),
    ({"id", "image", "options", "answer", "subject"}, from_mmmu),
    ({"task_name", "query_text", "query_media", "answer", "metric_info"}, from_mega_bench),
    ({"id", "annotat_text", "choices", "answer"}, from_geometry3k),
    ({"problem", "image", "image_path", "target"}, from_rise),
    ({"image", "target", "bbox"}, from_boxes),
    ({"image", "distribution"}, from_distribution),
    ({"image", "class", "classes"}, from_class),
    ({"problem", "cot"}, from_reason_rft),
    ({"images", "problem", "answer"}, from_easyr1),
    ({"question", "answer", "image", "qid", "PassRate_32BTrained"}, from_virl39k),
]


def detect_format(columns: list[str], need: tuple) -> Callable[[dict, int], dict]:
    """The from_<format> for rows with these columns. Raises ValueError naming the role no column plays."""
    for required, from_format in FORMATS:
        if required <= set(columns):
            return from_format
    for role in ("question", "image", *need):
        if not set(ROLES[role]) & set(columns):
            expected, found = " or ".join(ROLES[role][:2]), ", ".join(columns)
            raise ValueError(f"no {role} column: expected {expected}, found {found}")
    return from_generic


# ----- images inside tables -----
DIRECT = 4 << 20  # bytes of a row group's column up to which it is decoded at each miss, not unpacked once
PIECE = 8 << 20   # bytes read at once when a larger one is unpacked


class Embedded(dict):
    """An image in a table: {"file", "split", "row", "at", "path"}. Its ["bytes"] are read there each time.

    So a record is as small as if the image were a file, and the page cache holds what several ranks read.
    """

    def __missing__(self, key):
        if key != "bytes":
            raise KeyError(key)
        column, *keys = self["at"]
        find = parquet_cell if self["file"].endswith(".parquet") else dataset_cell
        cell = find(self["file"], self["split"], self["row"], column)
        for key in keys:
            cell = cell[key]
        return cell.as_py()


def parquet_rows(file: str) -> Iterator[dict]:
    """Yield the rows of a parquet file, its images as Embedded: of their columns no bytes are read.

    A column of nothing but bytes does not say without them which rows have an image: it is read, not kept.
    """
    from pyarrow.parquet import ParquetFile
    table = ParquetFile(file, memory_map=True)
    read, columns = [], set()
    for k in range(len(table.schema)):
        leaf = table.schema.column(k)
        if leaf.physical_type != "BYTE_ARRAY" or leaf.logical_type.type != "NONE":
            read.append(leaf.path)
            columns.add(leaf.path.split(".")[0])
    read += [name for name in table.schema_arrow.names if name not in columns]
    batches = table.iter_batches(batch_size=64, columns=read, use_threads=False)
    yield from rows_of(batches, table.schema_arrow, file, "")


def dataset_rows(source: str, split: str) -> Iterator[dict]:
    """Yield the rows of what `datasets` opens, their images as Embedded. Raises OSError or ValueError."""
    table = DATASETS[source, split] = open_dataset(source, split).with_format("arrow")
    batches = (batch for part in table.iter(batch_size=64) for batch in part.to_batches())
    yield from rows_of(batches, table.features.arrow_schema, source, split)


def rows_of(batches: Iterable, schema, file: str, split: str) -> Iterator[dict]:
    """Rows of Arrow record batches of this `schema`, whose bytes may not have been read."""
    row = 0
    for batch in batches:
        columns = [outline(batch.column(name), schema.field(name).type) for name in batch.schema.names]
        for cells in zip(*columns):
            place = {"file": file, "split": split, "row": row}
            yield {name: embedded(cell, place, [name]) for name, cell in zip(batch.schema.names, cells)}
            row += 1


def outline(array, kind) -> list:
    """Python values of an Arrow array of type `kind`, with ... for bytes, whether they were read or not."""
    from pyarrow import compute, types
    if types.is_binary(kind) or types.is_large_binary(kind):
        return [... if there else None for there in array.is_valid().to_pylist()]
    if types.is_list(kind) or types.is_large_list(kind):
        items = iter(outline(array.flatten(), kind.value_type))
        lengths = compute.list_value_length(array).to_pylist()
        return [None if length is None else [*itertools.islice(items, length)] for length in lengths]
    if types.is_struct(kind):
        read = {field.name for field in array.type}
        fields = [outline(array.field(field.name), field.type) if field.name in read else [...] * len(array)
                  for field in kind]
        names, valid = [field.name for field in kind], array.is_valid().to_pylist()
        return [dict(zip(names, cells)) if there else None for *cells, there in zip(*fields, valid)]
    return array.to_pylist()


def embedded(value, place: dict, at: list):
    """The value with an Embedded where outline left ... for bytes, or for the bytes of {"bytes", "path"}."""
    if value is ...:
        return Embedded(place, at=at, path=None)
    if isinstance(value, dict):
        if value.get("bytes") is ...:
            return Embedded(place, at=[*at, "bytes"], path=value.get("path"))
        return {name: embedded(part, place, [*at, name]) for name, part in value.items()}
    if isinstance(value, list):
        return [embedded(part, place, [*at, k]) for k, part in enumerate(value)]
    return value


DATASETS = {}  # open ones by (source, split): memory-mapped, and still there in a forked worker


def dataset_cell(source: str, split: str, row: int, column: str):
    """A cell of what `datasets` opens, as an Arrow scalar."""
    if (source, split) not in DATASETS:
        DATASETS[source, split] = open_dataset(source, split).with_format("arrow")
    return DATASETS[source, split][row][column][0]


def parquet_cell(file: str, split: str, row: int, column: str):
    """A cell of a parquet file, as an Arrow scalar, from the decoded row group or a mapped copy of it."""
    version = os.stat(file).st_mtime_ns
    _, first_rows, sizes = parquet_groups(file, version)
    group = bisect.bisect_right(first_rows, row) - 1
    find = decoded_group if sizes[group, column] <= DIRECT else unpacked_group
    return find(file, version, group, column)[row - first_rows[group]]


@functools.lru_cache(maxsize=256)
def parquet_groups(file: str, version: int) -> tuple:
    """(metadata, first row of each row group, bytes of each column by (group, name)) of a parquet file."""
    from pyarrow.parquet import read_metadata
    metadata, first_rows, sizes = read_metadata(file), [], Counter()
    row = 0
    for k in range(metadata.num_row_groups):
        group = metadata.row_group(k)
        first_rows.append(row)
        row += group.num_rows
        for c in range(group.num_columns):
            leaf = group.column(c)
            sizes[k, leaf.path_in_schema.split(".")[0]] += leaf.total_uncompressed_size
    return metadata, first_rows, sizes


@functools.lru_cache(maxsize=2)
def decoded_group(file: str, version: int, group: int, column: str):
    """A column of a row group, in memory."""
    from pyarrow.parquet import ParquetFile
    table = ParquetFile(file, metadata=parquet_groups(file, version)[0], memory_map=True)
    return table.read_row_group(group, columns=[column], use_threads=False)[column]


@functools.lru_cache(maxsize=64)
def unpacked_group(file: str, version: int, group: int, column: str):
    """A column of a row group, mapped from an uncompressed copy that the first to need it makes.

    All ranks and workers share its pages. It lies in the cache, where anything may be deleted at any time;
    without room there the column is decoded in memory.
    """
    import pyarrow
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(f"{file} {version} {group} {column}".encode()).hexdigest()[:24]
    path = cache / "nanovlr" / f"{name}.arrow"
    try:
        if not path.exists():
            unpack_group(file, version, group, column, path)
        return pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()[column]
    except OSError as error:
        warnings.warn(f"{file}: its images are decoded in memory, which is slow: {error}")
        return decoded_group(file, version, group, column)


def unpack_group(file: str, version: int, group: int, column: str, path: Path) -> None:
    """Write a column of a row group to an Arrow file; of several processes one does. Raises OSError."""
    import pyarrow
    from pyarrow.parquet import ParquetFile
    metadata, _, sizes = parquet_groups(file, version)
    rows = metadata.row_group(group).num_rows
    table = ParquetFile(file, metadata=metadata, memory_map=True)
    batches = table.iter_batches(max(1, rows * PIECE // sizes[group, column]), row_groups=[group],
                                 columns=[column], use_threads=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("ab") as out:
        fcntl.flock(out, fcntl.LOCK_EX)
        try:
            if path.exists():  # another process made it meanwhile
                return
            out.truncate(0)  # what a killed one left
            schema = pyarrow.schema([table.schema_arrow.field(column)])
            with pyarrow.ipc.new_file(out, schema) as writer:
                for batch in batches:
                    writer.write_batch(batch)
            out.flush()
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
            fcntl.flock(out, fcntl.LOCK_UN)  # a worker forked meanwhile would hold it
    del batches, table
    pyarrow.default_memory_pool().release_unused()  # a page may be 200 MB, and the pool would keep it


# ----- reading and writing -----
FILES = (".jsonl", ".json", ".parquet", ".arrow", ".tsv", ".csv")
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::(.+))?")


def read_records(source: str | Path, split: str = "train", need: tuple = ("answer",),
                 limit: int = 0, image_root: str = "") -> list[dict]:
    """All records (the first `limit`; 0 for all) of a file, folder or Hub id in a format named at the top.

    A folder comes from save_to_disk or is a copy of a Hub repository; `split` is for folders and Hub ids.
    Images are not decoded, those in a parquet or Arrow file not read; paths come back absolute. `need` is
    ("answer",) for RL and evaluation, ("response",) for SFT. Paths are relative to `image_root`, else to the
    file. Rows that cannot be used are left out, which rank 0 says on stderr.
    Raises ValueError: unreadable source, unknown format, no usable row, or one that check_record refuses.
    """
    try:
        rows = [lifted(row) for row in itertools.islice(stored_rows(str(source), split), limit or None)]
        columns = dict.fromkeys(itertools.chain.from_iterable(rows))  # some rows may lack some
        from_format = detect_format([*columns], need) if rows else from_record
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{source}: {' '.join(str(error).split())}") from error
    path = Path(source).absolute()
    folder = Path(image_root).absolute() if image_root else path if path.is_dir() else path.parent
    records, left_out = [], Counter()
    for index, row in enumerate(rows):
        try:
            for part in questions(usable(row), index):
                records.append(to_record(part, index, from_format, need, folder))
        except KeyError as column:
            raise ValueError(f"{source} row {index + 1}: no column {column}") from column
        except LeftOut as reason:
            left_out[str(reason)] += 1
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{source} row {index + 1}: {error}") from error
        rows[index] = None  # what the record does not hold is no longer needed
    lines = [f"left out {count} of {len(rows)} rows: {reason}" for reason, count in left_out.items()]
    if lines and not records:
        raise ValueError(f"{source}: no records: {'; '.join(lines)}")
    for line in lines if os.environ.get("RANK", "0") == "0" else []:
        print(f"{source}: {line}", file=sys.stderr)
    return check_records(records, str(source), need)


def lifted(row: dict) -> dict:
    """The row with names in lower case too, NaN as nothing, and the gold that verl keeps a level deeper."""
    row = {name.lower(): value for name, value in row.items() if len(name) > 1} | row  # A, B, .. are options
    for nested, column in (("reward_model", "ground_truth"), ("extra_info", "answer")):
        inner = row.get(nested)
        if isinstance(inner, dict) and inner.get(column) is not None and pick(row, "answer") is None:
            row["answer"] = inner[column]
    golds = ROLES["answer"]  # of these NaN is a reason to leave the row out
    return {name: None if value != value and name not in golds else value for name, value in row.items()}


def usable(row: dict) -> dict:
    """The row as it is. Raises LeftOut if it is empty, or shows what is no image."""
    cells = [value for column, value in row.items() if column not in ROLES["id"]]
    if cells and all(cell in (None, "", []) for cell in cells):
        raise LeftOut("it is empty")
    for column, reason in (("video", "it shows a video"), ("audio", "it plays a sound")):
        if row.get(column) or row.get(f"{column}s"):
            raise LeftOut(reason)
    return row


def to_record(row: dict, index: int, from_format: Callable, need: tuple, folder: Path) -> dict:
    """A row in the schema at the top, paths absolute. Raises LeftOut and what `from_format` does."""
    fields = from_format(row, index)
    said = fields.get("response") or ""
    if from_format is from_sharegpt and "answer" in need and fields.get("answer") is None:
        if len(said) > LONGEST_GOLD or "\n" in said:
            raise LeftOut("its response names no answer")
        fields = from_format(row | {"answer": said}, index)  # VLM-R1: the assistant's turn is the bare gold
        if "response" not in need:
            fields |= {"response": None, "task": None}
    record = {field: value for field, value in fields.items() if value is not None}
    if "<video>" in str(record.get("question")):
        raise LeftOut("it shows a video")
    if "answer" in need and "answer" not in record and from_format in (from_generic, from_sharegpt):
        raise LeftOut("it has no answer")
    images = record.setdefault("images", [])
    if isinstance(images, list):
        record["images"] = [locate(ref, folder) for ref in images]
    kind = "choice" if record.get("choices") else infer_type(str(record.get("answer", "")))
    record.setdefault("answer_type", kind)
    return record


def stored_rows(source: str, split: str) -> Iterator[dict]:
    """Yield rows as dicts with their images as stored. Raises OSError or ValueError."""
    path = Path(source)
    if (release := path / "39Krelease.parquet").exists():  # `datasets` would take its images for the rows
        path = release
    if path.is_file() and path.suffix not in FILES:
        raise ValueError(f"not a {', '.join(FILES)} file")
    if not path.exists() and (path.suffix in FILES or not HUB_ID.fullmatch(source)):
        raise ValueError("no such file or folder, and not a Hub id (owner/name or owner/name:configuration)")
    if files := split_files(path, split):
        for file in files:
            yield from stored_rows(str(file), split)
    elif problems := sorted(path.glob("*/data.json")):  # Geometry3K
        yield from (json.loads(problem.read_text(encoding="utf-8")) for problem in problems)
    elif path.suffix in (".tsv", ".csv"):
        yield from tsv_rows(path)
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8-sig") as lines:
            yield from (json_row(line, number) for number, line in enumerate(lines, 1) if line.strip())
    elif path.suffix == ".json":
        yield from json_rows(path)
    elif path.suffix == ".parquet":
        yield from parquet_rows(str(path.absolute()))
    elif path.is_dir() and (folders := class_folders(path)):
        yield from class_rows(folders)
    else:
        yield from dataset_rows(source, split)


def split_files(path: Path, split: str) -> list[Path]:
    """A folder's files that are named after a split (test.jsonl, Art/test-00000-of-00001.parquet)."""
    named = re.compile(rf"{re.escape(split)}(-\d+-of-\d+.*)?\.(jsonl|json|parquet|tsv|csv)")
    return [file for file in sorted(path.rglob(f"{split}*")) if named.fullmatch(file.name)]


def tsv_rows(path: Path) -> Iterator[dict]:
    """Rows of VLMEvalKit's TSV, or a CSV: an image is base64, a list of that, a path, or another row's index.

    Raises ValueError.
    """
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="," if path.suffix == ".csv" else "\t"))
    held = {row.get("index"): row["image"] for row in rows if len(row.get("image") or "") > 64}
    for number, row in enumerate(rows, 1):
        if None in row:
            raise ValueError(f"row {number} has more cells than there are columns")
        stored = row.get("image")
        if stored and Path(stored[-9:]).suffix.lower() not in IMAGES:
            try:
                row["image"] = [{"bytes": base64.b64decode(data), "path": None}
                                for data in as_list(held[stored] if len(stored) <= 64 else stored)]
            except (KeyError, ValueError) as error:
                raise ValueError(f"index {row.get('index')}: image is neither base64 nor a row's index"
                                 ) from error
        yield {column: value or None for column, value in row.items()}


def json_rows(path: Path) -> Iterator[dict]:
    """Rows of a .json: a list, alone or among facts, JSON lines, rows under their ids, or COCO's instances.

    Raises ValueError.
    """
    text = path.read_text(encoding="utf-8-sig")
    try:
        table = json.loads(text)
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data"):
            raise
        table = [json_row(line, number) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if isinstance(table, dict):
        if "annotations" in table:
            yield from coco_rows(table)
            return
        if not {*CHATS, *ROLES["question"]}.isdisjoint(table):  # a single line
            table = [table]
    rows = table
    if isinstance(table, dict):
        lists = [part for part in table.values() if isinstance(part, list)]
        rows = lists[0] if len(lists) == 1 else [*table.values()]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows) or not rows and table:
        raise ValueError("expected a list of rows, or an object that holds rows under their ids")
    under_ids = isinstance(table, dict) and len(rows) == len(table)
    yield from ({"id": key, **row} for key, row in table.items()) if under_ids else rows


def coco_rows(table: dict) -> Iterator[dict]:
    """Rows of from_boxes from COCO's instances: x, y, width, height in pixels. Raises ValueError."""
    try:
        names = {category["id"]: category["name"] for category in table["categories"]}
        images, boxes = {image["id"]: image for image in table["images"]}, {}
        for annotation in table["annotations"]:
            if not annotation.get("iscrowd"):
                key = annotation["image_id"], annotation["category_id"]
                boxes.setdefault(key, []).append(annotation["bbox"])
        for (image_id, category_id), found in boxes.items():
            image, name = images[image_id], names[category_id]
            yield {"id": f"{image_id}-{name}", "image": image["file_name"], "target": name, "bbox": found,
                   "box_format": "xywh", "width": image["width"], "height": image["height"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"no COCO instances file: it lacks {error}") from error


IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")


def class_folders(root: Path) -> dict[str, list[Path]]:
    """Images of each class folder by its name, sorted; none if `root` holds anything but such folders."""
    folders = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    if len(folders) < 2 or not all(folder.is_dir() for folder in folders):
        return {}
    inside = {folder.name.replace("_", " "): sorted(folder.iterdir()) for folder in folders}
    pictures = all(path.suffix.lower() in IMAGES for paths in inside.values() for path in paths)
    return inside if pictures and all(inside.values()) else {}


def class_rows(folders: dict[str, list[Path]]) -> Iterator[dict]:
    """Rows of from_class: first images of all classes, then second ones, so that any part is balanced."""
    for paths in itertools.zip_longest(*folders.values()):
        for name, path in zip(folders, paths):
            if path:
                yield {"id": f"{name}/{path.stem}", "image": str(path.absolute()), "class": name,
                       "classes": list(folders)}


def json_row(line: str | bytes, number: int) -> dict:
    """One line of a .jsonl file. Raises ValueError naming the line."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"line {number}: a JSON {type(row).__name__}, not an object")
    return row


def complete_rows(path: Path) -> list[dict]:
    """Rows of a file of JSON lines that a run appends to, none without a file. Raises ValueError.

    Half a line at its end, of a run at work or killed, is left out.
    """
    with path.open("rb") if path.exists() else io.BytesIO() as lines:  # bytes: it may end within a character
        try:
            return [json_row(line, number) for number, line in enumerate(lines, 1) if line.endswith(b"\n")]
        except ValueError as error:
            raise ValueError(f"{path} {error}") from error


def open_dataset(source: str, split: str):
    """The datasets.Dataset in an .arrow file, a folder or a Hub repository. Raises OSError or ValueError."""
    import datasets
    if source.endswith(".arrow"):
        return datasets.Dataset.from_file(source)
    saved = [name for name in ("state.json", "dataset_dict.json") if Path(source, name).exists()]
    if not saved:
        name, config = (Path(source).exists() and (source, None)) or HUB_ID.fullmatch(source).groups()
        if config == "*":
            configs = datasets.get_dataset_config_names(name)
            return datasets.concatenate_datasets(
                [datasets.load_dataset(name, config, split=split) for config in configs])
        return datasets.load_dataset(name, *filter(None, [config]), split=split)
    table = datasets.load_from_disk(source)
    if saved == ["state.json"]:
        return table
    if split not in table:
        raise ValueError(f"no split {split!r}, only {', '.join(table)}")
    return table[split]


# how PNG, JPEG, GIF and WebP start, or what is too long to be a path without a dot
BASE64 = re.compile(r"(?:(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR)[\w+/\s]{40,}|[\w+/\s]{200,})={0,2}\s*", re.ASCII)


def locate(ref, folder: Path):
    """Make an image path absolute; what holds an image in any other form becomes {"bytes", "path"}.

    Raises LeftOut if it is neither here nor an image, ValueError on broken base64.
    """
    if isinstance(ref, Embedded):
        if ref["path"]:  # is read where the table holds no bytes
            ref["path"] = os.path.join(folder, ref["path"])
        return ref
    if isinstance(ref, dict) and isinstance(ref.get("bytes"), bytes) and ref["bytes"]:
        return {"path": None} | ref
    if isinstance(ref, dict) and isinstance(ref.get("bytes"), str):
        return locate("data:," + ref["bytes"], folder)
    if isinstance(ref, dict):
        held = [ref[name] for name in ("path", "url", "image_url", "image", "data") if ref.get(name)]
        if not held:
            raise LeftOut("its image has neither bytes nor a path")
        return locate(held[0], folder)
    if not isinstance(ref, str):
        return ref
    if re.match("https?://", ref):
        raise LeftOut("its image is on the web, and nothing is downloaded")
    if ref.lower().endswith((".mp4", ".avi", ".mov", ".mkv", ".webm")):
        raise LeftOut("it shows a video")
    if ref.startswith("data:") or BASE64.fullmatch(ref):
        return {"bytes": base64.b64decode(ref.rpartition(",")[2]), "path": None}
    if ref.startswith("file:"):
        ref = urllib.parse.unquote(urllib.parse.urlsplit(ref).path)
    return str(folder / ref)


def write_records(path: str | Path, records: list[dict], layout: str = "") -> None:
    """Write JSON lines, or a ShareGPT file of a layout, complete or not at all, image paths relative to it.

    Images under the file's folder stay where they are. Others go into images/ beside it, named by content, so
    rows that share an image share its file: encoded ones byte for byte, PIL images as PNG. Raises OSError.
    """
    folder = Path(path).parent.resolve()

    def portable():
        for record in records:
            images = [save_image(ref, folder) for ref in record["images"]]
            yield record | {"images": images}

    if layout:
        write_sharegpt(Path(path), portable(), layout)
    else:
        write_rows(Path(path), portable())


def write_sharegpt(path: Path, records: Iterable[dict], layout: str) -> None:
    """Write a ShareGPT file, and its entry in dataset_info.json beside it for LLaMA-Factory.

    Raises OSError, or ValueError if there is a dataset_info.json that cannot be read.
    """
    info_path, info, systems = path.with_name("dataset_info.json"), {}, []
    if info_path.exists():  # several files may share a folder
        try:
            info = dict(json.loads(info_path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{info_path}: {error}") from error

    def rows():
        for record in records:
            systems.append("system" in record)
            yield to_sharegpt(record, layout)

    write_text(path, json_list(rows()))
    turns, speaker, text, user, assistant, images = LAYOUTS[layout]
    info[path.stem] = {
        "file_name": path.name, "formatting": "sharegpt",
        "columns": {"messages": turns, "images": images} | ({"system": "system"} if any(systems) else {}),
        "tags": {"role_tag": speaker, "content_tag": text, "user_tag": user, "assistant_tag": assistant}}
    write_json(info_path, info)


def write_text(path: Path, pieces: Iterable[str]) -> None:
    """Write text to `path`, complete or not at all, a piece at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with unfinished.open("w", encoding="utf-8") as out:
            out.writelines(pieces)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    write_text(path, [json.dumps(value, ensure_ascii=False, indent=1) + "\n"])


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    write_text(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def json_list(rows: Iterable[dict]) -> Iterator[str]:
    """Pieces of a JSON list with one row a line."""
    start = "[\n"
    for row in rows:
        yield start + json.dumps(row, ensure_ascii=False)
        start = ",\n"
    yield "\n]\n"


def save_image(ref: str | Path | dict | Image.Image, folder: Path) -> str:
    """Make sure an image lies under `folder`; return its path relative to it. Raises OSError."""
    if isinstance(ref, (str, Path)):
        path = os.path.realpath(ref)
        if path.startswith(f"{folder}{os.sep}"):
            return Path(path).relative_to(folder).as_posix()
    if isinstance(ref, Image.Image):
        ref.save(png := io.BytesIO(), "PNG")
        data = png.getvalue()
    else:
        data = image_bytes(ref)
    kind = Image.open(io.BytesIO(data)).format.lower()
    name = f"images/{hashlib.sha256(data).hexdigest()[:16]}.{kind}"
    (folder / "images").mkdir(exist_ok=True)
    (folder / name).write_bytes(data)
    return name


def check_choice(cfg, flag: str, allowed: Iterable[str]) -> None:
    """Raises ValueError unless the flag has one of the `allowed` values."""
    if (value := getattr(cfg, flag)) not in allowed:
        raise ValueError(f"--{flag} {value}: use {' | '.join(filter(None, allowed))}")


def check_at_least(least: int, cfg, *flags: str) -> None:
    for flag in flags:
        if getattr(cfg, flag) < least:
            raise ValueError(f"--{flag} must be at least {least}")


def convert_input(cfg) -> None:
    """Copy any readable --input to OUT/SPLIT.jsonl and OUT/images, less the rows that are refused.

    --pass_rate refuses some on purpose, which are counted by reason; an unreadable image is named. --form
    makes it a ShareGPT file, OUT/SPLIT.json.
    """
    check_choice(cfg, "form", ("", *LAYOUTS))
    refuse, need = pass_rate_filter(cfg), ("response",) if cfg.form else ("answer",)
    kept, skipped, filtered = [], [], Counter()
    records = read_records(cfg.input, cfg.split, need, cfg.n, cfg.image_root)
    for record in tqdm(records, desc=cfg.input):
        if reason := refuse(record):
            filtered[reason] += 1
            continue
        try:
            for ref in record["images"]:
                load_image(ref, MAX_DECODED)
            kept.append(record | {"task": cfg.task} if cfg.task else record)
        except BadImage as error:
            if cfg.strict:
                raise ValueError(f"{cfg.input} (id {record['id']!r}): {error}") from error
            skipped.append(f"skipped id {record['id']!r}: {error}")
    path = Path(cfg.out) / f"{cfg.split}.json{'' if cfg.form else 'l'}"
    dropped = [f"{count} {reason}" for reason, count in sorted(filtered.items())]
    without = ", ".join([*dropped, f"{len(skipped)} unreadable"])
    kept = check_records(kept, f"{cfg.input} without its rows left out ({without})", need)
    write_records(path, kept, cfg.form)
    kinds = Counter(record["answer_type"] for record in kept).most_common()
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds)
    print(*skipped, *(f"left out {line}" for line in dropped),
          f"{path}: {len(kept)} records ({counts}), {len(skipped)} skipped", sep="\n")


def pass_rate_filter(cfg) -> Callable[[dict], str]:
    """A function from a record to the reason why --pass_rate leaves it out, or "". Raises ValueError."""
    name = f"pass_rate_{cfg.pass_rate_of}"
    try:
        low, high = map(float, cfg.pass_rate or (0, 1))
    except ValueError:
        low, high = 1, 0
    if not 0 <= low <= high <= 1:
        raise ValueError(f"--pass_rate {' '.join(cfg.pass_rate)}: give LOW HIGH, from 0 to 1")

    def refuse(record):
        rate = record.get("meta", {}).get(name)
        if not cfg.pass_rate or rate is None and cfg.keep_unmeasured:
            return ""
        if rate is None:
            return f"with {name} unknown"
        inside = low - 1e-6 <= rate <= high + 1e-6  # 0.7 stored in 32 bits is below 0.7
        return "" if inside else f"with {name} outside {low} .. {high}"
    return refuse


# ----- Reason-RFT -----
SHAREGPT_FORMS = ("ans_sft", "cot_sft", "stage1")
FORMS = ("ans_sft", "cot_sft", "rl", "stage1", "stage2", "sharegpt")
BLOCK = 1 << 20     # characters of a meta-JSON read at once
LONGEST_ROW = 16 * BLOCK
SPACED_TAG = re.compile(r"<\s*(/?)\s*(think|answer)\s*>", re.IGNORECASE)


def meta_rows(source: str) -> Iterator:
    """Yield the items of a .json list without holding the list, or the lines of a .jsonl; shows progress.

    Raises ValueError that does not name the file.
    """
    path = Path(source)
    if not path.is_file() or path.suffix not in (".json", ".jsonl"):
        raise ValueError("no such .json or .jsonl file")
    if path.suffix == ".jsonl":
        yield from tqdm(stored_rows(source, ""), desc=path.name)
        return
    decode = json.JSONDecoder().raw_decode
    bar = dict(total=path.stat().st_size, desc=path.name, unit="B", unit_scale=True)
    with path.open(encoding="utf-8-sig") as file, tqdm.wrapattr(file, "read", **bar) as file:
        text = file.read(BLOCK).lstrip()
        if text[:1] != "[":
            raise ValueError("expected a list of rows")
        at, number = 1, 1
        while True:
            while at < len(text) and text[at] in ", \t\r\n":
                at += 1
            if text[at:at + 1] == "]":
                return
            try:
                row, end = decode(text, at)
                fault = "" if end < len(text) else "the list is never closed"  # 12 may go on as 123
            except ValueError as error:
                fault = str(error)
            if not fault:
                yield row
                at, number = end, number + 1
            elif len(text) - at < LONGEST_ROW and (more := file.read(BLOCK)):
                text, at = text[at:] + more, 0
            else:
                raise ValueError(f"row {number}: {fault}")


def cot_response(record: dict, cot) -> tuple[str, bool]:
    """(target response, whether the rationale names an answer). Tags, if any, are taken off and put back.

    Raises ValueError: no rationale, or one that comes to another answer than the record's.
    """
    if not isinstance(cot, str) or not cot.strip():
        raise ValueError("cot is missing or empty")
    cot = SPACED_TAG.sub(lambda tag: f"<{tag[1]}{tag[2].lower()}>", cot).strip()
    thought = cot.rpartition("<think>")[2].partition("</think>")[0].partition("<answer>")[0]
    # LLaMA-Factory counts every `<image>` as one, on the assistant's side too
    thought = thought.replace("</answer>", "").replace("<image>", "image").strip()
    if not thought:
        raise ValueError("cot holds no reasoning")
    said = rewards.extract_answer(cot)
    named = "<answer>" in cot or stated_answer(cot) is not None
    if named and rewards.accuracy(cot, record) != 1:
        raise ValueError(f"cot answers {(said or '')[:60]!r}, the gold answer is {record['answer'][:60]!r}")
    return f"<think>\n{thought}\n</think>\n<answer>\n{record['answer']}\n</answer>", named


def reason_rft_record(row, index: int, form: str, task: str, folder: Path) -> tuple[dict, bool]:
    """(record of a meta row, whether its rationale was compared with the gold). Raises ValueError.

    `task` names a prompt to use instead of the row's own, "" keeps that.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}, not an object")
    record, named = from_reason_rft(row, index), True
    record["task"] = task or record["task"]
    check_record(record, "record")
    for ref in record["images"]:
        if fault := header_fault(str(folder / ref)):
            raise ValueError(f"image {ref}: {fault}")
    if form in ("cot_sft", "stage1"):
        record["response"], named = cot_response(record, row.get("cot"))
        if not rewards.format_think_answer(record["response"], record):
            raise ValueError("answer or cot holds tags in the wrong place")
    elif form == "ans_sft":
        record["response"] = record["answer"]
        record["task"] += "_answer"
    if "response" in record and rewards.accuracy(record["response"], record) != 1:
        raise ValueError(f"answer {record['answer'][:60]!r} is not graded as right even against itself")
    return record, named


def reason_rft_records(cfg, form: str, manifest: dict) -> Iterator[dict]:
    """Yield the records of one training set, with images relative to --out, and fill `manifest` in.

    Raises ValueError: an unreadable file, no record at all, or with --strict the first broken row.
    """
    folder = Path(cfg.image_root or Path(cfg.input).parent).resolve()
    relative = os.path.relpath(folder, Path(cfg.out).resolve())
    first, last = 0, cfg.n or None
    if form == "stage1":
        last = min(cfg.stage1_n, cfg.n or cfg.stage1_n)
    elif form == "stage2" and cfg.stage2 == "rest":
        first = cfg.stage1_n
    kinds, sources, first_row = Counter(), Counter(), {}
    rejects, ranges, unchecked = [], [], 0
    for index, row in enumerate(itertools.islice(meta_rows(cfg.input), last)):
        if index < first:
            continue
        number, name = index + 1, row.get("id") if isinstance(row, dict) else None
        try:
            record, named = reason_rft_record(row, index, form, cfg.task, folder)
            earlier = first_row.setdefault(record["id"], number)
            if earlier != number:
                raise ValueError(f"id was already used in row {earlier}")
        except (KeyError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            if cfg.strict:
                raise ValueError(f"row {number} (id {name!r}): {reason}") from error
            rejects.append({"row": number, "id": name, "reason": reason})
            continue
        kinds[record["answer_type"]] += 1
        sources[record["source"]] += 1
        unchecked += not named
        if ranges and ranges[-1][1] == index:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
        record["images"] = [os.path.normpath(os.path.join(relative, ref)) for ref in record["images"]]
        yield record
    if not kinds:
        why = f"; row {rejects[0]['row']}: {rejects[0]['reason']}" if rejects else ""
        raise ValueError(f"no row is fit for --form {form}{why}")
    manifest |= {"input": Path(cfg.input).name, "form": form, "records": kinds.total(),
                 "rejected": len(rejects), "cot_without_answer": unchecked, "answer_types": kinds,
                 "sources": sources, "rows": ranges, "rejects": rejects}


def convert_reason_rft(cfg) -> None:
    """Write the training set --form of the meta-JSON --input (three of them for sharegpt) and manifests."""
    check_choice(cfg, "form", FORMS)
    if cfg.stage1_n < 1:
        raise ValueError(f"--stage1_n {cfg.stage1_n}: must be at least 1")
    out, stem = Path(cfg.out), Path(cfg.input).stem
    for form in SHAREGPT_FORMS if cfg.form == "sharegpt" else (cfg.form,):
        path = out / f"{stem}_{form}.json{'' if cfg.form == 'sharegpt' else 'l'}"
        manifest = {}
        records = reason_rft_records(cfg, form, manifest)
        try:
            if cfg.form == "sharegpt":
                write_sharegpt(path, records, cfg.form)
            else:
                write_rows(path, records)
        except ValueError as error:
            raise ValueError(f"{cfg.input}: {error}") from error
        write_json(out / f"{stem}_{form}_manifest.json", manifest)
        rejects = manifest["rejects"]
        shown = [f"left out row {r['row']} (id {r['id']!r}): {r['reason']}" for r in rejects[:10]]
        counts = ", ".join(f"{count} {kind}" for kind, count in manifest["answer_types"].most_common())
        print(*shown, *([f"left out {len(rejects) - 10} more, see the manifest"] if rejects[10:] else []),
              f"{path}: {manifest['records']} records ({counts}), {len(rejects)} left out", sep="\n")


# ----- model folders -----
def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises ValueError or OSError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return value


def model_fault(folder: Path) -> str:
    """Which file of a model folder or checkpoint is damaged and how, "" if none; tensors are not read."""
    from safetensors import SafetensorError, safe_open
    path = folder / "meta.json"
    try:
        sizes = read_json(path).get("files", {}) if path.exists() else {}
        for name, size in sizes.items():
            path = folder / name
            if path.stat().st_size != size:
                return f"{path} has {path.stat().st_size} bytes, {size} were saved"
        for path in sorted(folder.glob("*.json")):
            read_json(path)
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="np"):
                pass
    except (ValueError, OSError) as error:
        return str(error)
    except SafetensorError as error:
        return f"{path}: {error}"
    return ""


def step_fault(step: Path) -> str:
    """What is wrong with a checkpoint of a run, "" if nothing: meta.json was written last."""
    if not (step / "meta.json").exists():
        return f"{step}/meta.json is missing"
    return model_fault(step)


def newest_step(out: str | Path) -> Path | None:
    """The newest checkpoint of a run directory, None if it has none; unfinished ones carry the suffix .tmp.

    Raises ValueError if it is damaged: to go on from an older one is for the user to decide.
    """
    steps = sorted(Path(out).glob("step_??????"), reverse=True)
    if not steps:
        return None
    if fault := step_fault(steps[0]):
        raise ValueError(fault + instead_of(steps[0]))
    return steps[0]


def instead_of(step: Path) -> str:
    """What to do about a damaged checkpoint, to be added to the message; "" for other model folders."""
    if not re.fullmatch("step_.{6}", step.name):
        return ""
    older = sorted(step.parent.glob("step_??????"), reverse=True)
    for other in older:
        if other != step and not step_fault(other):
            return f"; remove {step} to go on from {other}"
    return f"; {step.parent} has no other sound checkpoint"


def weights_gone(folder: Path) -> str:
    """What to load instead of a step of LoRA that has its adapter only, "" for all others."""
    meta = folder / "meta.json"
    if not meta.exists() or not read_json(meta).get("adapter_only"):
        return ""
    return (f"{folder} is no model any more: its merged weights went when a newer step was complete; take "
            f"the newest, --resume from this one, or load {folder}/adapter with peft")


def resolve_model(path: str) -> str:
    """Model folder, run directory (newest step) or Hub id for from_pretrained. Raises ValueError, OSError."""
    folder = Path(path)
    if (folder / "config.json").exists() and not (step := newest_step(folder)):
        config = read_json(folder / "config.json")
        if "model_type" in config:
            if fault := model_fault(folder) or weights_gone(folder):
                raise ValueError(fault)
            return path
        raise ValueError(f"{path}: the run has no complete checkpoint yet")
    if folder.is_dir():
        if step := newest_step(folder):
            if fault := weights_gone(step):
                raise ValueError(fault)
            return str(step)
        raise ValueError(f"{path}: neither a model (config.json) nor a run directory (step_*)")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not path.startswith(("out/", "./", "../")):
        return path
    maker = {"out/tiny": "data_prep.py", "out/sft": "sft.py", "out/grpo": "grpo.py", "out/rise": "rise.py",
             "out/see": "sft.py --data data/mini/mood_see.jsonl --steps 300 --out out/see",
             "out/talk": "sft.py --model out/see --data data/mini/mood_talk.jsonl --steps 500 --out out/talk"}
    hint = f"; `python {maker[path]}` makes it" if path in maker else ""
    raise ValueError(f"{path}: no such model{hint}")


# ----- OpenAI-compatible servers -----
KEYS = ("OPENAI_API_KEY", "JUDGE_API_KEY", "VLM_API_KEY", "REASONER_API_KEY")


def api_key(*names: str) -> str:
    """The first of these environment variables that is set, or "". Raises ValueError, without the key."""
    name = next((name for name in names if name in os.environ), names[0])
    key = os.environ.get(name, "").strip()
    if not re.fullmatch("[!-~]*", key):
        raise ValueError(f"{name}: no header can hold blanks or what is not ASCII")
    return key


def masked(text: str) -> str:
    """A server's text without any API key that it repeats: it goes into files and onto the terminal."""
    keys = [os.environ.get(name, "").strip() for name in KEYS]
    for key in sorted(keys, key=len, reverse=True):  # one may begin with another
        if len(key) >= 8:  # a shorter one, EMPTY say, is no secret, and a word that a model may write
            text = text.replace(key, "[key]")
    return text


def brief(fault) -> str:
    """A server's text or an exception as one line of at most 200 characters, without any API key."""
    text = masked(str(getattr(fault, "reason", fault)))
    return " ".join(text.split())[:200]


def check_servers(urls: dict[str, str], cfg) -> None:
    """Raises ValueError naming a flag of requests, or one of `urls` {flag: URL}, that cannot work."""
    for flag, url in urls.items():
        if not re.match("https?://[^/]", url):
            raise ValueError(f"--{flag} {url}: must begin with http://HOST or https://HOST")
    for flag, least in (("concurrency", 1), ("timeout", 0.001), ("retries", 0)):
        if not least <= getattr(cfg, flag) <= 1e6:
            raise ValueError(f"--{flag} {getattr(cfg, flag)}: must be at least {least} and at most a million")


def chat_messages(messages: list[dict], images: list[Image.Image]) -> list[dict]:
    """build_messages' turns as these servers take them: the k-th image mark becomes images[k]."""
    images = iter(images)

    def filled(part):
        if part["type"] != "image":
            return part
        next(images).save(png := io.BytesIO(), "PNG", icc_profile=None)  # a profile could change the colours
        url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        return {"type": "image_url", "image_url": {"url": url}}

    turns = []
    for turn in messages:
        turns.append(turn | {"content": [filled(part) for part in turn["content"]]})
    return turns


def in_parallel(ask: Callable, items: Iterable, workers: int) -> Iterator[tuple]:
    """Yield (item, ask(item)) as they are done, so many at a time."""
    pool = ThreadPoolExecutor(workers)
    asked = {pool.submit(ask, item): item for item in items}
    try:
        for future in as_completed(asked):
            yield asked[future], future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C must not have to wait for all other items


def request_chat(url: str, key: str, body: dict, cfg) -> tuple[str, bool, tuple[int, int]]:
    """A server's reply as read_completion returns it. Raises ConnectionError.

    Faults that may pass are retried. The waits have full jitter: many requests that failed together must not
    come back together.
    """
    data, wait = json.dumps(body).encode(), 0.0
    for attempt in range(cfg.retries + 1):
        time.sleep(wait)
        wait = random.uniform(0, min(30, 2 ** attempt))
        try:
            status, later, text = send(url, "chat/completions", key, data, cfg.timeout)
            if status < 300:
                return read_completion(text)
            fault = f"HTTP {status}: {brief(text)}"
            if status < 500 and status not in (408, 409, 425, 429):
                break
            if later.isdecimal():
                wait = max(wait, min(60, int(later)))
        except (OSError, HTTPException, ValueError) as error:
            fault = brief(error)
    raise ConnectionError(fault)


REPLY_BYTES = 2**24  # of a reply at most; the longest completions have a few million


class TimedReader(io.RawIOBase):
    """What a socket receives until `deadline`, by time.monotonic; raises TimeoutError after that."""

    def __init__(self, sock, received: io.RawIOBase, deadline: float):
        self.sock, self.received, self.deadline = sock, received, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.sock.settimeout(left)  # of one read: a server may send a byte now and then for ever
        return self.received.readinto(buffer)

    def close(self) -> None:
        self.received.close()
        super().close()


class TimedReply(HTTPResponse):
    """A reply of which everything, status line and headers too, must be here by `deadline`."""

    def __init__(self, sock, *args, deadline: float, **more):
        super().__init__(sock, *args, **more)
        self.fp = io.BufferedReader(TimedReader(sock, self.fp.detach(), deadline))


class TimedHandler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens http:// and https:// with a bound on the whole exchange instead of on each read."""

    def do_open(self, connection_class, request, **options):
        reply_class = functools.partial(TimedReply, deadline=time.monotonic() + request.timeout)

        def connect(*args, **more):
            connection = connection_class(*args, **more)
            connection.response_class = reply_class
            return connection

        return super().do_open(connect, request, **options)


def send(url: str, route: str, key: str, data: bytes | None, timeout: float,
         most: int = REPLY_BYTES) -> tuple[int, str, str]:
    """GET URL/route, or POST JSON to it: (status, Retry-After, text), whatever the status.

    Raises OSError, HTTPException or ValueError: no connection, one that breaks, no whole answer within
    `timeout` s, or one of over `most` bytes. No redirect is followed: the key is for this server alone.
    """
    headers = {"Content-Type": "application/json", "User-Agent": "nanoVLR"}  # many refuse Python-urllib
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{url.rstrip('/')}/{route}", data, headers)
    # urllib's own opener follows redirects and makes exceptions of statuses.
    opener = urllib.request.OpenerDirector()
    opener.add_handler(urllib.request.ProxyHandler())
    opener.add_handler(TimedHandler())
    body = bytearray()
    try:
        with opener.open(request, timeout=timeout) as reply:
            if 300 <= reply.status < 400:
                return reply.status, "", f"redirects to {reply.headers.get('Location')}"
            while part := reply.read1(2**16):  # without a number it makes room for what the server announced
                body += part
                if len(body) > most:
                    raise ValueError(f"a reply of over {most} bytes")
            return reply.status, reply.headers.get("Retry-After", ""), body.decode("utf-8", "replace")
    except TimeoutError as error:
        raise TimeoutError(f"no whole answer within {timeout:g} s") from error


def read_completion(text: str) -> tuple[str, bool, tuple[int, int]]:
    """(text, whether it was cut off, tokens of prompt and reply or 0 if not counted) of a chat completion.

    Thoughts that the server took out are put back: the text is what the model wrote. Raises ValueError.
    """
    try:
        completion = json.loads(text)
        choice = completion["choices"][0]
        message, truncated = choice["message"], choice.get("finish_reason") == "length"
        content, usage = message.get("content"), completion.get("usage")
        thought = message.get("reasoning_content") or message.get("reasoning")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a chat completion: {brief(text)}") from error
    if content is None and (truncated or thought):  # the model was cut while it still thought, say
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"a chat completion without content: {brief(text)}")
    if isinstance(thought, str):
        content = f"<think>{thought}" + ("" if truncated and not content else f"</think>{content}")
    content = content.encode(errors="replace").decode()  # JSON can hold halves of characters, no file can
    return masked(content), truncated, (token_count(usage, "prompt"), token_count(usage, "completion"))


def token_count(usage, side: str) -> int:
    """What a completion's usage says of "prompt" or "completion", 0 if that is no number of tokens."""
    count = usage.get(f"{side}_tokens") if isinstance(usage, dict) else None
    return count if type(count) is int and 0 <= count < 10**9 else 0


def served_model(flag: str, url: str, key: str, timeout: float) -> str:
    """Name of the first model that a server lists. Raises ValueError naming the flag of its URL."""
    text = ""
    try:
        status, _, text = send(url, "models", key, None, timeout)
        if status >= 300:
            text = f"HTTP {status}: {text}"  # no list of models either
        return masked(str(json.loads(text)["data"][0]["id"]))
    except (OSError, HTTPException, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"--{flag} {url}: no list of models there, name one or give another URL: "
                         f"{brief(text or error)}") from error


# ----- Vision-R1's cold start -----
# what a VLM is asked twice, then a text reasoner
BRIDGE = {
    "thought": "{question}\n\n{gold}Look closely. Under the heading CAPTION, write down what the image shows"
               " that bears on the question. Then, under the heading REASONING, go from there to the answer"
               " in small steps.",
    "description": "Somebody was asked this about the image:\n{question}\n\nAnd thought:\n{thought}\n\n"
                   "Describe the image for a reader who cannot see it, yet must answer the question from your"
                   " words alone. Leave out nothing that this takes: every object and how many there are,"
                   " colours, shapes, sizes, places and relations, all numbers, labels and words, lines,"
                   " angles, axes and marks. Where the thoughts misread the image, go by the image. Write the"
                   " description only, neither a solution nor an answer.",
    "reasoning": "{description}\n\nThis is what an image shows. Take it as if you looked at the image"
                 " yourself, and answer:\n{question}\n\n{gold}Think step by step. Then write nothing but the"
                 " answer, of options only the letter, between <answer> and </answer>.",
    "gold": "(The answer is {answer}. Let it guide you, but reason as if nobody had told you.) ",
}
STAGES = ("thought", "description", "reasoning")  # the calls of a row, as named in BRIDGE
BLIND = re.compile(  # what a model says that was, or believes it was, given no image
    r"\b(?:no|without an?) (?:image|picture|photo|figure|diagram)\b.{,20}\b(?:provided|attached|available)"
    r"|\b(?:can(?:not|'t|’t| not)|unable to|not able to)(?: \w+)? (?:see|view|access|open|display|look at)"
    r"(?: (?!image|picture)\w+){,2} (?:image|picture|photo|figure|diagram)"
    r"|\bwithout (?:seeing|access to|looking at)(?: \w+){,2} (?:image|picture|figure|diagram)"
    r"|^\W*(?:I(?:'m|’m| am) )?(?:very |so )?sorry\b|^\W*I apologi[sz]e\b|\bas an? (?:AI|text-based)\b",
    re.IGNORECASE)
LEAK = re.compile(r"\b(?:descriptions?|captions?)\b|\banswer (?:is|was) (?:given|provided|known)\b"
                  r"|\b(?:given|provided|known|reference|expected) answer\b(?! choice)", re.IGNORECASE)
TEXT = (r"(?:the|this|that|your)(?: (?:\w+'s|given|provided|detailed|above|textual|visual|image|picture))*"
        r" (?:description|caption)s?")
TELL = (r"(?:(?:say|state|mention|note|indicate|describe|tell|explain|read|give|provide|specifie)(?:s|d|ed)?"
        r"|specify|said|told|gave)(?: us| me)?")
REWORDED = [(re.compile(rf"\b{pattern}\b", re.IGNORECASE), new) for pattern, new in (
    (r"(?:the|this|that|an?)(?: \w+){,2} (?:description|caption)s? of (the|an?|this)"
     r" (image|picture|photo|figure|diagram|chart|graph|scene)", r"\1 \2"),
    (rf"{TEXT} ((?:does|did)(?: not|n't|n’t)) {TELL}", r"the image \1 show"),
    (rf"{TEXT}((?: (?:also|only|clearly|explicitly|just|then))?) {TELL}", r"the image\1 shows"),
    (rf"(?:described|mentioned|stated|noted|given|said) (?:in|by) {TEXT}", "shown in the image"),
    (TEXT, "the image"))]


def reword(thought: str) -> str:
    """Thoughts about a description of an image as thoughts about the image: whole phrases, case kept."""
    def replace(found):
        text = found.expand(new)
        return text[0].upper() + text[1:] if found[0][0].isupper() else text

    for pattern, new in REWORDED:
        thought = pattern.sub(replace, thought)
    return thought


def cold_response(text: str, record: dict, question: str) -> str:
    """A target response from a reasoner's reply: its thoughts, the gold answer. Raises LeftOut.

    Which rules Vision-R1 filters by is not published; these are ours.
    """
    thought, closed, rest = text.removeprefix("<think>").partition("</think>")
    if not closed:  # a model without thoughts of its own reasons in the open
        thought, tag, rest = text.rpartition("<answer>")
        rest = tag + rest
    if not thought.strip() or not rest.strip():
        raise LeftOut("format", "no reasoning followed by an answer")
    if rewards.accuracy(rest, record) != 1:
        raise LeftOut("wrong answer", f"gold {record['answer'][:60]!r}, not {rest.strip()[-60:]!r}")
    if LEAK.search(thought) and not LEAK.search(question):
        thought = reword(thought)
        if leak := LEAK.search(thought):
            raise LeftOut("speaks of a description or a given answer", thought[:leak.end()][-60:])
    if (said := stated_answer(thought)) and rewards.accuracy(thought, record) != 1:
        raise LeftOut("concludes otherwise", f"gold {record['answer'][:60]!r}, not {said[:60]!r}")
    words = thought.split()
    if max(Counter(zip(*(words[k:] for k in range(16)))).values(), default=0) > 3:
        raise LeftOut("repetition", "the same 16 words more than three times")
    response = f"<think> {thought.strip()} </think> <answer> {record['answer']} </answer>"
    if not rewards.format_think_answer(response, record) or rewards.accuracy(response, record) != 1:
        raise LeftOut("format", "tags in the reasoning, or a gold answer that is not right against itself")
    return response


def bridge(record: dict, ask: Callable, show_gold: tuple) -> dict:
    """The record with a response by modality bridging (Vision-R1, arXiv 2503.06749). Raises LeftOut.

    A VLM thinks about the image, unless the record brings a response that it can take for that, and describes
    the image with this in mind. A reasoner that sees only the description answers the question.
    """
    if not record.get("answer", "").strip():
        raise LeftOut("no gold answer", "")
    question = rewards.build_prompt(record | {"task": "plain"})
    hint = BRIDGE["gold"].replace("{answer}", record["answer"])
    vlm, reasoner = (hint if who in show_gold else "" for who in ("vlm", "reasoner"))
    thought = record.get("response") or ask("thought", record, question=question, gold=vlm)
    description = ask("description", record, question=question, thought=thought.replace("<image>", "image"))
    text = ask("reasoning", record, question=question.replace("<image>", "[image]"), gold=reasoner,
               description=description)
    return record | {"response": cold_response(text, record, question)}


class Calls:
    """Asks both servers. A reply is a line of OUT/calls.jsonl at once, and what is there is not asked again.

    Lines are found by a digest of what decides on the reply: other prompts, models or sampling ask anew.
    While `offline` nothing is asked. `used` has the (stage, tokens) of each call that a row needed.
    """

    def __init__(self, cfg):
        self.cfg, self.lock, self.offline, self.used = cfg, threading.Lock(), True, {}
        path = Path(cfg.out) / "calls.jsonl"
        try:
            self.replies = {reply["call"]: reply for reply in complete_rows(path)}
        except KeyError as field:
            raise ValueError(f"{path}: a line without {field} is no reply") from field
        write_rows(path, self.replies.values())  # without the half line that a killed run may leave
        self.log = path.open("a")

    def ask(self, stage: str, record: dict, **fields: str) -> str:
        """The text of a reply. Raises LeftOut if that is of no use, ConnectionError, BadImage."""
        cfg = self.cfg
        prompt = re.sub(r"\{(\w+)\}", lambda field: fields[field[1]], BRIDGE[stage])
        body = {"model": cfg.vlm_model, "temperature": 0, "max_tokens": cfg.max_new_tokens}
        if stage == "reasoning":
            body |= {"model": cfg.reasoner_model, "temperature": cfg.temperature, "top_p": 0.95,
                     "seed": cfg.seed}
        decisive = json.dumps([stage, record["id"], prompt, body, cfg.max_pixels])
        call = hashlib.sha256(decisive.encode()).hexdigest()[:32]
        if not (reply := self.replies.get(call)):
            if self.offline:
                raise LeftOut("not asked", stage)
            reply = self.request(stage, body, prompt, record["images"])
            line = json.dumps({"call": call, "id": record["id"], "stage": stage, **reply}) + "\n"
            with self.lock:
                self.log.write(line)
                self.log.flush()
        self.used[call] = stage, reply["tokens"]
        text = reply["text"].replace("<image>", "image").strip()  # LLaMA-Factory would count it as one
        for reason, fault in (("truncated", reply["truncated"]), ("empty", not text),
                              ("too long", sum(reply["tokens"]) > cfg.max_tokens),
                              ("without seeing the image", BLIND.search(text))):
            if fault:
                raise LeftOut(f"{stage} {reason}", text[:60])
        return text

    def request(self, stage: str, body: dict, prompt: str, images: list) -> dict:
        """The reply of the stage's server. Raises ConnectionError, BadImage."""
        cfg = self.cfg
        if stage == "reasoning":
            url, who, turn = cfg.reasoner_url, "REASONER", {"role": "user", "content": prompt}
        else:
            url, who, pixels = cfg.vlm_url, "VLM", [load_image(ref, cfg.max_pixels) for ref in images]
            [turn] = chat_messages([{"role": "user", "content": prompt_parts(prompt, images)}], pixels)
        key = api_key(f"{who}_API_KEY", "OPENAI_API_KEY")
        text, truncated, (asked, said) = request_chat(url, key, body | {"messages": [turn]}, cfg)
        return {"text": text, "truncated": truncated, "tokens": [asked, said or len(text) // 4]}


def check_bridge(cfg) -> Path:
    """The file to write. Raises ValueError naming a flag that cannot work."""
    check_servers({"vlm_url": cfg.vlm_url, "reasoner_url": cfg.reasoner_url}, cfg)
    for who in ("vlm", "reasoner"):
        if not getattr(cfg, f"{who}_model"):
            raise ValueError(f"--{who}_model: name the model as its server does")
        api_key(f"{who.upper()}_API_KEY", "OPENAI_API_KEY")
    if wrong := set(cfg.show_gold) - {"vlm", "reasoner"}:
        raise ValueError(f"--show_gold {min(wrong)}: use vlm, reasoner, both or nothing")
    path = Path(cfg.out) / f"{cfg.split}.jsonl"
    if path.resolve() == Path(cfg.input).resolve():
        raise ValueError(f"--out {cfg.out}: {path} is the input")
    return path


def forecast(calls: Calls, done: int, left: int, seconds: float) -> str:
    """What the rest will take, judged by this run's first rows."""
    new = [tokens for call, (_, tokens) in calls.used.items() if call not in calls.replies]
    prompt = sum(tokens[0] for tokens in new) * left // done
    completion = sum(tokens[1] for tokens in new) * left // done
    return (f"first {done} rows: {len(new)} calls in {seconds:.0f} s; the other {left}: about "
            f"{len(new) * left // done} calls, {prompt} prompt and {completion} completion tokens, "
            f"{tqdm.format_interval(seconds * left / done)}")


def bridge_rows(records: list[dict], calls: Calls, cfg) -> Iterator[tuple[dict, str, str]]:
    """Yield (record, why it is left out or "", details) in any order; show costs first, then progress.

    Raises ValueError if the servers answer none of the first rows.
    """
    def attempt(record):
        try:
            return bridge(record, calls.ask, cfg.show_gold), "", ""
        except LeftOut as why:
            return record, *why.args
        except (ConnectionError, BadImage) as error:
            return record, "unreadable image" if isinstance(error, BadImage) else "no reply", str(error)

    known = [attempt(record) for record in tqdm(records, desc="earlier runs")]
    settled = [row for row in known if row[1] != "not asked"]
    todo = [record for record, reason, _ in known if reason == "not asked"]
    most = sum(len(STAGES) - STAGES.index(stage) for _, reason, stage in known if reason == "not asked")
    print(f"{len(records)} rows, {len(settled)} of them done; {most} calls to make at most", flush=True)
    yield from settled
    calls.offline, began = False, time.monotonic()
    first, rest = todo[:cfg.concurrency], todo[cfg.concurrency:]
    with tqdm(total=len(records), initial=len(settled), desc="rows") as bar:
        for part in (first, rest):
            if part is rest and rest:
                bar.write(forecast(calls, len(first), len(rest), time.monotonic() - began))
            faults = []
            for _, row in in_parallel(attempt, part, cfg.concurrency):
                yield row
                faults += [row[2]] * (row[1] == "no reply")
                bar.update()
            if part is first and part and len(faults) == len(first):
                raise ValueError(f"none of the first {len(first)} rows got its replies: {faults[0]}")


def convert_bridge(cfg) -> None:
    """Write OUT/SPLIT.jsonl, the rows of --input with a response by modality bridging, and a manifest.

    Raises ValueError: a flag, the input, servers that do not answer, or no row to keep.
    """
    path = check_bridge(cfg)
    records, calls = read_records(cfg.input, cfg.split, (), cfg.n), Calls(cfg)
    rows = {record["id"]: (record, *why) for record, *why in bridge_rows(records, calls, cfg)}
    rows = [rows[record["id"]] for record in records]
    kept = [record | ({"task": cfg.task} if cfg.task else {}) for record, reason, _ in rows if not reason]
    rejects = [{"id": record["id"], "reason": reason, "detail": detail}
               for record, reason, detail in rows if reason]
    counts = Counter(reject["reason"] for reject in rejects)
    stages = {stage: Counter() for stage in STAGES}
    for stage, (prompt, completion) in calls.used.values():
        stages[stage].update(calls=1, prompt_tokens=prompt, completion_tokens=completion)
    settings = {name: getattr(cfg, name) for name in (
        "vlm_model", "reasoner_model", "show_gold", "temperature", "seed", "max_new_tokens", "max_tokens",
        "max_pixels", "task")}
    manifest = {"input": Path(cfg.input).name, "rows": len(rows), "records": len(kept), "left_out": counts,
                "stages": stages, "settings": settings, "rejects": rejects}
    write_json(path.with_name(f"{path.stem}_manifest.json"), manifest)
    why = ", ".join(f"{count} {reason}" for reason, count in counts.most_common()) or "none"
    write_records(path, check_records(kept, f"{cfg.input} without its rows left out ({why})"))
    again = "; the same command asks again where no reply came" if counts["no reply"] else ""
    print(f"{path}: {len(kept)} records; left out: {why}{again}")


# ----- mini suite -----
COLOURS = {"red": (214, 40, 40), "blue": (45, 85, 215), "green": (40, 150, 70), "yellow": (240, 200, 40)}
SHAPES = ("round", "square")
CELL = 28           # pixels: one merged vision token of the tiny model, so that a cell is seen whole
CELLS = "abcdefghi"  # 3 x 3, each marked with its letter: the chain of thought can name the place it looks at
INK, PLAIN, GREY = (20, 20, 20), (246, 246, 246), (205, 205, 200)
GLANCE = 0.7        # share of training rows answered at first sight: the habit that RL has to unlearn
TOLD = 0.6          # share of SFT's rows that ask for a look at each cell, and get it
LOOK = " Look at each cell."
SPLITS = {"train": 8000, "id": 500, "ood": 500, "left": 500, "right": 500}


board_font = functools.cache(ImageFont.load_default_imagefont)


def draw_board(cells: list, style: str, draw: Callable) -> Image.Image:
    """A board of 3 x 3 cells, each marked with its letter; draw(pen, x, y, cell, style) fills those not None.

    Style "ood" is another look of the same content, on grey.
    """
    image = Image.new("RGB", (3 * CELL, 3 * CELL), GREY if style == "ood" else PLAIN)
    pen, font = ImageDraw.Draw(image), board_font()
    for i, cell in enumerate(cells):
        x, y = CELL * (i % 3), CELL * (i // 3)
        if cell:
            draw(pen, x, y, cell, style)
        pen.text((x + 1, y - 1), CELLS[i], fill=INK, font=font)
    return image


SIDES = {"left": 2, "right": -2}  # pixels by which the nearest row moves in a view from that side


def draw_object(pen, x: int, y: int, cell: tuple[str, str], style: str) -> None:
    """(colour, shape) in the cell at x, y.

    Style "ood" draws it smaller; a view from the "left" or "right" has near and far rows set off.
    """
    colour, shape = cell
    x += SIDES.get(style, 0) * (y // CELL - 1)
    left, top, size = (9, 7, 15) if style == "ood" else (5, 5, 21)
    box = (x + left, y + top, x + left + size, y + top + size)
    (pen.ellipse if shape in ("round", "sphere") else pen.rectangle)(box, fill=COLOURS[colour], outline=INK)


def draw_kinds(rng: random.Random, attribute: str, count: int, total: int) -> list:
    """(colour, shape) or None for each cell: `total` objects, `count` of them with the attribute."""
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    having = [kind for kind in kinds if attribute in kind]
    lacking = [kind for kind in kinds if attribute not in kind]
    cells = [rng.choice(having) for _ in range(count)]
    cells += [rng.choice(lacking) for _ in range(total - count)]
    cells += [None] * (len(CELLS) - total)
    rng.shuffle(cells)
    return cells


def counting_example(rng: random.Random, i: int, split: str) -> dict:
    """A scene of 4..9 objects, i % 6 of which have the asked attribute.

    The thought goes through the cells in order: what is there, asked attribute last, does it count, how many
    so far.
    """
    attribute, count = rng.choice([*COLOURS, *SHAPES]), i % 6
    cells = draw_kinds(rng, attribute, count, rng.randint(max(count, 4), len(CELLS)))
    words, seen = [], 0
    for name, cell in zip(CELLS, cells):
        if cell is None:
            words += [name, "none"]
        else:
            seen += attribute in cell
            words += [name, *(cell if attribute in SHAPES else cell[::-1]),
                      "yes" if attribute in cell else "no", str(seen)]
    return {"question": f"How many {attribute} objects are there?", "answer": str(count),
            "answer_type": "number", "thought": " ".join(words),
            "pictures": [draw_board(cells, split, draw_object)],
            "meta": {"cells": [cell and " ".join(cell) for cell in cells]}}


PIECES = {"none": 0, "half": 0.5, "full": 1}
ROWS = ("top", "middle", "bottom")


def draw_piece(pen, x: int, y: int, piece: tuple[str, int], style: str) -> None:
    """A unit square, or what a diagonal leaves of it without one corner; style "ood": violet, thick lines."""
    kind, corner = piece
    outline = [(x, y), (x + CELL - 1, y), (x + CELL - 1, y + CELL - 1), (x, y + CELL - 1)]
    if kind == "half":
        del outline[corner]
    fill, width = ((190, 170, 235), 2) if style == "ood" else ((150, 190, 235), 1)
    pen.polygon(outline, fill, INK, width)


def structure_example(rng: random.Random, i: int, split: str) -> dict:
    """A figure of unit squares and their halves: how large is it (1 to 4.5), or which of its rows is largest?

    Answers of a kind are equally frequent.
    """
    while True:
        kinds = [rng.choice(list(PIECES)) for _ in CELLS]
        pieces = [PIECES[kind] for kind in kinds]
        areas = [sum(pieces[row:row + 3]) for row in (0, 3, 6)]
        largest = [name for name, area in zip(ROWS, areas) if area == max(areas)]
        if sum(areas) == 1 + i // 2 % 8 / 2 if i % 2 else largest == [ROWS[i // 2 % 3]]:
            break
    words, total = [], 0
    for k, (name, kind) in enumerate(zip(CELLS, kinds)):
        total += PIECES[kind]
        words += [name, kind, f"{total:g}"] if kind != "none" else [name, kind]
        if i % 2 == 0 and k % 3 == 2:
            words, total = [*words, ROWS[k // 3], f"{total:g}"], 0
    fields = {"question": "How large is the area of the figure?", "answer": f"{sum(areas):g}",
              "answer_type": "number"}
    if i % 2 == 0:
        options = " ".join(f"({letter}) {row}" for letter, row in zip("ABC", ROWS))
        fields = {"question": f"Which row of the figure is largest? {options}", "choices": list(ROWS),
                  "answer": "ABC"[ROWS.index(largest[0])], "answer_type": "choice"}
        words += ["largest", largest[0]]
    cells = [None if kind == "none" else (kind, rng.randrange(4)) for kind in kinds]
    return {**fields, "thought": " ".join(words), "pictures": [draw_board(cells, split, draw_piece)],
            "meta": {"cells": kinds}}


MOVES = {"front": (1, 0), "behind": (-1, 0), "left": (0, -1), "right": (0, 1), "front_left": (1, -1),
         "front_right": (1, 1), "behind_left": (-1, -1), "behind_right": (-1, 1)}  # (down, right)


def apply_calls(objects: dict, answer: str) -> dict:
    """The objects after Reason-RFT's calls: id -> {"shape", "size", "color", "material", "cell" (0..8)}.

    A move goes one cell. Raises ValueError: an unknown object, a move off the board or onto another object.
    """
    objects = {name: dict(thing) for name, thing in objects.items()}
    for function, name, value in rewards.CALL.findall(answer):
        if name not in objects:
            raise ValueError(f"no object {name}")
        if function != "change_position":
            objects[name][function.removeprefix("change_")] = value
            continue
        row, column = (a + b for a, b in zip(divmod(objects[name]["cell"], 3), MOVES[value]))
        cell = 3 * row + column
        if not (0 <= row < 3 and 0 <= column < 3) or cell in [o["cell"] for o in objects.values()]:
            raise ValueError(f"{function}({name}, {value}) leaves the board or meets another object")
        objects[name]["cell"] = cell
    return objects


def transform_example(rng: random.Random, i: int, split: str) -> dict:
    """3 or 4 objects, no two alike, before and after 1..3 calls, at most one for an object.

    In the splits left and right the second picture is taken from that side.

    The thought goes through the cells: what was there, which object that is, what is there now, and the call
    that tells, if any; then it says of each object that left its cell where it went.
    """
    kinds = [(shape, colour) for shape in ("cube", "sphere") for colour in COLOURS]
    while True:
        cells = sorted(rng.sample(range(9), rng.randint(3, 4)))
        start = {str(k): dict(shape=shape, size="medium", color=color, material="rubber", cell=cell)
                 for k, (cell, (shape, color)) in enumerate(zip(cells, rng.sample(kinds, 4)))}
        calls = {}
        for name in rng.sample(sorted(start), 1 + i % 3):
            function = rng.choice(["shape", "color", "position"])
            values = {"shape": ("cube", "sphere"), "color": COLOURS, "position": MOVES}[function]
            value = rng.choice([v for v in values if v != start[name].get(function)])
            calls[name] = f"change_{function}({name}, {value})"
        answer = ", ".join(calls[name] for name in start if name in calls)
        try:
            end = apply_calls(start, answer)
        except ValueError:
            continue
        moved = {o["cell"] for o in end.values()} - {*cells}
        apart = len(moved) == sum("position" in call for call in calls.values())  # none takes another's place
        if apart and len({(o["shape"], o["color"]) for o in end.values()}) == len(end):
            break
    before = {o["cell"]: (o["color"], o["shape"]) for o in start.values()}
    after = {o["cell"]: (o["color"], o["shape"]) for o in end.values()}
    names = {o["cell"]: name for name, o in start.items()}
    words, left = [], []
    for k, cell in enumerate(CELLS):
        words += [cell, *before.get(k, ("none",)), *names.get(k, ""), *after.get(k, ["none"] * (k in before))]
        if k in before and k in after:
            words.append(calls.get(names[k], "same"))
        elif k in before:
            left += [names[k], cell, CELLS[end[names[k]]["cell"]], calls[names[k]]]
    words += left
    listed = ", ".join(str((k, *list(o.values())[:-1])) for k, o in start.items())
    pictures = [draw_board([*map(before.get, range(9))], "train", draw_object),
                draw_board([*map(after.get, range(9))], split, draw_object)]
    return {"question": f"Objects: {listed}.", "answer": answer, "answer_type": "calls",
            "thought": " ".join(words), "pictures": pictures,
            "meta": {"objects": start, "steps": len(calls)}}


def draw_block(pen, x: int, y: int, cell: tuple[str, str], style: str) -> None:
    """(colour, shape) that touches all sides of its cell; style "ood" leaves it hollow."""
    colour, shape = cell
    ink = {"outline": COLOURS[colour], "width": 5} if style == "ood" else {"fill": COLOURS[colour]}
    (pen.ellipse if shape == "round" else pen.rectangle)((x, y, x + CELL - 1, y + CELL - 1), **ink)


def cell_box(k: int) -> list[int]:
    """Box of the k-th cell, on the scale from 0 to 1000."""
    return [round(1000 * side / 3) for side in (k % 3, k // 3, k % 3 + 1, k // 3 + 1)]


def detect_example(rng: random.Random, i: int, split: str) -> dict:
    """Boxes of the 1 + i % 4 of 4..7 objects that have the asked attribute, in the cells' order.

    An object fills its cell, so its box is the cell's, on the scale from 0 to 1000. The thought, which is
    RISE's rationale as well, goes through the cells as in counting and ends with those found.
    """
    attribute, count = rng.choice([*COLOURS, *SHAPES]), 1 + i % 4
    cells = draw_kinds(rng, attribute, count, rng.randint(max(count, 4), 7))
    words, found, boxes = [], [], []
    for k, (name, cell) in enumerate(zip(CELLS, cells)):
        words += [name, *((cell if attribute in SHAPES else cell[::-1]) if cell else ("none",))]
        if cell and attribute in cell:
            words, found = [*words, "yes"], [*found, name]
            boxes.append(cell_box(k))
    thought = " ".join([*words, "found", *found])
    return {"question": f"Find every {attribute} object.", "answer": json.dumps(boxes),
            "answer_type": "boxes", "thought": thought, "pictures": [draw_board(cells, split, draw_block)],
            "meta": {"target": f"{attribute} object", "rationale": thought}}


EMOTIONS = ("anger", "disgust", "fear", "joy", "sadness", "surprise", "neutral")
FACES = {  # what a part of the face can look like -> the emotion it speaks for
    "mouth": {"smile": "joy", "frown": "sadness", "round": "surprise", "wave": "disgust", "flat": "neutral",
              "teeth": "anger", "open": "fear"},
    "brows": {"low": "anger", "steep": "sadness", "high": "surprise", "level": "neutral"},
    "eyes": {"wide": "fear", "dots": "neutral", "closed": "joy", "narrow": "disgust"}}
WEIGHTS = {"mouth": 0.5, "brows": 0.3, "eyes": 0.2}
TILT = 12  # degrees


def draw_face(parts: dict, skin: tuple, style: str) -> Image.Image:
    """A face on 3 x 3 cells: brows in the upper corners, eyes below them, the mouth in the last row's middle.

    Style "ood": thick lines on grey, the head tilted.
    """
    image = Image.new("RGB", (3 * CELL, 3 * CELL), GREY if style == "ood" else PLAIN)
    pen, line = ImageDraw.Draw(image), {"fill": INK, "width": 3 if style == "ood" else 2}
    pen.ellipse((0, 0, 3 * CELL - 1, 3 * CELL - 1), skin, INK)
    brows, eyes, mouth = parts["brows"], parts["eyes"], parts["mouth"]
    for x, inward in ((14, 1), (56, -1)):  # left end of brow and eye, and on which side of it the nose is
        y, drop = {"high": 15, "level": 24}.get(brows, 20), {"low": 5, "steep": -5}.get(brows, 0) * inward
        pen.line((x, y - drop, x + 13, y + drop), **line)
        if eyes == "dots":
            pen.ellipse((x + 4, 38, x + 9, 43), INK)
        else:
            half = {"wide": 7, "narrow": 3, "closed": 0}[eyes]
            pen.ellipse((x, 40 - half, x + 13, 40 + half), "white", INK, line["width"])
    if mouth == "smile":
        pen.arc((31, 54, 53, 74), 20, 160, **line)
    elif mouth == "frown":
        pen.arc((31, 62, 53, 82), 200, 340, **line)
    elif mouth in ("flat", "wave"):
        low = 68 if mouth == "flat" else 74
        pen.line([(31, 68), (36, low), (42, 68), (48, low), (53, 68)], **line)
    elif mouth == "teeth":
        pen.rectangle((31, 61, 53, 75), "white", INK, line["width"])
        pen.line([(x, y) for x in (37, 42, 47) for y in (61, 75, 61)], INK)
    else:
        pen.ellipse((36, 60, 48, 76) if mouth == "round" else (31, 60, 53, 76), (90, 20, 30))
    return image.rotate(TILT, Image.Resampling.BICUBIC, fillcolor=GREY) if style == "ood" else image


def feelings(parts: dict) -> dict:
    """Probability of each emotion: every part of the face gives its weight to one."""
    told = dict.fromkeys(EMOTIONS, 0.0)
    for part, look in parts.items():
        told[FACES[part][look]] = round(told[FACES[part][look]] + WEIGHTS[part], 1)
    return told


def mood_example(rng: random.Random, i: int, split: str) -> dict:
    """A drawn face whose parts each give their weight to one emotion, all parts' looks equally frequent.

    The thought names the parts and what they speak for, RISE's rationale the parts alone.
    """
    parts = {part: rng.choice([*looks]) for part, looks in FACES.items()}
    skin = tuple(rng.randint(low, low + 55) for low in (200, 170, 140))
    words = [(part, look, FACES[part][look]) for part, look in parts.items()]
    return {"question": distribution_question(EMOTIONS), "answer": json.dumps(feelings(parts)),
            "answer_type": "distribution", "thought": " ".join(itertools.chain(*words)),
            "pictures": [draw_face(parts, skin, split)],
            "meta": {"classes": [*EMOTIONS], "rationale": " ".join(itertools.chain(*parts.items()))}}


def mixed_rationale(record: dict, rng: random.Random) -> tuple[str, str]:
    """A rationale of mixed quality, and the answer it tells: some parts left out, one in ten wrong.

    Parts are those of a face, or the cells that were found.
    """
    faces = record["answer_type"] == "distribution"
    looked, _, found = record["meta"]["rationale"].rpartition(" found ")
    good = found.split()
    parts = [*zip(good[::2], good[1::2])] if faces else [(CELLS, cell) for cell in good]
    told = []
    for i in sorted(rng.sample(range(len(parts)), rng.randint(1, len(parts)))):
        part, seen = parts[i]
        told.append((part, rng.choice([*FACES.get(part, CELLS)]) if rng.random() < 0.1 else seen))
    if faces:
        return " ".join(itertools.chain(*told)), json.dumps(feelings(dict(told)))
    cells = sorted({cell for _, cell in told})
    return " ".join([looked, "found", *cells]), json.dumps([cell_box(CELLS.index(cell)) for cell in cells])


def rise_lessons(records: list, rng: random.Random) -> tuple[list, list]:
    """SFT rows that teach the tiny model what RISE expects of one: (to see, to talk about what it sees).

    To see is to describe every picture. To talk is to write a rationale of mixed
    quality with the answer known (hop 1) and to read that one and a good one (hop 2). So that nothing is
    forgotten, every fourth is described again; every eighth is answered at first sight, with the answer of
    some other picture, for the form alone.
    """
    def row(record, kind, question, response):
        return {"id": f"{record['id']}/{kind}", "question": question, "images": record["images"],
                "answer_type": "text", "task": "plain", "source": "mini", "response": response}

    see, talk = [], []
    for i, record in enumerate(records):
        target, good = record["meta"].get("target"), record["meta"]["rationale"]
        see.append(row(record, "see", f"Where is the {target}?" if target else "Describe the face.", good))
        rationale, told = mixed_rationale(record, rng)
        read, read_good = (rewards.reconstruct_prompt(record, text) for text in (rationale, good))
        guess = f"<think> at first sight </think> <answer> {rng.choice(records)['answer']} </answer>"
        talk += [row(record, "write", rewards.cot_prompt(record), rationale),
                 row(record, "read", read, f"<answer> {told} </answer>"),
                 row(record, "good", read_good, f"<answer> {record['answer']} </answer>"),
                 *see[-1:] * (i % 4 == 0),
                 *[row(record, "guess", rewards.build_prompt(record), guess)] * (i % 8 == 0)]
    return see, talk


# task -> (examples, splits, prompt)
MINI = {"counting": (counting_example, ("train", "id", "ood"), "counting"),
        "structure": (structure_example, ("train", "id", "ood"), "structure"),
        "transform": (transform_example, ("train", "id", "left", "right"), "board"),
        "detect": (detect_example, ("train", "id", "ood"), "detect"),
        "mood": (mood_example, ("train", "id", "ood"), "mood")}


def told_to_look(records: list, thoughts: dict, rng: random.Random) -> list:
    """SFT's rows: a share TOLD of the records asks for what the others rarely do.

    So the model learns early to look, and still seldom does unless it is told to. Looking is learnt from many
    words a row, to count at first sight from one: without these rows it learns the one as fast as the other,
    and RL has nothing left to choose.
    """
    lessons = []
    for record in records:
        if rng.random() < TOLD:
            response = f"<think> {thoughts[record['id']]} </think> <answer> {record['answer']} </answer>"
            record = record | {"question": record["question"] + LOOK, "response": response,
                               "meta": record["meta"] | {"style": "told"}}
        lessons.append(record)
    return lessons


def make_mini(out: Path, seed: int, sizes: dict = SPLITS) -> None:
    """All tasks of MINI under `out`, one after the other."""
    for task in MINI:
        make_task(task, out, seed, sizes)


def make_task(task: str, out: Path, seed: int, sizes: dict = SPLITS) -> None:
    """Write TASK_SPLIT.jsonl, their images and TASK_meta.json under `out`, for all splits of a task.

    No example occurs twice, within or across splits. The same seed gives the same bytes. In training a share
    GLANCE of the responses names the answer at first sight, without looking. TASK_lessons.jsonl is for SFT
    (told_to_look), TASK_meta.json holds the same rows as Reason-RFT publishes its own, each with its thought;
    RISE's tasks have TASK_see.jsonl and TASK_talk.jsonl instead (rise_lessons).
    """
    example, splits, prompt = MINI[task]
    seen, place = set(), list(MINI).index(task)  # its line of the terminal: tasks are drawn side by side
    for split in [split for split in splits if split in sizes]:
        rng, records, rows = random.Random(f"{task}/{split}/{seed}"), [], []
        folder = out / "images" / f"{task}_{split}"
        folder.mkdir(parents=True, exist_ok=True)
        for i in tqdm(range(sizes[split]), desc=f"{task}_{split}", position=place, leave=False):
            row = example(rng, i, split)
            while (key := (row["question"], *(p.tobytes() for p in row["pictures"]))) in seen:
                row = example(rng, i, split)
            seen.add(key)
            images, thought, name = [], row.pop("thought"), f"{task}-{split}-{i}"
            for picture, suffix in zip(row.pop("pictures"), ("", "b")):
                images.append(str(folder / f"{i:05d}{suffix}.png"))
                picture.save(images[-1])
            rows.append({"id": name, "image": [os.path.relpath(path, out) for path in images],
                         "problem": row["question"], "answer": row["answer"], "cot": thought})
            if split == "train" and rng.random() < GLANCE:
                row["meta"]["style"], thought = "glance", "at first sight"
            else:
                row["meta"]["style"] = "look"
            records.append({"id": name, "images": images, "task": prompt, "source": "mini", **row,
                            "response": f"<think> {thought} </think> <answer> {row['answer']} </answer>"})
        # Rows of equal answers would otherwise sit at a fixed stride.
        rng.shuffle(records)
        write_records(out / f"{task}_{split}.jsonl", records)
        if split == "train" and "rationale" in records[0]["meta"]:
            for name, lessons in zip(("see", "talk"), rise_lessons(records, rng)):
                write_records(out / f"{task}_{name}.jsonl", lessons)
        elif split == "train":
            write_text(out / f"{task}_meta.json", json_list(rows))
            thoughts = {row["id"]: row["cot"] for row in rows}
            write_records(out / f"{task}_lessons.jsonl", told_to_look(records, thoughts, rng))


# ----- tiny model -----
TINY_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def tiny_tokenizer(texts: list[str]):
    """One token for each word of `texts`, with and without a blank before it, and bytes for all else.

    So any text in any language round-trips.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r" ?[^\s]+|\s"), "isolated"),
                                     pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    words = {piece for text in texts for piece, _ in split.pre_tokenize_str(text)}
    blank = split.pre_tokenize_str(" ")[0][0]
    words |= {word.removeprefix(blank) for word in words} - {""}
    pieces = dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *sorted(words)])
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    special = ("<|endoftext|> <|im_start|> <|im_end|> "
               "<|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>")
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special.split()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>",
                                   pad_token="<|endoftext|>")


def make_tiny(out: Path, texts: list[str], seed: int) -> None:
    """Save a random Qwen2.5-VL of about 0.6M parameters with a word-level tokenizer over `texts`.

    Hidden size 128, 2 layers, 1 vision layer. The architecture, processor and file layout are the real ones,
    so everything that loads the 7B loads this.
    """
    import torch
    from transformers import (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor,
                              Qwen2VLImageProcessor, Qwen2VLVideoProcessor)
    from transformers.utils.logging import disable_progress_bar
    tokenizer = tiny_tokenizer([*texts, "user", "assistant"])
    # The usual 0.02 suits widths of thousands; at 128 it is 4x below 1/sqrt(fan-in),
    # and learning to see takes 10x longer.
    std = 0.08
    special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids)) | tokenizer.get_added_vocab()
    config = Qwen2_5_VLConfig(
        text_config=dict(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256,
                         num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                         max_position_embeddings=32768, tie_word_embeddings=True, initializer_range=std,
                         rope_parameters={"rope_type": "default", "mrope_section": [8, 12, 12],
                                          "rope_theta": 10000.0},
                         bos_token_id=None, eos_token_id=special["<|im_end|>"],
                         pad_token_id=special["<|endoftext|>"]),
        vision_config=dict(depth=1, hidden_size=64, intermediate_size=128, num_heads=1, out_hidden_size=128,
                           patch_size=14, spatial_merge_size=2, temporal_patch_size=2, window_size=112,
                           fullatt_block_indexes=[0], initializer_range=std),
        image_token_id=special["<|image_pad|>"], video_token_id=special["<|video_pad|>"],
        tie_word_embeddings=True,
        vision_start_token_id=special["<|vision_start|>"], vision_end_token_id=special["<|vision_end|>"])
    disable_progress_bar()
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = special["<|im_end|>"]
    model.generation_config.pad_token_id = special["<|endoftext|>"]
    model.save_pretrained(out)
    size = {"shortest_edge": CELL**2, "longest_edge": 1280 * CELL**2}
    Qwen2_5_VLProcessor(Qwen2VLImageProcessor(size=size), tokenizer, Qwen2VLVideoProcessor(),
                        chat_template=TINY_TEMPLATE).save_pretrained(out)
    print(f"{out}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, "
          f"{len(tokenizer)} tokens")


# ----- command line -----
@dataclasses.dataclass(frozen=True)
class Config:
    source: str = "mini"      # mini | records (--input, in any format above) | reason_rft | bridge
    input: str = ""           # records, bridge: a file, a folder or a Hub id; reason_rft: its meta-JSON
    form: str = ""            # reason_rft: see above; records: ShareGPT as sharegpt, llava_cot or mulberry do
    image_root: str = ""      # folder of the image paths, "" = that of --input
    stage1_n: int = 1600      # reason_rft: stage 1 is this many rows from the start of the file
    stage2: str = "rest"      # reason_rft: stage 2 is rest (the rows after them) | full (as for structure)
    split: str = "train"      # records, bridge: split of a folder or Hub id, and name of the file written
    n: int = 0                # read at most this many rows, 0 for all
    seed: int = 0             # of everything drawn at random
    task: str = ""            # not mini: prompt of every row, a name in rewards.PROMPTS, "" = as it is
    strict: bool = False      # stop at a row that cannot be used instead of skipping it
    pass_rate: tuple[str, ...] = ()  # LOW HIGH: only ViRL39K rows whose pass rate lies there, both included
    pass_rate_of: str = "7b"  # whose pass rate: 7b (base, known for half of the rows) | 32b (trained)
    keep_unmeasured: bool = False  # with --pass_rate, also the rows whose rate is unknown
    vlm_url: str = "http://localhost:8000/v1"  # bridge: OpenAI-compatible server of the VLM
    vlm_model: str = ""       # bridge: its name there
    reasoner_url: str = "http://localhost:8001/v1"  # bridge: server of the text reasoner
    reasoner_model: str = ""  # bridge: its name there
    show_gold: tuple[str, ...] = ("vlm",)  # bridge: who is told the answer: vlm, reasoner, both or nobody
    temperature: float = 0.6  # bridge: of the reasoner (top_p 0.95); the VLM is greedy
    max_new_tokens: int = 8192  # bridge: tokens of a reply at most; rows with a truncated one are left out
    max_tokens: int = 16384   # bridge: rows with a longer call, prompt and reply, are left out
    max_pixels: int = 1003520  # bridge: larger images are sent scaled down to this many pixels
    concurrency: int = 16     # bridge: requests in flight at most
    timeout: float = 1800.0   # bridge: seconds to wait for a whole reply
    retries: int = 5          # bridge: further attempts per call, ever longer apart
    out: str = "data/mini"    # folder to write


@functools.cache
def documentation(cls) -> tuple[str, dict[str, str]]:
    """The docstring of a Config's file and {field: trailing comment}, from its source."""
    module = sys.modules[cls.__module__]
    # Under a profiler the module called __main__ is the profiler's own; the script is argv[0].
    defined_there = getattr(module, cls.__name__, None) is cls
    path = module.__file__ if defined_there else sys.argv[0]
    source = Path(path).read_text(encoding="utf-8")
    body = re.search(rf"^class {cls.__name__}\b.*\n((?:    .*\n|\n)*)", source, re.MULTILINE)[1]
    comments = re.findall(r"^    (\w+): .*?  # (.+)$", body, re.MULTILINE)
    return ast.get_docstring(ast.parse(source)), dict(comments)


def allowed_values(comment: str) -> list[str]:
    """The words of `a | b (why) | c` in a field's comment; none if it lists no alternatives."""
    plain = re.sub(r" ?\([^)]*\)", "", comment)
    listed = re.search(r"[\w-]+(?: \| [\w-]+)+", plain)
    return listed[0].split(" | ") if listed else []


def parse_bool(text: str) -> bool:
    known = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text}: use true or false")
    return known[text.lower()]


def parse_choice(allowed: list[str], text: str) -> str:
    if text not in allowed:
        raise argparse.ArgumentTypeError(f"{text}: use {' | '.join(allowed)}")
    return text


def parse_config(cls, argv: list[str] | None = None):
    """Build the frozen dataclass `cls` from `--key value`, `--key=value`, bare bools and lists.

    The default gives the type; the trailing comment is the --help text, and `a | b` in it are the values
    allowed. A bad flag exits with one line.
    """
    docstring, comments = documentation(cls)
    parser = argparse.ArgumentParser(description=docstring, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"{parser.prog}: {message}")
    for field in dataclasses.fields(cls):
        if field.name not in comments:
            parser.error(f"Config.{field.name} has no comment behind its default: it is the --help text")
        comment, default = comments[field.name], field.default
        allowed = allowed_values(comment)
        if isinstance(default, bool):
            kind = dict(type=parse_bool, nargs="?", const=True, metavar="true|false")
        elif isinstance(default, tuple):
            kind = dict(type=str, nargs="*")
        elif isinstance(default, str) and allowed:
            kind = dict(type=functools.partial(parse_choice, allowed))
        else:
            kind = dict(type=type(default))
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text = f"{comment} [{shown}]".replace("%", "%%")
        parser.add_argument(f"--{field.name}", default=default, help=text, **kind)

    values, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].lstrip("-").split("=")[0]
        nearest = difflib.get_close_matches(flag, comments, n=1, cutoff=0)[0]
        parser.error(f"unknown flag {unknown[0]}; did you mean --{nearest}?")
    given = vars(values)
    for name, value in given.items():
        if isinstance(value, list):
            given[name] = tuple(value)
    return cls(**given)


CONVERTERS = {"records": convert_input, "reason_rft": convert_reason_rft, "bridge": convert_bridge}


def main(cfg: Config) -> None:
    if cfg.source == "mini":
        at_ctrl_c = (signal.SIGINT, signal.SIG_IGN)  # this process ends the others
        with multiprocessing.Pool(initializer=signal.signal, initargs=at_ctrl_c) as pool:
            pool.starmap(make_task, [(task, Path(cfg.out), cfg.seed) for task in MINI], chunksize=1)
        print(f"{cfg.out}: {', '.join(MINI)}")
        files = [*Path(cfg.out).glob("*_train.jsonl"), *Path(cfg.out).glob("*_talk.jsonl")]
        rows = [r for path in sorted(files) for r in read_records(path, need=("response",))]
        texts = [text for r in rows for text in (rewards.build_prompt(r), r["response"])]
        make_tiny(Path("out/tiny"), [*texts, LOOK], cfg.seed)
    else:
        check_choice(cfg, "task", ("", *rewards.PROMPTS))
        CONVERTERS[cfg.source](cfg)


if __name__ == "__main__":
    try:
        main(parse_config(Config))
    except (OSError, ValueError) as error:
        sys.exit(f"data_prep.py: {error}")
