"""The stages as users start them: hand-over, exact resume, SIGTERM, errors, and torchrun with two ranks."""
import atexit
import functools
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import wait_until
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "real"
SFT = ["sft.py", "--model", "tiny",
       "--data", "data/counting_train.jsonl", "--eval_data", "data/counting_id.jsonl",
       "--batch_size", "6", "--eval_n", "6", "--warmup", "1", "--token_budget", "1024"]
GRPO = ["grpo.py", "--model", "tiny",
        "--data", "data/counting_train.jsonl", "--eval_data", "data/counting_id.jsonl",
        "--eval_n", "6", "--eval_every", "2", "--prompts_per_step", "6", "--group_size", "4",
        "--max_new_tokens", "12", "--warmup", "1", "--samples_every", "1", "--token_budget", "256"]


@pytest.fixture
def work(tiny, tmp_path):
    """A folder to run in, with the small mini suite and the tiny model."""
    shutil.copytree(tiny.mini, tmp_path / "data")
    shutil.copytree(tiny.model, tmp_path / "tiny")
    return tmp_path


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def start(work, *argv, torchrun=(), python=(), **options):
    """Start a stage script in `work` without waiting for it; `python` are flags of the interpreter."""
    launcher = ["-m", "torch.distributed.run", *torchrun] if torchrun else python
    return subprocess.Popen([sys.executable, *launcher, ROOT / argv[0], *argv[1:]], cwd=work,
                            env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            **options)


def launch(work, *argv, code=0, **options):
    """Run a stage script in `work` as a new process; return what it printed."""
    process = start(work, *argv, **options)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output[-3000:]
    return output


# Most of a short run is importing torch: this process does it once and forks a child for each rank of a run.
NURSERY = """
import json, os, runpy, sys, traceback
import data_prep, torch, transformers, datasets
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForImageTextToText, AutoProcessor
for line in sys.stdin:
    argv, folder, log, ranks, port = json.loads(line)
    children = []
    for rank in range(ranks):
        if child := os.fork():
            children.append(child)
            continue
        if ranks > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                              LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="localhost", MASTER_PORT=str(port))
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        os.chdir(folder)
        sys.argv, code = argv, 0
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            print(end.code or "", file=sys.stderr)
        except BaseException:
            code = 1
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(max(codes, key=abs), flush=True)
"""


