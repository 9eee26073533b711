"""Command lines: every stage's Config through parse_config."""
import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data_prep
import rewards

ROOT = Path(__file__).resolve().parents[1]
STAGES = [s for s in ("sft", "grpo", "rise", "eval", "data_prep") if (ROOT / f"{s}.py").exists()]


@pytest.fixture(params=STAGES)
def stage(request):
    return importlib.import_module(request.param)


def parse(stage, line):
    """Config of a command line; an empty one is not sys.argv."""
    return stage.parse_config(stage.Config, line.split())


def refusal(stage, *argv):
    """The one-line message of a refused command line."""
    with pytest.raises(SystemExit) as stop:
        stage.parse_config(stage.Config, list(argv))
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


def choices(stage, field):
    """The values that a field's comment allows, [] for any."""
    comment = re.search(rf"^    {field.name}: .*?  # (.+)$", Path(stage.__file__).read_text(), re.M)[1]
    return data_prep.allowed_values(comment)


def of_type(stage, kind):
    return [f for f in dataclasses.fields(stage.Config) if isinstance(f.default, kind)
            and not (kind is int and isinstance(f.default, bool))]


def test_no_flags_give_the_defaults(stage):
    assert parse(stage, "") == stage.Config()


def test_every_field_takes_its_own_default(stage):
    for f in dataclasses.fields(stage.Config):
        value = [*f.default] if isinstance(f.default, tuple) else [str(f.default)]
        assert stage.parse_config(stage.Config, [f"--{f.name}", *value]) == stage.Config()


@pytest.mark.parametrize("form", ["--{} {}", "--{}={}"])
def test_every_number_and_text_can_be_set(stage, form):
    for kind, written, value in ((int, "7", 7), (float, "2.5e-3", 0.0025), (str, "some/where", "some/where")):
        for f in of_type(stage, kind):
            if choices(stage, f):
                continue
            expected = dataclasses.replace(stage.Config(), **{f.name: value})
            assert parse(stage, form.format(f.name, written)) == expected
    for f in of_type(stage, str):
        if not choices(stage, f):
            assert getattr(parse(stage, f"--{f.name}="), f.name) == ""


def test_alternatives_in_a_comment_are_the_allowed_values(stage):
    for f in of_type(stage, str):
        allowed = choices(stage, f)
        assert not allowed or f.default in allowed
        for value in allowed:
            assert getattr(parse(stage, f"--{f.name} {value}"), f.name) == value
        if allowed:
            message = refusal(stage, f"--{f.name}", "no-such-thing")
            assert f"--{f.name}: no-such-thing: use {' | '.join(allowed)}" in message


@pytest.mark.parametrize("comment, allowed", [
    ("token | sequence", ["token", "sequence"]),
    ("hf (transformers) | vllm (here, on this GPU) | server (--servers)", ["hf", "vllm", "server"]),
    ("cut responses: keep | zero (reward 0) | mask (no gradient)", ["keep", "zero", "mask"]),
    ("sdpa | flash_attention_2 | eager", ["sdpa", "flash_attention_2", "eager"]),
    ("7b (base) | 32b (trained)", ["7b", "32b"]), ("0 = off", []), ("a file (x | y)", []), ("", [])])
def test_allowed_values(comment, allowed):
    assert data_prep.allowed_values(comment) == allowed


@pytest.mark.parametrize("written, value", [
    ("--{}", True), ("--{} true", True), ("--{} false", False), ("--{}=true", True), ("--{}=False", False),
    ("--{} TRUE", True), ("--{} 1", True), ("--{}=0", False)])
def test_bools(stage, written, value):
    assert of_type(stage, bool) or stage.__name__ == "eval"
    for f in of_type(stage, bool):
        assert getattr(parse(stage, written.format(f.name)), f.name) is value


def test_a_bare_bool_before_another_flag(stage):
    for f in of_type(stage, bool):
        cfg = parse(stage, f"--{f.name} --seed 3")
        assert getattr(cfg, f.name) is True and cfg.seed == 3


def test_lists(stage):
    for f in of_type(stage, tuple):
        assert getattr(parse(stage, f"--{f.name} a b=c d.jsonl --seed 3"), f.name) == ("a", "b=c", "d.jsonl")
        assert getattr(parse(stage, f"--{f.name}=a"), f.name) == ("a",)
        assert getattr(parse(stage, f"--{f.name}"), f.name) == ()


def test_the_last_of_a_repeated_flag_counts(stage):
    assert parse(stage, "--seed 1 --seed=2").seed == 2


