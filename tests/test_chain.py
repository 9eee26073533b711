"""One chain of files: each imports only from those before it, and every definition exists once."""
import ast
import fnmatch
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHAIN = ("rewards", "data_prep", "sft", "eval", "grpo", "rise")
OWN = {"Config", "main", "check", "evaluate"}  # same name, each stage has its own
NO_TORCH = ("rewards", "data_prep")
TOP_LEVEL = {"rewards.py", "data_prep.py", "sft.py", "grpo.py", "rise.py", "eval.py", "tests", "docs",
             "README.md", "requirements.txt", "requirements-gpu.txt", "LICENSE", ".gitignore", ".ci", ".git"}


@functools.cache
def parse(stage):
    """Source and syntax tree of a stage."""
    source = (ROOT / f"{stage}.py").read_text(encoding="utf-8")
    return source, ast.parse(source)


def definitions(stage):
    """{name: node} of what a stage defines at its top level."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: node for node in parse(stage)[1].body if isinstance(node, kinds)}


def imports(tree):
    """(module, name or None) of every import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module.split(".")[0], alias.name) for alias in node.names)


@pytest.mark.parametrize("stage", CHAIN)
def test_a_file_imports_only_from_those_before_it(stage):
    before = CHAIN[:CHAIN.index(stage)]
    for module, name in imports(parse(stage)[1]):
        if module in CHAIN:
            assert module in before, f"{stage}.py imports {module}.py"
            assert name is None or name in parse(module)[0], f"{module}.py has no {name}"


@pytest.mark.parametrize("stage", CHAIN)
def test_no_stage_imports_the_loop_of_another(stage):
    taken = [name for module, name in imports(parse(stage)[1]) if module in CHAIN]
    assert not {"main", "Config"} & set(taken)


@pytest.mark.parametrize("stage", CHAIN)
def test_a_name_is_imported_from_the_file_that_defines_it(stage):
    for module, name in imports(parse(stage)[1]):
        if module in CHAIN and name:
            assigned = {t.id for node in parse(module)[1].body if isinstance(node, ast.Assign)
                        for t in node.targets if isinstance(t, ast.Name)}
            known = definitions(module).keys() | assigned
            assert name in known, f"{stage}.py takes {name} from {module}.py"


def test_every_definition_exists_once():
    owners = {}
    for stage in CHAIN:
        for name in definitions(stage):
            owners.setdefault(name, []).append(stage)
    assert {name: stages for name, stages in owners.items() if len(stages) > 1 and name not in OWN} == {}


def bodies(stage):
    """(where, normalised body) of every function of 6 lines or more, methods and inner ones too."""
    for node in ast.walk(parse(stage)[1]):
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 5:
            body = node.body[1:] if ast.get_docstring(node) else node.body
            yield f"{stage}.{node.name}", "\n".join(ast.dump(line) for line in body)


def test_no_body_exists_twice_under_another_name():
    seen = {}
    for stage in CHAIN:
        for where, body in bodies(stage):
            assert body not in seen, f"{where} is {seen.get(body)} again"
            seen[body] = where


@pytest.mark.parametrize("stage", NO_TORCH)
def test_the_leaves_load_without_torch(stage):
    top = {name.split(".")[0] for node in parse(stage)[1].body if isinstance(node, ast.Import)
           for name in [alias.name for alias in node.names]}
    assert not top & {"torch", "transformers", "vllm", "datasets"}


@pytest.mark.parametrize("stage", CHAIN[1:])
def test_every_flag_is_read_somewhere(stage):
    """A flag that nothing reads is a promise the stage does not keep."""
    chain = CHAIN[:CHAIN.index(stage) + 1]
    source = "\n".join(parse(file)[0] for file in chain)
    fields = [n.target.id for n in definitions(stage)["Config"].body if isinstance(n, ast.AnnAssign)]
    for field in fields:
        assert f"cfg.{field}" in source or f'"{field}"' in source, f"{stage}.py --{field}"


@pytest.mark.parametrize("path", sorted([*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]), ids=lambda p: p.name)
def test_line_width(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    wide = [f"{path.name}:{i} has {len(line)} columns" for i, line in enumerate(lines, 1) if len(line) > 110]
    assert not wide, f"{len(wide)} lines; " + "; ".join(wide[:5])


def test_top_level_holds_nothing_else():
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()]
    names = {p.name for p in ROOT.iterdir()
             if not any(fnmatch.fnmatch(p.name, pattern) for pattern in ignored)}
    assert names <= TOP_LEVEL
