"""The pages: a short front page, links that lead somewhere, and names that exist in the code."""
import ast
import dataclasses
import functools
import importlib
import random
import re
from pathlib import Path

import pytest

import eval as evaluation
import rewards
from bench_quickstart import draw_arms, draw_curve, interval, tick_size

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STAGES = ("data_prep", "sft", "eval", "grpo", "rise")
# Flags in the pages that are not ours.
FOREIGN = {"--nnodes", "--nproc_per_node", "--rdzv_backend", "--rdzv_endpoint",  # torchrun
           "--generation-config", "--logprobs-mode",  # vllm serve
           "--no-build-isolation",  # pip
           "--curve", "--threads", "--pythons", "--trl", "--only",  # tests/bench_*.py
           "--dist",  # pytest
           "--help"}


@pytest.fixture(params=PAGES, ids=lambda path: path.name)
def page(request):
    return request.param


def split(text):
    """The numbered lines of a page outside fenced code, and those inside."""
    prose, code, inside = [], [], False
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            inside = not inside
        else:
            (code if inside else prose).append((number, line))
    assert not inside, "a code block is not closed"
    return prose, code


def read(path):
    return path.read_text(encoding="utf-8")


def headings(path):
    """The lines of a page that are headings."""
    return [line for _, line in split(read(path))[0] if re.match(r"#+ ", line)]


