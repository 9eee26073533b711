"""Workers: rows in order, through a pipe each; what happens when one of the two processes dies."""
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import wait_until
from test_stages import environment, run

import eval as evaluation
import sft

EMPTY = [[], [3, 1], [], [], [4], [1, 5, 9], []]


def where(i, step):
    return i, step, os.getpid()


@pytest.fixture(autouse=True)
def patience():
    """A test that would hang fails."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(100)
    yield
    signal.alarm(0)


@pytest.fixture
def crew():
    """crew(encode, count): Workers that are ended after the test."""
    made = []

    def start(encode, count):
        made.append(sft.Workers(encode, count))
        return made[-1]

    yield start
    for workers in made:
        workers.close()
    assert multiprocessing.active_children() == []


# ----- what comes


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("batches", [[[5, 2, 9], [1], [7, 3, 0, 4]], EMPTY, [[]], [[], []], []])
def test_rows_come_in_order_with_their_step(crew, batches, workers):
    """A resumed run numbers on from its first step; a batch may be empty, as a rank's share of a step is."""
    steps = list(crew(where, workers).prepared(batches, first_step=7))
    assert [[i for i, _ in rows] for rows in steps] == batches
    rows = [(i, step, got) for step, drawn in enumerate(steps, 7) for i, got in drawn]
    assert all(got[:2] == (i, step) for i, step, got in rows)
    processes = {got[2] for _, _, got in rows}
    assert len(processes) <= max(1, workers) and (os.getpid() in processes) == (workers == 0 and rows != [])


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_one_crew_serves_all_who_ask(crew, workers):
    """Held-out rows before training, and a step's replayed questions while the next step is on its way."""
    one = crew(where, workers)
    running = {process.pid for process in multiprocessing.active_children()}
    [held_out] = one.prepared([range(100, 103)])
    answers = [got for _, got in held_out]
    ahead = one.prepared([[0, 1, 2, 3]] * 5, first_step=1)
    for step in range(1, 6):
        answers += [got for _, got in next(ahead)]
        for replayed in ([], [50, 51], [7]):
            [again] = one.prepared([replayed], first_step=step)
            assert [got[:2] for _, got in again] == [(i, step) for i in replayed]
            answers += [got for _, got in again]
    assert [got[:2] for got in answers if got[0] < 4] == [(i, step) for step in range(1, 6) for i in range(4)]
    assert {got[2] for got in answers} == (running or {os.getpid()}) and len(running) == workers
    assert {process.pid for process in multiprocessing.active_children()} == running


def test_more_rows_than_a_pipe_holds(crew):
    """Of a step's 20,000 tasks, and of what they return, most wait for the other side to read."""
    [rows] = crew(lambda i, step: bytes(i), 2).prepared([range(20_000)])
    assert all(len(row) == i for i, row in rows)


def test_tensors_arrive_as_they_were(crew):
    made = {"a": torch.arange(6).view(2, 3),
            "b": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
            "c": torch.tensor([True]), "d": torch.ones(2, dtype=torch.bfloat16), "e": torch.zeros(0, 5)}
    [[(i, got)]] = crew(lambda i, step: made, 1).prepared([[3]])
    assert i == 3 and got.keys() == made.keys()
    assert all(torch.equal(got[k], made[k]) and got[k].dtype == made[k].dtype for k in made)


def test_they_are_prepared_ahead(crew, tmp_path):
    """While the trainer is at its first step, the second is already there: the processor's time is hidden."""
    def noted(i, step):
        (tmp_path / str(i)).touch()

    next(crew(noted, 1).prepared([[0, 1, 2], [3, 4, 5], [6, 7, 8]]))
    wait_until(lambda: (tmp_path / "5").exists(), seconds=20)
    time.sleep(0.3)
    assert not (tmp_path / "6").exists(), "what waits for the trainer is bounded"


LEAVES = """
import os, sys, time
import sft

def row(i, step):
    if i:
        time.sleep(60)  # it is at work when the trainer ends
    os.write(1, f"worker {os.getpid()}\\n".encode())
    return i

next(sft.Workers(row, 2).prepared([[0], [1], [2]]))
os.write(1, f"trainer {os.getpid()}\\n".encode())
"""


