"""The process that compares formulas: bounded in time and memory, in threads and forks,
and gone with its parent.
"""
import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from bench_fuzz import GOLDS, STALLS, fuzz, timed
from conftest import wait_until

import rewards

ROOT = Path(__file__).resolve().parents[1]
EQUAL = [(r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}", True), ("(x-1)(x+1)", "x^2-1", True),
         ("x^2+1", "x^2-1", False)]
LATE = 4  # seconds that a bounded call may take on a machine with other work; one that is not takes for ever
needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """What earlier tests took from the budget is there again, and the start is not counted."""
    assert rewards.JUDGE.equal("x+x", "2x") in (True, False)
    monkeypatch.setattr(rewards.JUDGE, "budget", 5.0)


@pytest.fixture
def judge():
    """A judge of one's own that has started."""
    judge = rewards.Judge()
    assert judge.equal("x+x", "2x")
    yield judge
    if judge.process:
        with judge.process:
            judge.process.kill()


def alive(pid):
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# ----- bounded


def test_no_formula_stalls():
    """With the real limits: the first ones get a second each, then the budget is used up."""
    for formula, gold in zip(STALLS, itertools.cycle(["12", "x^2+1", r"\frac{\sqrt{3}}{2}"])):
        seconds, score = timed(formula, gold)
        assert seconds < LATE and score == 0, formula
        assert timed(formula, gold)[0] < 0.1, "what took too long is not tried again"


def test_the_stalls_that_were_reported_are_tested():
    reported = ROOT.parent / "shared/cases/stalls.txt"
    assert not reported.exists() or set(reported.read_text().split("\n")) - {""} <= set(STALLS)


def test_generated_formulas_are_judged_in_bounded_time(judge, monkeypatch):
    """Every 100th of those that get so far goes to a process with a fifth of the time: more take minutes.

    tests/bench_fuzz.py asks it all of them.
    """
    asked, answered = itertools.count(), []

    def equal(answer, gold):
        if next(asked) % 100:
            return False
        answered.append(judge.equal(answer, gold))
        return answered[-1]

    monkeypatch.setattr(rewards.JUDGE, "equal", equal)
    judge.second, judge.budget = 0.2, 0.0
    rng = random.Random(0)
    for _ in range(20_000):
        text, gold = fuzz(rng)
        seconds, score = timed(text, gold)
        assert seconds < LATE and score in (0.0, 1.0), (text, gold)
    rewards._math_equal.cache_clear()  # it holds verdicts that nobody gave
    assert len(answered) > 50 and judge.cut_short > 5


def test_many_bombs_cost_a_bounded_time(judge, capsys):
    """5 + n/10 times the limit, a tenth of the time that passes, and milliseconds for each worker."""
    judge.second, judge.budget = 0.2, 1.0
    began = time.perf_counter()
    verdicts = [judge.equal(rf"\sin((3-z)^9)+{i}", "12") for i in range(30)]
    assert verdicts == [False] * 30 and judge.budget < 0.2
    assert 1 < time.perf_counter() - began < 1.1 * (1 + 30 * 0.02) + LATE
    assert judge.cut_short >= 20 and capsys.readouterr().err.count("\n") == 1


def test_the_budget_comes_back_with_time(judge):
    judge.budget, judge.asked = 0.0, time.monotonic() - 20
    assert judge.equal("x+x", "2x") and 1.9 < judge.budget < 4
    judge.asked -= 1000
    assert judge.equal("x+x", "2x") and judge.budget == 5


@needs_proc
def test_memory_has_a_cap(judge):
    [worker] = children(judge.process.pid)
    [line] = [line for line in Path(f"/proc/{worker}/limits").read_text().splitlines()
              if "address space" in line]
    assert int(line.split()[3]) == 2**30
    assert not judge.equal(r"\{" + ",".join(rf"10^{{{9 * i}99}}" for i in range(9)) + r"\}", "1")
    assert judge.equal("x+x", "2x")


# ----- anywhere


def test_threads_take_turns():
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda case: rewards.JUDGE.equal(*case[:2]), EQUAL * 8))
    assert got == [right for *_, right in EQUAL * 8]