def anchors(path):
    """What #anchor may name in a page, a heading each: lower case, without punctuation,
    as GitHub makes it.
    """
    found = []
    for line in headings(path):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line.lstrip("# "))
        found.append(re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-"))
    assert len(set(found)) == len(found), (
        f"{path.name}: two headings are alike, and a link can name only the first")
    return found


def section(path, title):
    """The text below a `## title`, its subsections too, without code blocks."""
    prose = "\n".join(line for _, line in split(read(path))[0])
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", prose, re.MULTILINE | re.DOTALL)[1]


def rows(text):
    """The cells of every row of the tables in a text, heads and rules left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    body = [line for line, below in zip(lines, [*lines[1:], ""])
            if not line.startswith("|---") and not below.startswith("|---")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in body]


def names(cells):
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


# ----- form


def test_the_front_page_is_short():
    assert len(read(ROOT / "README.md").split()) <= 2000


def test_lines_fit_a_screen(page):
    wide = [f"{page.name}:{number} has {len(line)} columns" for number, line in split(read(page))[0]
            if len(line) > 120 and not line.startswith("|")]
    assert not wide


def test_rows_of_a_table_have_as_many_cells_as_its_head(page):
    table = []
    for number, line in [*split(read(page))[0], (0, "")]:
        if line.startswith("|"):
            table.append((number, len(re.split(r"(?<!\\)\|", line))))
        else:
            assert len({cells for _, cells in table}) <= 1, f"{page.name}: table up to line {number}: {table}"
            table = []


def test_links_lead_somewhere(page):
    prose = "\n".join(line for _, line in split(read(page))[0])
    links = re.findall(r"\]\(([^)]+)\)", prose)
    assert links
    for link in links:
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), (
            f"{page.name}: {link}: {target.name} has no such heading")


@pytest.mark.parametrize("path", PAGES[1:], ids=lambda path: path.name)
def test_a_table_of_contents_has_every_section(path):
    head = read(path).split("\n## ", 1)[0]
    sections = [anchor for anchor, line in zip(anchors(path), headings(path)) if line.startswith("## ")]
    assert [link for link in re.findall(r"\(#([^)]+)\)", head) if link in sections] == sections


# ----- names


@functools.cache
def known_flags():
    """Every flag of every stage."""
    configs = [importlib.import_module(stage).Config for stage in STAGES]
    return {f"--{field.name}" for config in configs for field in dataclasses.fields(config)}


def test_flags_exist(page):
    """In commands, too: tests/test_config.py reads only those of the stages."""
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", read(page)))
    assert named <= known_flags() | FOREIGN


def test_foreign_flags_are_all_needed():
    everything = "\n".join(map(read, PAGES))
    assert [flag for flag in sorted(FOREIGN) if flag not in everything] == []


def test_files_exist(page):
    for name in re.findall(r"`((?:tests/|docs/)?\w+\.(?:py|txt|md))`", read(page)):
        assert (ROOT / name).exists() or (ROOT / "docs" / name).exists(), f"{page.name}: {name}"


@functools.cache
def defined(name):
    """The functions, classes and constants at the top level of a file."""
    found = set()
    for node in ast.parse(read(ROOT / name)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def test_the_fork_guide_names_what_there_is():
    """`a`, `b` in `file.py`: both are defined there, not only imported."""
    guide = rows(section(ROOT / "README.md", "Fork guide"))
    assert len(guide) >= 10
    checked = 0
    for _, touch in guide:
        pending = []
        for name in re.findall(r"`([^`]+)`", touch):
            if re.fullmatch(r"\w+\.py", name):
                missing = [one for one in pending if one not in defined(name)]
                assert not missing, f"{name} does not define {missing}"
                checked += len(pending)
                pending = []
            elif re.fullmatch(r"[A-Za-z]\w*", name) and "FORMAT" not in name:
                pending.append(name)
        assert not pending, f"{pending}: in which file?"
    assert checked >= 15


def test_every_reward_is_explained():
    explained = names(first for first, _ in rows(section(ROOT / "docs/reference.md", "Rewards")))
    assert sorted(explained) == sorted(rewards.REWARDS)


def test_every_benchmark_is_explained():
    explained = names(first for first, *_ in rows(section(ROOT / "docs/reference.md", "Benchmarks")))
    assert sorted(explained) == sorted(evaluation.BENCHES)


def test_sizes_of_benchmarks():
    """One number, or one for each name of the row."""
    for first, sizes, *_ in rows(section(ROOT / "docs/reference.md", "Benchmarks")):
        own = names([first])
        said = [int(size.replace(",", "")) for size in re.findall(r"\d[\d,]*\d", sizes)]
        for name, size in zip(own, said * len(own) if len(said) == 1 else said):
            assert size == (evaluation.BENCHES[name].size or 500), name


@pytest.mark.parametrize("stage", ["sft", "grpo", "rise"])
def test_every_metric_is_explained(stage):
    explained = set(names(first for first, _ in rows(section(ROOT / "docs/reference.md", "Metrics"))))
    families = "|".join(sorted({name.split("/")[0] for name in explained}))
    logged = set(re.findall(rf'"((?:{families})/[a-z_]+)"', read(ROOT / f"{stage}.py")))
    assert logged and logged <= explained


# ----- the picture


def curve_rows(steps, longest):
    found = [{"step": 0, "eval/accuracy": 0.25, "eval/len": 9.0}]
    for step in range(1, steps + 1):
        found.append({"step": step, "len/mean": longest * step / steps})
        if step % 4 == 0:
            found[-1]["eval/accuracy"] = 1.0
    return found


def test_the_curve_is_an_image_with_its_own_background(tmp_path):
    draw_curve(curve_rows(8, 45.0), tmp_path / "curve.svg")
    drawn = read(tmp_path / "curve.svg")
    assert ast.literal_eval(re.search(r'viewBox="0 0 (\d+) (\d+)"', drawn).expand(r"(\1, \2)")) == (640, 300)
    assert drawn.index('fill="#ffffff"') < drawn.index("<polyline")
    for words in ("held-out accuracy", "length of sampled responses", "accuracy (%)", "tokens", "GRPO step"):
        assert words in drawn
    sampled, held_out = re.findall(r'<polyline points="([^"]+)"', drawn)[:2]
    assert len(sampled.split()) == 8 and len(held_out.split()) == 3
    # Accuracy: a quarter of the way up at step 0, at the top of the frame at the last step.
    first, *_, last = [tuple(map(float, point.split(","))) for point in held_out.split()]
    assert first == (62, 195) and last == (578, 48)
    # Length: five lines of 10 tokens, so 45 tokens are at nine tenths of the frame.
    assert sampled.split()[-1] == "578.0,67.6"


def test_a_curve_needs_evaluations_and_rollouts(tmp_path):
    for lacking in ([], curve_rows(8, 45.0)[:1], [{"step": 1, "len/mean": 3.0}]):
        with pytest.raises(ValueError, match="metrics.jsonl"):
            draw_curve(lacking, tmp_path / "curve.svg")
    assert not (tmp_path / "curve.svg").exists()


@pytest.mark.parametrize("largest, most, size", [
    (40, 8, 5), (45, 5, 10), (1, 8, 1), (4096, 5, 1000), (200, 8, 50)])
def test_ticks_are_round(largest, most, size):
    assert tick_size(largest, most) == size


def test_arms_are_dots_and_a_bar_for_their_mean(tmp_path):
    draw_arms({"GRPO": [20, 40], "SSR": [0, 100, 50]}, "accuracy", tmp_path / "arms.svg")
    drawn = read(tmp_path / "arms.svg")
    places = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', drawn)]
    assert places == [234, 318, 150, 570, 360]  # 150 is 0 %, 570 is 100 %
    bars = [float(x) + 1.5 for x in re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="3"', drawn)]
    assert bars == [276, 360] and ">30.0</text>" in drawn and ">50.0</text>" in drawn


@pytest.mark.parametrize("differences, said", [
    ([5, 5, 5], "+5.0 (+5.0 to +5.0, 3 runs)"), ([-2, -2], "-2.0 (-2.0 to -2.0, 2 runs)"),
    ([1], "+1.0 (+1.0 to +1.0, 1 runs)"), ([-1, 1], "+0.0 (-1.0 to +1.0, 2 runs, no difference)"),
    ([0, 3], "+1.5 (+0.0 to +3.0, 2 runs, no difference)"),
    ([1, 2], "+1.5 (+1.0 to +2.0, 2 runs, not settled)"),
    # The bootstrap leaves 0 out; Student's t gives 4.68 +- 6.4, from a table of its own.
    ([2.8, 10.8, 6.6, -3.0, 6.2], "+4.7 (+0.5 to +8.4, 5 runs, not settled)"),
    ([80, 61, 60, 71, 75], "+69.4 (+62.6 to +76.2, 5 runs)")])
def test_intervals_of_few_differences(differences, said):
    assert interval(differences) == said


def test_an_interval_is_that_of_the_mean():
    """Of 400 draws with a standard deviation of 10, about 1.96 x 10 / sqrt(400) to both sides."""
    rng = random.Random(1)
    drawn = [rng.gauss(3, 10) for _ in range(400)]
    low, high = map(float, re.search(r"\((\S+) to (\S+),", interval(drawn, 2000)).groups())
    assert low == pytest.approx(sum(drawn) / 400 - 0.98, abs=0.15)
    assert high == pytest.approx(sum(drawn) / 400 + 0.98, abs=0.15)


def test_the_picture_of_the_front_page_is_there():
    assert "](docs/curve.svg)" in read(ROOT / "README.md")
    assert read(ROOT / "docs/curve.svg").startswith("<svg ")
