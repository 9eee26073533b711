"""What operators do to runs: SIGTERM, Ctrl-C, kill -9, a full disk, two runs in one folder.

Nothing is lost.
"""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from test_stages import GRPO, ROOT, SFT, environment, metrics, newest, run, weights, work  # noqa: F401

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends orphans on Linux only")
TWO = ["--standalone", "--nproc_per_node", "2"]
LONG = ["--steps", "100000", "--eval_data", ""]


# ----- processes


def started(work, *argv, torchrun=()):  # noqa: F811
    """A stage in a session of its own; `log()` is what it printed so far."""
    launcher = ["-m", "torch.distributed.run", *torchrun] if torchrun else []
    path = work / f"log{time.time_ns()}"
    command = [sys.executable, *launcher, str(ROOT / argv[0]), *map(str, argv[1:])]
    with path.open("w") as log:
        process = subprocess.Popen(command, cwd=work, env=environment(), stdout=log, stderr=log,
                                   start_new_session=True)
    return SimpleNamespace(process=process, pid=process.pid, log=path.read_text)


def children(pid):
    """Processes below one, the nearest first."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    below = [int(child) for child in found]
    for child in list(below):
        below += children(child)
    return below


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_for(condition, seconds=90):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, "waited in vain"
        time.sleep(0.02)


def reached(folder, step):
    """A condition: the run has logged that step."""
    path = folder / "metrics.jsonl"
    return lambda: path.exists() and f'"step": {step},' in path.read_text()


def send(job, number, target):
    """A signal to the process itself, its first rank, or each process of the run, as a batch system does."""
    below = children(job.pid)
    for pid in {"itself": [job.pid], "rank": below[:1], "all": [job.pid, *below]}[target]:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass
    return [job.pid, *below]


def own_lines(log):
    """What the stages themselves printed about their end."""
    return re.findall(r"^.*(?:interrupted: |ended by |ends because ).*$", log, re.M)


def stage_traceback(log):
    """Whether a stage left a traceback. torchrun's own, at its start too, has none of our files in it."""
    return any(f'File "{ROOT}/' in part for part in log.split("Traceback (most recent call last)")[1:])


def is_gone(pids):
    return lambda: not any(alive(pid) for pid in pids)


# ----- signals


@pytest.mark.parametrize("stage, number, target", [
    (SFT, signal.SIGINT, "all"), (GRPO, signal.SIGTERM, "all")], ids=["sft-SIGINT", "grpo-SIGTERM"])
def test_a_stopped_run_loses_nothing(work, stage, number, target):  # noqa: F811
    """A signal to trainer and workers: one line, exit 0, and the resumed run equals the unbroken one."""
    command = [*stage, "--steps", "12", "--save_every", "100", "--eval_every", "100"]
    job = started(work, *command, "--out", "cut")
    wait_for(reached(work / "cut", 2))
    pids = send(job, number, target)
    assert job.process.wait(60) == 0, job.log()
    wait_for(is_gone(pids), 10)
    stop = int(newest(work / "cut").name[-6:])
    assert own_lines(job.log()) == [f"interrupted: saved step {stop}; go on with --resume"]
    assert "Traceback" not in job.log() and stop < 12
    run(work, *command, "--out", "cut", "--resume")
    run(work, *command, "--out", "whole")
    assert metrics(work / "cut") == metrics(work / "whole")
    a, b = weights(newest(work / "cut")), weights(newest(work / "whole"))
    assert all(torch.equal(a[k], b[k]) for k in b)


@LINUX
@pytest.mark.parametrize("number, target", [
    (signal.SIGTERM, "all"), (signal.SIGKILL, "itself"),
], ids=["SIGTERM-all", "SIGKILL-torchrun"])
def test_torchrun_is_stopped_or_killed(work, number, target):  # noqa: F811
    """Both ranks save the step they are at and end, and so do their workers."""
    job = started(work, *SFT, *LONG, "--out", "two", torchrun=TWO)
    wait_for(reached(work / "two", 2))
    pids = send(job, number, target)
    wait_for(is_gone(pids), 40)
    assert job.process.wait(5) != 0  # torchrun's own, whatever its ranks say
    step = metrics(work / "two")[-1]["step"]
    assert newest(work / "two").name == f"step_{step:06d}"
    assert own_lines(job.log()) == [f"interrupted: saved step {step}; go on with --resume"]
    assert not stage_traceback(job.log()), job.log()