def test_a_trainer_that_ends_early_waits_for_no_worker(tmp_path):
    (tmp_path / "leaves.py").write_text(LEAVES)
    began = time.time()
    assert run(tmp_path, tmp_path / "leaves.py").count("worker") == 1
    assert time.time() - began < 50


# ----- errors


def refuses(i, step):
    if i % 2:
        raise ValueError(f"row {i} of step {step}")
    return i


@pytest.mark.parametrize("workers", [0, 2])
def test_a_value_error_takes_the_place_of_its_row(crew, workers):
    first, second = crew(refuses, workers).prepared([[2, 3], [5]], first_step=1)
    assert first[0] == (2, 2) and [i for i, _ in first + second] == [2, 3, 5]
    for (i, error), text in ((first[1], "row 3 of step 1"), (second[0], "row 5 of step 2")):
        assert type(error) is ValueError and str(error) == text


class Particular(ValueError):
    """Cannot be unpickled: it wants two arguments and keeps one."""

    def __init__(self, file, reason):
        super().__init__(f"{file}: {reason}")


def refuses_particularly(i, step):
    raise Particular("a.png", "no image")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_value_error_of_a_kind_of_its_own(crew, workers):
    [[(_, error)]] = crew(refuses_particularly, workers).prepared([[0]])
    assert type(error) is ValueError and str(error) == "a.png: no image"


def test_a_row_that_cannot_be_sent_says_so(crew):
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError), match="pickle"):
        list(crew(lambda i, step: lambda: i, 1).prepared([[0]]))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [TypeError, RuntimeError, KeyError, ZeroDivisionError, OSError, MemoryError])
def test_other_exceptions_come_through_as_themselves(crew, kind, workers):
    """A bug in a processor is no broken image: it must not be counted as one, nor as a process that died."""
    def broken(i, step):
        raise kind("of its own")

    with pytest.raises(kind, match="of its own") as raised:
        list(crew(broken, workers).prepared([[0, 1]]))
    if workers:  # where in the worker it was
        assert "in broken" in "".join(raised.value.__notes__)


# ----- files and memory


MANY = """
import os, resource, signal, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
signal.alarm(90)  # each tensor a file: it would wait for ever
import torch, sft

def row(i, step):
    return {k: torch.full((2, 3), i) for k in "abcde"}, [i]

def shared():
    maps = open("/proc/self/maps").read() if os.path.exists("/proc/self/maps") else ""
    files = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
             if os.path.lexists(f"/proc/self/fd/{fd}")]
    return maps.count("/dev/shm/torch_") + sum("/torch_" in file for file in files)

for rows in sft.Workers(row, int(sys.argv[1])).prepared([list(range(300)), [7] * 300]):
    assert len(rows) == 300
    for i, (tensors, ids) in rows:
        assert ids == [i] and len(tensors) == 5 and all(bool((t == i).all()) for t in tensors.values())
    print("shared", shared(), "files", len(os.listdir("/proc/self/fd")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("workers", ["1", "2"])
def test_rows_take_neither_files_nor_shared_memory(tmp_path, workers):
    """300 rows of 5 tensors in a batch, 256 files allowed. A container's /dev/shm may have 64 MiB."""
    (tmp_path / "many.py").write_text(MANY)
    lines = run(tmp_path, tmp_path / "many.py", workers).splitlines()
    assert len(lines) == 2
    for line in lines:
        _, shared, _, files = line.split()
        assert shared == "0" and int(files) < 60, line


# ----- a process that dies


def kills_itself(i, step):
    if i == 2:
        time.sleep(0.5)  # so that what came before has been written
        os.kill(os.getpid(), signal.SIGKILL)
    return i