def test_configs_are_flat_frozen_and_typed(stage):
    with pytest.raises(dataclasses.FrozenInstanceError):
        stage.Config().seed = 1
    for f in dataclasses.fields(stage.Config):
        assert isinstance(f.default, (bool, int, float, str, tuple)), f.name


@pytest.mark.parametrize("argv, near", [
    (["--sede", "1"], "--seed"), (["--sed=1"], "--seed"), (["--SEED", "1"], None), (["--out_", "x"], "--out"),
    (["-seed", "1"], "--seed"), (["--zzzzzz"], None), (["stray"], None), (["--seed", "1", "stray"], None)])
def test_unknown_flags_name_the_nearest(stage, argv, near):
    message = refusal(stage, *argv)
    bad = next(a for a in argv if a.startswith("-") and not a.startswith("--seed") or a == "stray")
    names = {f.name for f in dataclasses.fields(stage.Config)}
    assert bad in message and (near or "--") in message
    assert re.search(r"did you mean --(\w+)\?", message)[1] in names


def test_abbreviations_are_refused(stage):
    names = [f.name for f in dataclasses.fields(stage.Config)]
    for name in names:
        if len(name) > 2 and name[:-1] not in names:
            assert f"unknown flag --{name[:-1]};" in refusal(stage, f"--{name[:-1]}", "1")


@pytest.mark.parametrize("kind, written", [
    (int, ["x"]), (int, ["1.5"]), (int, [""]), (int, []), (float, ["x"]), (float, ["1,5"]), (float, []),
    (str, []), (bool, ["maybe"]), (bool, ["2"])])
def test_ill_typed_values_are_one_line_errors_that_name_the_flag(stage, kind, written):
    for f in of_type(stage, kind):
        message = refusal(stage, f"--{f.name}", *written)
        assert f"--{f.name}" in message and all(w in message for w in written)


def test_every_field_has_a_comment_and_it_is_the_help(stage, capsys):
    source = Path(stage.__file__).read_text().split("class Config:", 1)[1].split("\n\n\n", 1)[0]
    with pytest.raises(SystemExit) as stop:
        stage.parse_config(stage.Config, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and " ".join(stage.__doc__.split()) in shown
    for f in dataclasses.fields(stage.Config):
        comment = re.search(rf"^    {f.name}: .*?  +# (\S.*)$", source, re.M)
        assert comment, f"{f.name} has no comment"
        assert f"--{f.name}" in shown and " ".join(comment[1].split()) in shown


def test_help_of_a_script():
    done = subprocess.run([sys.executable, ROOT / "data_prep.py", "--help"],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "--source" in done.stdout and not done.stderr


@pytest.mark.parametrize("profiler", ["cProfile", "pdb"])
def test_a_stage_runs_under_a_profiler_and_a_debugger(profiler, tmp_path):
    """There __main__ is another module, and the comments of Config must still be found."""
    extra = ["-c", "continue"] if profiler == "pdb" else []
    done = subprocess.run([sys.executable, "-m", profiler, *extra, ROOT / "data_prep.py", "--help"],
                          cwd=tmp_path, input="q\n", capture_output=True, text=True, timeout=120)
    assert "--source" in done.stdout and "records (--input" in done.stdout, done.stderr


def test_a_bad_flag_of_a_script_is_one_line_and_no_traceback():
    done = subprocess.run([sys.executable, ROOT / "data_prep.py", "--sorce", "mini"],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == "data_prep.py: unknown flag --sorce; did you mean --source?\n"


# ----- the command lines in README.md and docs/


PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def page_commands():
    """(page, stage, flags) of every command line in a code block, without its comments."""
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for block in re.findall(r"^```\w*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            for line in re.split(r"\n|&&", block.replace("\\\n", " ")):
                found = re.search(r"\b(data_prep|sft|grpo|rise|eval)\.py(.*)", line)
                if found and not line.startswith("#"):
                    yield page, found[1], shlex.split(found[2].split(" ...")[0], comments=True)


COMMANDS = [*page_commands()]


def test_every_page_with_commands_is_read():
    assert {page for page, *_ in COMMANDS} >= {"README.md", "docs/recipes.md", "docs/reference.md"}


@pytest.mark.parametrize("page, name, flags", COMMANDS, ids=lambda x: x if isinstance(x, str) else "")
def test_commands_of_the_pages_are_accepted(page, name, flags, monkeypatch):
    """Flags exist, have the right type and go together; vLLM and 64 ranks are assumed."""
    module = importlib.import_module(name)
    cfg = module.parse_config(module.Config, flags)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 64)
    if hasattr(module, "check"):
        module.check(cfg)
    if name == "grpo":
        rewards.parse_reward_spec(cfg.reward)
