"""What stages share is written out in each: same name, body and order. This keeps the copies equal."""
import ast
import fnmatch
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("sft", "grpo", "rise", "eval", "data_prep")
TRAINERS, RL = ("sft", "grpo", "rise"), ("grpo", "rise")
SAMPLERS, EVERY = (*RL, "eval"), (*TRAINERS, "eval")
TWINS = {
    "parse_config": STAGES,
    "init_distributed": TRAINERS, "global_sum": TRAINERS, "global_max": TRAINERS, "load_policy": TRAINERS,
    "vision_ids": EVERY, "stop_ids": EVERY,
    "lr_at": TRAINERS, "make_optimizer": TRAINERS, "describe": TRAINERS,
    "encode_prompt": EVERY, "schedule": TRAINERS, "prepared": TRAINERS, "micro_batches": TRAINERS,
    "collate": EVERY,
    "ResponseLogprob": TRAINERS, "token_logprobs": TRAINERS,
    "Rollout": RL, "rollout_seed": RL, "build_engine": SAMPLERS, "VLLM": SAMPLERS, "sync_weights": RL,
    "repack_heads": RL, "sleep_engine": RL, "Server": RL, "generate": SAMPLERS, "decode": SAMPLERS,
    "prefill": SAMPLERS, "truncate": SAMPLERS,
    "all_logprobs": RL, "group_advantages": RL, "grpo_loss": RL,
    "save_checkpoint": TRAINERS, "load_checkpoint": TRAINERS, "RunLog": TRAINERS,
}
OWN = {"Config", "main", "check", "evaluate", "update", "step_metrics"}  # same name, each stage has its own
TOP_LEVEL = {"rewards.py", "data_prep.py", "sft.py", "grpo.py", "rise.py", "eval.py", "tests", "README.md",
             "requirements.txt", "requirements-gpu.txt", "LICENSE", ".gitignore", ".ci", ".git"}


@functools.cache
def parse(stage):
    """Source lines and top-level definitions {name: node} of a stage."""
    source = (ROOT / f"{stage}.py").read_text(encoding="utf-8")
    return source.splitlines(), {n.name: n for n in ast.parse(source).body
                                 if isinstance(n, (ast.FunctionDef, ast.ClassDef))}


def text(stage, name):
    """Source of a definition with its decorators and comments."""
    lines, nodes = parse(stage)
    first = min([nodes[name].lineno, *(d.lineno for d in nodes[name].decorator_list)])
    return "\n".join(line.rstrip() for line in lines[first - 1:nodes[name].end_lineno])


def fields(stage):
    return {n.target.id for n in parse(stage)[1]["Config"].body if isinstance(n, ast.AnnAssign)}


@pytest.mark.parametrize("name", TWINS)
def test_twins_are_identical(name):
    texts = {stage: text(stage, name) for stage in TWINS[name]}
    first = next(iter(texts))
    for stage, other in texts.items():
        assert other == texts[first], f"{name} differs between {first}.py and {stage}.py"


@pytest.mark.parametrize("stage", STAGES)
def test_every_definition_under_a_twins_heading_is_in_the_table(stage):
    lines, nodes = parse(stage)
    headings = {i: "twins" in line for i, line in enumerate(lines, 1) if line.startswith("# -----")}
    under = {name for name, n in nodes.items()
             if headings.get(max((i for i in headings if i < n.lineno), default=0), False)}
    assert under - OWN == {name for name, stages in TWINS.items() if stage in stages}


def test_a_name_defined_in_two_stages_is_a_twin():
    owners = {}
    for stage in STAGES:
        for name in parse(stage)[1]:
            owners.setdefault(name, []).append(stage)
    assert {name for name, stages in owners.items() if len(stages) > 1} - OWN <= TWINS.keys()


@pytest.mark.parametrize("stage", STAGES)
def test_twins_come_in_the_same_order(stage):
    names = [name for name in parse(stage)[1] if name in TWINS]
    for other in STAGES:
        common = [name for name in parse(other)[1] if name in names]
        assert common == [name for name in names if name in common], other


@pytest.mark.parametrize("name", TWINS)
def test_every_field_a_twin_reads_is_in_each_config(name):
    for stage in TWINS[name]:
        read = {n.attr for n in ast.walk(parse(stage)[1][name])
                if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "cfg"}
        assert read <= fields(stage), f"{stage}.py has no --{read - fields(stage)}"


@pytest.mark.parametrize("stage", STAGES)
def test_every_field_is_read_somewhere(stage):
    """A flag that nothing reads is a promise the stage does not keep; data_prep's functions may read it."""
    source = "\n".join(parse(stage)[0])
    borrowed = {a.name for n in ast.parse(source).body if isinstance(n, ast.ImportFrom) for a in n.names}
    source += "\n".join(text("data_prep", name) for name in borrowed & parse("data_prep")[1].keys())
    for field in fields(stage):
        elsewhere = source.split("class Config", 1)[1]
        assert f"cfg.{field}" in source or f'"{field}"' in elsewhere, f"{stage}.py --{field}"


@pytest.mark.parametrize("stage", STAGES)
def test_stages_import_only_the_leaves(stage):
    tree = ast.parse("\n".join(parse(stage)[0]))
    imported = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not imported & (set(STAGES) - {"data_prep"} | ({"data_prep"} if stage == "data_prep" else set()))
    top = {a.name.split(".")[0] for n in tree.body if isinstance(n, ast.Import) for a in n.names}
    assert stage != "data_prep" or not top & {"torch", "transformers", "vllm"}


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda p: p.name)
def test_line_width(path):
    wide = [f"{path.name}:{i} has {len(line)} columns"
            for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 110]
    assert not wide, f"{len(wide)} lines; " + "; ".join(wide[:5])


def test_top_level_holds_nothing_else():
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()]
    names = {p.name for p in ROOT.iterdir()
             if not any(fnmatch.fnmatch(p.name, pattern) for pattern in ignored)}
    assert names <= TOP_LEVEL