def test_before_the_first_step_a_signal_ends_a_run_in_one_line(work):  # noqa: F811
    """There is nothing to save, so it does not wait for the model or for the evaluation before training."""
    job = started(work, *GRPO, *LONG, "--eval_data", "data/counting_id.jsonl", "--max_new_tokens", "3000",
                  "--out", "early")
    wait_for(lambda: "memory per rank" in job.log())
    send(job, signal.SIGINT, "all")
    assert job.process.wait(5) == 128 + signal.SIGINT
    assert own_lines(job.log()) == ["grpo.py: ended by SIGINT"] and "Traceback" not in job.log()


def test_a_second_signal_ends_a_run_at_once(work):  # noqa: F811
    """One who presses Ctrl-C twice does not want to wait for the step."""
    job = started(work, *GRPO, *LONG, "--max_new_tokens", "3000", "--out", "slow")
    wait_for(lambda: "first prompt" in job.log())
    for _ in range(2):
        send(job, signal.SIGINT, "all")
        time.sleep(0.5)
    assert job.process.wait(5) == 128 + signal.SIGINT
    assert own_lines(job.log()) == ["grpo.py: ended by SIGINT"] and "Traceback" not in job.log()


def test_a_stopped_eval_keeps_what_was_answered(work, number=signal.SIGINT):  # noqa: F811
    command = ["eval.py", "--bench", "counting-id=data/counting_id.jsonl", "--model", "tiny",
               "--max_new_tokens", "200", "--batch_rows", "1"]
    path = work / "tiny/eval/counting-id.jsonl"
    # Another test may have evaluated the model that this is a copy of.
    shutil.rmtree(path.parent, ignore_errors=True)
    job = started(work, *command)
    wait_for(lambda: path.exists() and path.read_text().count("\n") >= 2)
    send(job, number, "all")
    assert job.process.wait(10) == 128 + number, job.log()
    assert own_lines(job.log()) == [f"eval.py: ended by {number.name}"]
    assert "Traceback" not in job.log()
    answered = path.read_text().splitlines(keepends=True)
    assert 2 <= len(answered) < 12 and answered[-1].endswith("\n")


def test_a_stopped_annotate_goes_on(work):  # noqa: F811
    """What was sampled is on disk, and the resumed run samples the rest of it."""
    command = ["rise.py", "--phase", "annotate", "--model", "tiny", "--data", "data/mood_train.jsonl",
               "--tau", "0", "--group_size", "2", "--prompts_per_step", "4", "--max_new_tokens", "12"]
    job = started(work, *command, "--out", "cut")
    wait_for(reached(work / "cut", 2))
    pids = send(job, signal.SIGTERM, "all")
    assert job.process.wait(30) == 0, job.log()
    wait_for(is_gone(pids), 10)
    told = own_lines(job.log())
    assert len(told) == 1 and (
        "of 6 steps are in cut/rationales.jsonl; go on with --resume" in told[0]), job.log()
    assert "Traceback" not in job.log() and not (work / "cut/sft.jsonl").exists()
    run(work, *command, "--out", "cut", "--resume")
    run(work, *command, "--out", "whole")
    whole, cut = ((work / name / "rationales.jsonl").read_text() for name in ("whole", "cut"))
    assert cut == whole and (work / "cut/sft.jsonl").read_text() == (work / "whole/sft.jsonl").read_text()


# ----- one writer, and a full disk


@LINUX
def test_one_run_writes_into_a_folder(work):  # noqa: F811
    """A second run is refused, resumed or new, and nothing is moved; kill -9 frees the folder at once."""
    job = started(work, *SFT, *LONG, "--save_every", "1", "--out", "one")
    wait_for(reached(work / "one", 2))
    for flags in ([], ["--resume"]):
        output = run(work, *SFT, *LONG, "--save_every", "1", "--out", "one", *flags, code=1)
        last = output.strip().splitlines()[-1]
        assert last.startswith(f"sft.py: one: another run writes into it (process {job.pid} "), output
        assert "Traceback" not in output and not (work / "one.old1").exists()
    pids = send(job, signal.SIGKILL, "itself")
    job.process.wait(5)
    run(work, *SFT, *LONG, "--save_every", "1", "--out", "one", "--resume",
        "--steps", metrics(work / "one")[-1]["step"] + 1)
    wait_for(is_gone(pids), 10)