def dies_midway(i, step):
    """From row 2 on, half of a row is written and then the process is gone,
    as at the hands of the OOM killer.
    """
    if i == 2:
        def send(self, data, **_):
            sent = 0
            while sent < len(data) // 2:
                sent += os.write(self.fileno(), data[sent:sent + 2**16])
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.5)  # so that what came before has been written
        multiprocessing.connection.Connection._send = send
        return bytes(2**24)
    return i


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("encode", [kills_itself, dies_midway])
def test_a_dead_worker_ends_the_run_in_one_line(crew, encode, workers):
    rows = crew(encode, workers).prepared([[0, 1], [2, 3], [4]])
    assert next(rows) == [(0, 0), (1, 1)]
    began = time.time()
    with pytest.raises(SystemExit) as end:
        next(rows)
    assert time.time() - began < 10
    assert "a process that prepares images died" in str(end.value) and "--workers" in str(end.value)
    assert "\n" not in str(end.value)


KILLED = """
import os, signal, sys, time
sys.argv[0] = "sft.py"
import sft
sft.end_on_signals()

def row(i, step):
    if i == 1:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    return i

for rows in sft.Workers(row, 1).prepared([[0], [1], [2]]):
    began = time.time()
    while time.time() < began + 2:
        sum(range(1000))  # the trainer is busy with a step
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel")
def test_a_worker_that_is_killed_during_a_step_ends_the_run_in_one_line(tmp_path):
    """As the kernel does where memory is short."""
    (tmp_path / "killed.py").write_text(KILLED)
    done = subprocess.run([sys.executable, tmp_path / "killed.py"], env=environment(), text=True,
                          capture_output=True, timeout=60)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("sft.py: ")]
    assert len(lines) == 1 and "a process that prepares images died" in lines[0] and "--workers" in lines[0]


LEFT = """
import os, sys, time
import sft

def row(i, step):
    os.write(1, f"worker {os.getpid()}\\n".encode())  # in one piece: print may write in several
    return bytes(int(sys.argv[1]))

rows = sft.Workers(row, 2).prepared([[0, 1]] * 99)
next(rows)
os.write(1, f"trainer {os.getpid()}\\n".encode())
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel")
@pytest.mark.parametrize("size", [1, 2**24], ids=["waiting for work", "writing a row"])
def test_workers_end_with_a_trainer_that_is_killed(tmp_path, size):
    """They hold its standard output open as long as they live."""
    (tmp_path / "left.py").write_text(LEFT)
    trainer = subprocess.Popen([sys.executable, tmp_path / "left.py", str(size)], env=environment(),
                               text=True, stdout=subprocess.PIPE)
    lines = []
    while not lines or not lines[-1].startswith("trainer"):
        lines.append(trainer.stdout.readline())
        assert lines[-1], "the trainer ended"
    workers = {line.split()[1] for line in lines if line.startswith("worker")}
    assert len(workers) == 2 and all(Path("/proc", pid).exists() for pid in workers)
    trainer.kill()
    try:
        trainer.communicate(timeout=3)
    finally:
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


# ----- what waits is bounded in bytes


class Counted:
    """Bytes whose copies are counted while they are on their way:
    made in a worker, arrived in the trainer.
    """
    made = multiprocessing.Value("q", 0)
    arrived = multiprocessing.Value("q", 0)
    most = multiprocessing.Value("q", 0)

    def __init__(self, size):
        self.size = size
        with self.made.get_lock():
            self.made.value += size
            self.most.value = max(self.most.value, self.made.value - self.arrived.value)

    def __reduce__(self):
        return Counted.come, (bytes(self.size),)

    @classmethod
    def come(cls, data):
        with cls.made.get_lock():
            cls.arrived.value += len(data)
        return len(data)

    @classmethod
    def clear(cls):
        cls.made.value = cls.arrived.value = cls.most.value = 0


MIB = 2**20


@pytest.mark.parametrize("workers", [1, 3])
def test_bytes_that_wait_are_bounded(crew, monkeypatch, workers):
    """Batches of 48 MiB, of which 8 MiB may wait; each worker sends one row and encodes one beside that."""
    monkeypatch.setattr(sft.Workers, "AHEAD", 8 * MIB)
    Counted.clear()
    one = crew(lambda i, step: Counted(MIB * (1 + i % 3)), workers)
    batches = [range(start, start + 24) for start in range(0, 96, 24)]
    sizes = []
    for rows in one.prepared(batches):
        sizes += [row for _, row in rows]
        for again in ([], [5, 7]):  # other rows, wanted in between, do not drive out what is ready
            [replayed] = one.prepared([again])
            assert [row for _, row in replayed] == [MIB * (1 + i % 3) for i in again]
        time.sleep(0.3)  # the trainer's step: what may be encoded ahead is
        waiting = Counted.made.value - Counted.arrived.value
        assert waiting <= 8 * MIB
        assert waiting >= 3 * MIB or len(sizes) == 96
    assert sizes == [MIB * (1 + i % 3) for i in range(96)]
    assert Counted.most.value <= (8 + 2 * 3 * workers) * MIB, Counted.most.value / MIB