def judged(i):
    return (os.getpid(), rewards.JUDGE.equal("x+x", "2x"), rewards.JUDGE.process.pid,
            rewards.JUDGE.equal("x", "y"))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_fork_starts_its_own():
    own = judged(0)
    rewards.JUDGE.lock.acquire()  # as another thread might hold it
    try:
        with multiprocessing.get_context("fork").Pool(2) as pool:
            rows = pool.map_async(judged, range(6), chunksize=1).get(60)
    finally:
        rewards.JUDGE.lock.release()
    assert all(row[1::2] == (True, False) for row in rows) and own[2] not in {row[2] for row in rows}
    assert len({row[:1] for row in rows}) == len({row[2] for row in rows})
    assert judged(0) == own


def test_workers_of_a_data_loader_start_theirs():
    loader = torch.utils.data.DataLoader(range(4), batch_size=None, num_workers=1, collate_fn=judged,
                                         multiprocessing_context="fork")
    rows = list(loader)
    assert len(rows) == 4 and all(row[1::2] == (True, False) for row in rows)
    assert {row[2] for row in rows} != {judged(0)[2]}


RANKS = """
import os, sys
sys.path.insert(0, sys.argv[1])
import rewards
print(os.environ["RANK"], rewards.accuracy("\\\\boxed{(x-1)(x+1)}", \
{"answer": "x^2-1", "answer_type": "math"}),
      flush=True)
"""


def test_every_rank_of_torchrun_has_one(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               "ranks.py", ROOT]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert sorted(done.stdout.split("\n"))[-2:] == ["0 1.0", "1 1.0"], done.stderr


# ----- interrupted, killed, gone


def test_an_interruption_leaves_no_verdict_to_the_next_question(judge):
    def interrupted(*_):
        raise KeyboardInterrupt
    before = signal.signal(signal.SIGUSR1, interrupted)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            judge.equal(r"\sin((3-z)^9)", "12")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert [judge.equal(*case[:2]) for case in EQUAL] == [right for *_, right in EQUAL]


@needs_proc
def test_one_that_was_killed_is_started_again(judge):
    first = judge.process.pid
    os.kill(children(first)[0], signal.SIGKILL)
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: not alive(first), seconds=20)
    assert judge.equal("x+x", "2x") and judge.process.pid != first
    assert not Path(f"/proc/{first}").exists(), "a zombie"


def test_one_that_does_not_start_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="did not start"):
            rewards.Judge().equal("x", "y")


PARENT = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import rewards
assert rewards.JUDGE.equal("x+x", "2x")
print(rewards.JUDGE.process.pid, flush=True)
if sys.argv[2] == "busy":
    while True:
        rewards.JUDGE.equal(r"\\\\sin((3-z)^9)", "12")
time.sleep(1)
print(rewards.JUDGE.equal("x+x", "2x"), flush=True)
"""


@needs_proc
@pytest.mark.parametrize("state", ["busy", "idle"])
def test_it_ends_with_its_parent(state):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, ROOT, state], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    workers = children(pid)
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(map(alive, [pid, *workers])), seconds=20)


@needs_proc
def test_signals_to_the_group_do_not_reach_it():
    """torchrun and Ctrl-C signal all of a group, and a rank then wants to finish its step."""
    code = "import signal; signal.signal(2, lambda *_: None); signal.signal(15, lambda *_: None)\n" + PARENT
    parent = subprocess.Popen([sys.executable, "-c", code, ROOT, "idle"], start_new_session=True, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    pid = int(parent.stdout.readline())
    for number in (signal.SIGINT, signal.SIGTERM):
        os.killpg(parent.pid, number)
        os.kill(pid, number)
    said, errors = parent.communicate(timeout=60)
    assert said == "True\n" and errors == "" and parent.returncode == 0
    wait_until(lambda: not alive(pid), seconds=20)


def test_golds_of_the_bench_answer_themselves():
    assert [timed(gold, gold)[1] for gold in GOLDS] == [1.0] * len(GOLDS)