@functools.cache
def nursery():
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    process = subprocess.Popen([sys.executable, "-c", NURSERY], env=environment() | {"PYTHONPATH": path},
                               text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    atexit.register(process.kill)
    return process


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def run(work, *argv, ranks=1, code=0):
    """Run a stage script in `work`, on ranks as torchrun would start them; return what they printed."""
    log, stage = work / f"log{time.time_ns()}", str(ROOT / argv[0])
    asked = [[stage, *map(str, argv[1:])], str(work), str(log), ranks, free_port()]
    print(json.dumps(asked), file=nursery().stdin, flush=True)
    done = int(nursery().stdout.readline())
    output = log.read_text()
    assert done == code, output[-3000:]
    return output


def metrics(folder):
    """metrics.jsonl without what depends on the clock and the machine."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "mem/", "balance/"))} for row in rows]


def weights(folder):
    return load_file(folder / "model.safetensors")


def newest(folder):
    return max(folder.glob("step_??????"))


def wait_for_step(step, folder, process):
    """Wait until a run has logged a step."""
    path = folder / "metrics.jsonl"
    wait_until(lambda: path.exists() and f'"step": {step}' in path.read_text(), process)


def test_four_commands_hand_over(work):
    """SFT learns, GRPO starts from its newest step, eval scores that of GRPO and answers one question."""
    run(work, *SFT, "--steps", "30", "--lr", "5e-3", "--out", "out/sft", "--eval_every", "10")
    losses = [row["eval/loss"] for row in metrics(work / "out/sft") if "eval/loss" in row]
    assert losses[-1] < losses[0] < 5.7  # log of the vocabulary size
    run(work, *GRPO, "--model", "out/sft", "--steps", "2", "--out", "out/grpo", "--kl_beta", "0.01",
        "--updates", "2")
    assert all(row["loss/kl"] >= 0 for row in metrics(work / "out/grpo") if row["step"])
    run(work, "eval.py", "--bench", "counting-id=data/counting_id.jsonl", "data/counting_ood.jsonl",
        "--max_new_tokens", "12", "--model", "out/grpo")
    summary = json.loads((work / "out/grpo/eval/summary.json").read_text())
    assert [s["bench"] for s in summary] == ["counting-id", "counting_ood"]
    assert all(s["n"] == 12 and 0 <= s["ci95"][0] <= s["accuracy"] <= s["ci95"][1] <= 1 for s in summary)
    first = next((work / "data/images/counting_id").iterdir())
    assert run(work, "eval.py", "--image", str(first), "--prompt", "How many?", "--model", "out/grpo",
               "--max_new_tokens", "4")


def test_eval_resumes_and_counts_failed_rows_as_wrong(work):
    """Finished rows are not asked again, an unreadable image is a wrong answer, other settings start over."""
    rows = [json.loads(line) for line in (work / "data/counting_id.jsonl").read_text().splitlines()]
    (work / "data" / rows[0]["images"][0]).write_bytes(b"not an image")
    command = ("eval.py", "--bench", "counting-id=data/counting_id.jsonl", "--model", "tiny",
               "--max_new_tokens", "4")
    run(work, *command)
    path = work / "tiny/eval/counting-id.jsonl"
    lines = path.read_text().splitlines()
    assert json.loads((work / "tiny/eval/summary.json").read_text())[0]["failed"] == 1 and len(lines) == 12
    path.write_text("\n".join([*lines[:7], lines[7][:40]]))
    run(work, *command)
    assert path.read_text().splitlines()[:7] == lines[:7]
    assert sorted(json.loads(x)["id"] for x in path.read_text().splitlines()) == sorted(r["id"] for r in rows)
    run(work, *command[:-1], "5")
    assert {json.loads(x)["settings"]["max_new_tokens"] for x in path.read_text().splitlines()} == {5}


@pytest.mark.parametrize("stage", [SFT, GRPO], ids=["sft", "grpo"])
def test_killed_run_resumes_bitwise(work, stage):
    """kill -9 after the first checkpoint, then --resume: metrics and weights are those of an unbroken run."""
    command = [*stage, "--steps", "6", "--save_every", "2", "--keep", "9"]
    run(work, *command, "--out", "whole")
    process = start(work, *command, "--out", "cut")
    wait_until(lambda: list((work / "cut").glob("step_000002")), process)
    process.kill()
    process.communicate(timeout=60)  # a data worker that outlives its trainer would keep the pipe open
    (work / "cut/step_000099.tmp").mkdir()  # a checkpoint that was being written
    run(work, *command, "--out", "cut", "--resume")
    assert metrics(work / "cut") == metrics(work / "whole")
    for step in ("step_000004", "step_000006"):
        a, b = weights(work / "cut" / step), weights(work / "whole" / step)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("stage", [SFT, GRPO], ids=["sft", "grpo"])
def test_sigterm_saves_and_exits_zero(work, stage):
    """SIGTERM ends a run after the current step, with a checkpoint of it."""
    process = start(work, *stage, "--steps", "100000", "--out", "long")
    wait_for_step(2, work / "long", process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output[-2000:]
    assert newest(work / "long").name == f"step_{metrics(work / 'long')[-1]['step']:06d}"


def test_checkpoints_beyond_keep_are_removed_and_old_runs_kept(work):
    """--keep bounds the checkpoints of a run; a second run into the same folder moves the first aside."""
    run(work, *SFT, "--steps", "4", "--save_every", "1", "--keep", "2", "--out", "out")
    assert sorted(p.name for p in (work / "out").glob("step_*")) == ["step_000003", "step_000004"]
    run(work, *SFT, "--steps", "1", "--out", "out")
    assert (work / "out.old1/step_000004").exists() and newest(work / "out").name == "step_000001"


def test_no_effective_group_leaves_the_weights_alone(work):
    """With equal rewards everywhere there is no gradient: the step is logged and the policy unchanged."""
    run(work, *GRPO, "--reward", "format=1", "--steps", "2", "--out", "flat")
    assert [row["groups/effective_frac"] for row in metrics(work / "flat") if row["step"]] == [0, 0]
    before, after = weights(work / "tiny"), weights(newest(work / "flat"))
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_the_length_bonus_starts_at_its_step(work):
    """Wrong responses of equal reward differ once the longer ones of a group lose something."""
    run(work, *GRPO, "--reward", "format=1", "--length_bonus", "0.05", "--length_after", "2", "--steps", "2",
        "--out", "short")
    before, after = [row["groups/effective_frac"] for row in metrics(work / "short") if row["step"]]
    assert before == 0 < after


# ----- limits, warnings and tools of the interpreter

RISE = ["rise.py", "--model", "tiny", "--data", "data/mood_train.jsonl", "--eval_data", "data/mood_id.jsonl",
        "--eval_n", "6", "--prompts_per_step", "4", "--group_size", "2", "--max_new_tokens", "12",
        "--warmup", "1", "--token_budget", "1024"]
STAGES = pytest.mark.parametrize("stage", [SFT, GRPO, RISE], ids=["sft", "grpo", "rise"])


def few_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))


@pytest.mark.parametrize("stage", [SFT, GRPO], ids=["sft", "grpo"])
def test_a_run_needs_few_files(work, stage):
    """`ulimit -n 256`, and a held-out set of more rows than that: they must not take a file each."""
    rows = [json.loads(line) for line in (work / "data/counting_id.jsonl").read_text().splitlines()]
    more = [json.dumps(row | {"id": f"{row['id']}-{turn}"}) for turn in range(25) for row in rows]
    (work / "data/more.jsonl").write_text("\n".join(more) + "\n")
    launch(work, *stage, "--eval_data", "data/more.jsonl", "--eval_n", "300", "--steps", "2", "--out", "few",
           preexec_fn=few_files)
    assert newest(work / "few").name == "step_000002"


@STAGES
def test_no_stage_calls_what_will_be_removed(work, stage):
    """Nothing that torch or transformers have announced to drop:
    with the next release it would be an error.
    """
    launch(work, *stage, "--steps", "2", "--out", "quiet", python=["-W", "error::FutureWarning"])
    assert newest(work / "quiet").name == "step_000002"


@pytest.mark.parametrize("tool, done", [
    (["cProfile"], "function calls"),
    (["pdb", "-c", "continue"], "The program finished and will be restarted")], ids=["cProfile", "pdb"])
def test_profiler_and_debugger_can_start_a_stage(work, tool, done):
    """Under both, the module __main__ is not the stage. At its end the debugger asks what to do next."""
    output = launch(work, *GRPO, "--steps", "1", "--out", "out", python=["-m", *tool],
                    stdin=subprocess.DEVNULL)
    assert done in output and "Uncaught exception" not in output and "Traceback (most" not in output
    assert newest(work / "out").name == "step_000001"


BAD = {
    "unknown flag": (["--lrr", "1"], "--lr"),
    "ill-typed flag": (["--steps", "many"], "--steps"),
    "missing model": (["--model", "out/nothing"], "out/nothing"),
    "missing data": (["--data", "data/none.jsonl"], "data/none.jsonl"),
    "empty data": (["--data", "empty.jsonl"], "empty.jsonl"),
    "no answer column": (["--data", "noanswer.jsonl"], "answer"),
    "no response": (["--data", "noresponse.jsonl"], "response"),
    "group of one": (["--group_size", "1"], "--group_size"),
    "unknown reward": (["--reward", "acuracy=1"], "accuracy"),
    "unknown engine": (["--engine", "sglang"], "hf | vllm | server"),
    "server without address": (["--engine", "server"], "--servers"),
    "nobody serves": (["--engine", "server", "--servers", "http://localhost:9"], "http://localhost:9"),
    "shared engine, one rank": (["--tp", "2"], "--tp 2"),
    "memory in percent": (["--gpu_memory_utilization", "90"], "--gpu_memory_utilization"),
    "no room to rethink": (["--rethink_frac", "0.5"], "--rethink_max 1023"),
    "malformed stages": (["--ptst", "4096x16"], "--ptst 4096x16"),
    "unknown trigger": (["--rethink_kinds", "doubt=1"], "--rethink_kinds doubt=1"),
    "unknown schedule": (["--schedule", "step"], "--schedule"),
    "unwritable out": (["--out", "tiny/config.json/x"], "tiny/config.json"),
    "corrupt image, strict": (["--data", "corrupt.jsonl", "--strict"], "broken.png"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_writes_nothing(work, case):
    """A mistake ends with one line that names the flag, file or row; no run directory appears."""
    flags, named = BAD[case]
    row = json.loads((work / "data/counting_train.jsonl").read_text().splitlines()[0]) | {"images": []}
    (work / "empty.jsonl").write_text("")
    (work / "noanswer.jsonl").write_text(json.dumps({"question": "q", "images": []}) + "\n")
    mute = {k: v for k, v in row.items() if k != "response"}
    (work / "noresponse.jsonl").write_text(json.dumps(mute) + "\n")
    (work / "broken.png").write_bytes(b"\x89PNG broken")
    (work / "corrupt.jsonl").write_text(json.dumps(row | {"images": ["broken.png"]}) + "\n")
    stage = SFT if case == "no response" else GRPO
    out = [] if "--out" in flags else ["--out", "never"]
    output = run(work, *stage, "--steps", "1", *out, *flags, code=1)
    last = output.strip().splitlines()[-1]
    assert last.startswith(stage[0] + ":") and named in last and "Traceback" not in output
    assert "strict" in case or not (work / "never").exists()


def test_corrupt_image_is_skipped_and_counted(work):
    """Without --strict the question is left out of its step."""
    lines = (work / "data/counting_train.jsonl").read_text().splitlines()[:3]
    broken = json.loads(lines[0])
    (work / "data" / broken["images"][0]).write_bytes(b"\x89PNG broken")
    (work / "data/three.jsonl").write_text("\n".join(lines) + "\n")
    output = run(work, *GRPO, "--data", "data/three.jsonl", "--prompts_per_step", "3", "--steps", "2",
                 "--out", "three")
    assert [row["data/unreadable"] for row in metrics(work / "three") if row["step"]] == [1, 1]
    assert broken["id"] in output


@pytest.mark.parametrize("source", ["mathvision/sample100.jsonl",
                                    "format_samples/geometry3k_hiyouga_form_10.parquet"])
def test_real_competition_rows_train(work, source):
    """Real images of any size, single and multiple choice, LaTeX answers."""
    if not REAL.exists():
        pytest.skip("no real rows beside this checkout")
    run(work, *GRPO, "--data", str(REAL / source), "--steps", "1", "--out", "real", "--eval_data", "",
        "--max_pixels", "50176", "--prompts_per_step", "10")
    image = next((REAL / "mathvision/images").iterdir())
    run(work, "eval.py", "--model", "real", "--image", str(image), "--prompt", "x", "--max_new_tokens", "3")


def test_every_family_trains_and_reloads(work, family):
    """One step on a random model of the real architecture; the checkpoint loads where it came from."""
    run(work, *GRPO, "--model", str(family.path), "--steps", "1", "--out", "family",
        "--reward", "accuracy=1,format=0.5", "--gradient_checkpointing", "--freeze_vision")
    before, after = weights(Path(family.path)), weights(newest(work / "family"))
    assert before.keys() == after.keys()
    AutoProcessor.from_pretrained(newest(work / "family"))
    loaded = AutoModelForImageTextToText.from_pretrained(newest(work / "family"), output_loading_info=True)
    assert not any(loaded[1][kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


# ----- several ranks


def close(a, b, tolerance=1e-5):
    """Metrics or weights equal within a tolerance, key by key."""
    assert a.keys() == b.keys()
    for k in a:
        x, y = torch.as_tensor(a[k]).double(), torch.as_tensor(b[k]).double()
        assert torch.allclose(x, y, atol=tolerance, rtol=tolerance), k


@pytest.mark.parametrize("stage", [
    SFT, [*GRPO, "--kl_beta", "0.01", "--updates", "2", "--reward", "accuracy=1,format=0.5"],
], ids=["sft", "grpo"])
def test_two_ranks_equal_one(work, stage):
    """Same global batch, uneven token counts: metrics and weights agree; so do two nodes of one process."""
    command = [*stage, "--steps", "3", "--lr", "1e-4"]
    run(work, *command, "--out", "one")
    launch(work, *command, "--out", "two", torchrun=["--standalone", "--nproc_per_node", "2"])
    port = free_port()
    nodes = [start(work, *command, "--out", "nodes", torchrun=[
        "--nnodes", "2", "--node_rank", str(n), "--nproc_per_node", "1",
        "--master_addr", "localhost", "--master_port", str(port)]) for n in (0, 1)]
    for node in nodes:
        output, _ = node.communicate(timeout=300)
        assert node.returncode == 0, output[-3000:]
    for other in ("two", "nodes"):
        for a, b in zip(metrics(work / "one"), metrics(work / other), strict=True):
            close(a, b)
        close(weights(newest(work / "one")), weights(newest(work / other)))


def test_a_rank_without_a_readable_question_does_not_hang(work):
    """Two ranks, two questions a step, one image broken: one rank has no rollout, yet both finish."""
    lines = (work / "data/counting_train.jsonl").read_text().splitlines()[:2]
    (work / "data" / json.loads(lines[0])["images"][0]).write_bytes(b"broken")
    (work / "data/two.jsonl").write_text("\n".join(lines) + "\n")
    run(work, *GRPO, "--data", "data/two.jsonl", "--prompts_per_step", "2", "--steps", "3", "--out", "half",
        "--kl_beta", "0.01", ranks=2)
    assert [row["data/unreadable"] for row in metrics(work / "half") if row["step"]] == [1, 1, 1]


def test_micro_batches_do_not_change_the_update(work):
    """1 x 24 rollouts and many small micro-batches give the same weights."""
    for name, budget in (("large", "100000"), ("small", "64")):
        run(work, *GRPO[:-1], budget, "--steps", "2", "--lr", "1e-4", "--out", name)
    close(weights(newest(work / "large")), weights(newest(work / "small")))


def test_a_killed_rank_ends_the_run(work):
    """Losing one of two ranks ends everything, with a non-zero exit, within a minute."""
    process = start(work, *GRPO, "--steps", "100000", "--out", "long",
                    torchrun=["--standalone", "--nproc_per_node", "2"])
    wait_for_step(1, work / "long", process)
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    ranks = found.stdout.split()
    assert len(ranks) == 2
    os.kill(int(ranks[-1]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