@LINUX
def test_one_eval_writes_a_benchmark(work):  # noqa: F811
    """A second one is refused, as long as the first lives."""
    path = work / "tiny/eval/counting-id.jsonl"
    shutil.rmtree(path.parent, ignore_errors=True)  # another test may have evaluated what this is a copy of
    path.parent.mkdir()
    hold = f"import time, sft; sft.claim({str(path)!r}); print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", hold], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        command = ["eval.py", "--model", "tiny", "--bench", "counting-id=data/counting_id.jsonl",
                   "--limit", "1", "--max_new_tokens", "2"]
        output = run(work, *command, code=1)
        assert f"counting-id.jsonl: another run writes into it (process {other.pid} " in output, output
        assert "Traceback" not in output and not path.exists()
    finally:
        other.kill()
        other.wait()
    run(work, *command)
    assert path.exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 14 MB: room for one checkpoint of the tiny model, not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=14m", "tmpfs", folder], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_ends_a_run_in_one_line(work, small_disk):  # noqa: F811
    """The earlier checkpoint stays, what was begun is removed, and the run can go on when there is room."""
    command = [*SFT, "--steps", "4", "--save_every", "1", "--keep", "9", "--out", small_disk / "run"]
    output = run(work, *command, code=1)
    assert "Traceback" not in output
    assert re.search(rf"sft.py: {small_disk}/run/step_00000\d.tmp cannot be written, "
                     r"[01] MiB free: .* intact$", output, re.M)
    left = sorted(path.name for path in (small_disk / "run").glob("step_*"))
    assert left and not any(name.endswith(".tmp") for name in left)
    subprocess.run(["mount", "-o", "remount,size=60m", small_disk], check=True)
    run(work, *command, "--resume")
    run(work, *command[:-1], "whole")
    assert metrics(small_disk / "run") == metrics(work / "whole")


# ----- a checkpoint that is written while the run goes on


SLOW = """
import signal, sys, time
import sft
usual = sft.dcp.save
def save(state, checkpoint_id, **more):
    if "step_000006" in str(checkpoint_id):
        time.sleep({seconds})
    usual(state, checkpoint_id=checkpoint_id, **more)
sft.dcp.save = save
sft.main(sft.parse_config(sft.Config))
"""
AHEAD = [*SFT[1:], "--save_every", "3", "--keep", "9", "--eval_data", "", "--schedule", "constant",
         "--out", "run"]


@pytest.mark.parametrize("torchrun", [(), TWO], ids=["", "two ranks"])
def test_kill_9_during_a_write_leaves_what_was_complete(work, torchrun):  # noqa: F811
    """The run is steps ahead of its slow disk; of that checkpoint only step_000006.tmp is there."""
    (work / "slow.py").write_text(SLOW.format(seconds=1000))
    job = started(work, work / "slow.py", *AHEAD, "--steps", "100000", torchrun=torchrun)
    wait_for(reached(work / "run", 8))
    pids = send(job, signal.SIGKILL, "rank" if torchrun else "itself")
    assert job.process.wait(60) != 0
    wait_for(is_gone(pids), 40)
    assert not stage_traceback(job.log()), job.log()
    assert sorted(path.name for path in (work / "run").glob("step_*")) == ["step_000003", "step_000006.tmp"]
    run(work, *SFT[:1], *AHEAD, "--resume", "--steps", "8", ranks=2 if torchrun else 1)
    assert sorted(path.name for path in (work / "run").glob("step_*"))[-2:] == ["step_000006", "step_000008"]


def test_a_stopped_run_waits_for_what_is_being_written(work):  # noqa: F811
    """SIGTERM two steps after a save that takes seconds: that one and the step's own are complete."""
    (work / "slow.py").write_text(SLOW.format(seconds=4))
    job = started(work, work / "slow.py", *AHEAD, "--steps", "100000")
    wait_for(reached(work / "run", 7))
    assert not (work / "run/step_000006").exists()
    send(job, signal.SIGTERM, "all")
    assert job.process.wait(60) == 0, job.log()
    stop = metrics(work / "run")[-1]["step"]
    assert own_lines(job.log()) == [f"interrupted: saved step {stop}; go on with --resume"]
    names = sorted(path.name for path in (work / "run").glob("step_*"))
    assert names[:2] == ["step_000003", "step_000006"] and names[-1] == f"step_{stop:06d}", names