def test_a_row_beyond_the_bound_comes_nevertheless(crew, monkeypatch):
    monkeypatch.setattr(sft.Workers, "AHEAD", MIB)
    Counted.clear()
    one = crew(lambda i, step: Counted(i), 2)
    batches = [[3 * MIB, 1, 4 * MIB], [1], [5 * MIB] * 5]
    assert [[row for _, row in rows] for rows in one.prepared(batches)] == batches


def test_what_is_wanted_comes_before_what_was_asked_ahead(crew, tmp_path):
    """Else a step's second hop would wait until all of the next step's images are encoded."""
    def slow(i, step):
        time.sleep(0.05)
        (tmp_path / str(i)).touch()
        return i

    one = crew(slow, 1)
    ahead = one.prepared([[0], range(1, 60)])
    assert next(ahead) == [(0, 0)]
    [rows] = one.prepared([[100, 101, 102]])
    assert [i for i, _ in rows] == [100, 101, 102] and not (tmp_path / "20").exists()
    assert [i for i, _ in next(ahead)] == [*range(1, 60)]


def test_after_an_exception_the_next_rows_are_the_right_ones(crew):
    """What the other rows of that batch were is not taken for theirs."""
    def broken(i, step):
        if i == 1:
            raise KeyError("of its own")
        return i

    one = crew(broken, 2)
    with pytest.raises(KeyError):
        next(one.prepared([[0, 1, 2, 3, 4, 5]]))
    assert list(one.prepared([[6, 7, 8]])) == [[(6, 6), (7, 7), (8, 8)]]


@pytest.mark.parametrize("cores, ranks, gpu, count", [
    (2, 1, True, 1), (1, 1, True, 1), (16, 1, True, 8), (16, 2, True, 7), (192, 8, True, 8),
    (64, 16, True, 3), (8, 8, True, 1), (64, 1, False, 1)])
def test_how_many_by_the_cores(monkeypatch, cores, ranks, gpu, count):
    """The trainer's own core is left out; without a GPU all are its own."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert sft.worker_count(-1) == count
    assert [sft.worker_count(asked) for asked in (0, 1, 5)] == [0, 1, 5]


def test_evaluation_prepares_the_next_round_while_it_answers_one(tiny, group, tmp_path, monkeypatch):
    """The third round's images are not there yet: what is ahead is bounded."""
    def noted(record, *args):
        (tmp_path / record["id"]).touch()
        return encode_prompt(record, *args)

    def generate(engine, prompts, seeds, cfg):
        if not answered:
            wait_until(lambda: all((tmp_path / f"row{i}").exists() for i in range(4)), seconds=20)
            time.sleep(0.3)
            assert not (tmp_path / "row4").exists()
        answered.append(len(prompts))
        return [evaluation.Sample([1], torch.zeros(1), False) for _ in prompts]

    answered, encode_prompt = [], sft.encode_prompt
    monkeypatch.setattr(evaluation, "encode_prompt", noted)
    monkeypatch.setattr(evaluation, "generate", generate)
    records = [dict(record, id=f"row{i}") for i, record in enumerate(tiny.records[:6])]
    answer = evaluation.open_engine(tiny.model, evaluation.Config(max_new_tokens=2, batch_rows=2, workers=1))
    assert [record["id"] for record, _ in answer(records)] == [f"row{i}" for i in range(6)]
    assert answered == [2, 2, 2]
    processes = multiprocessing.active_children()
    assert len(processes) == 1
    del answer  # as the next model is opened
    assert multiprocessing.active_children() == []
