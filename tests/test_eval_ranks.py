"""torchrun eval.py: ranks share the rows, the file is that of one process, and nobody waits for the dead."""
import json
import os
import re
import shutil
import signal

import pytest
from conftest import lines_in
from test_api import MODEL, make_rows, serve  # noqa: F401
from test_kills import LINUX, children, is_gone, own_lines, send, stage_traceback, started, wait_for
from test_stages import launch, run, work  # noqa: F401

BENCH = "counting-id=data/counting_id.jsonl"
ASK = ["eval.py", "--bench", BENCH, "--batch_rows", "2", "--max_new_tokens", "6"]
SLOW = ["eval.py", "--bench", BENCH, "--batch_rows", "1", "--max_new_tokens", "300", "--model", "tiny"]

TWO = ["--standalone", "--nproc_per_node", "2", "--"]  # else torchrun takes --n for one of its own


def answers(path):
    """What a file has, line by line, without the name of the model."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        del row["settings"]["model"]
    return rows


def test_two_ranks_write_what_one_process_writes(work):  # noqa: F811
    """In the same order, and the same table; a row that cannot be read,
    and fewer rows than ranks at the end.
    """
    more = ["--n", "3", "--temperature", "1", "--limit", "11"]
    (work / "data/broken.png").write_bytes(b"no image")
    lines = (work / "data/counting_id.jsonl").read_text().splitlines()
    broken = json.loads(lines[4]) | {"images": ["broken.png"]}
    lines[4] = json.dumps(broken)
    (work / "data/counting_id.jsonl").write_text("\n".join(lines) + "\n")
    shutil.copytree(work / "tiny", work / "other")
    alone = run(work, *ASK, *more, "--model", "tiny")
    shared = run(work, *ASK, *more, "--model", "other", ranks=2)
    rows = answers(work / "tiny/eval/counting-id.jsonl")
    assert answers(work / "other/eval/counting-id.jsonl") == rows and "error" in rows[4]
    summaries = [json.loads((work / f"{name}/eval/summary.json").read_text()) for name in ("tiny", "other")]
    for summary in summaries:
        del summary[0]["seconds"]
    assert summaries[0] == summaries[1]
    for output in (alone, shared):
        assert output.count("| benchmark | n |") == 1 and output.count("counting-id 4") <= 1
    # Again: nothing is asked, nothing is loaded.
    again = run(work, *ASK, *more, "--model", "other")
    assert "| counting-id |" in again and answers(work / "other/eval/counting-id.jsonl") == rows


@LINUX
@pytest.mark.parametrize("number, target", [
    (signal.SIGKILL, "second"), (signal.SIGINT, "all")], ids=["kill-rank", "SIGINT"])
def test_ranks_end_together_and_any_number_goes_on(work, number, target):  # noqa: F811
    """Within seconds, at most a line of ours; every whole line is kept and no row is asked twice."""
    path = work / "tiny/eval/counting-id.jsonl"
    shutil.rmtree(path.parent, ignore_errors=True)  # another test may have evaluated what this is a copy of
    job = started(work, *SLOW, torchrun=TWO)
    wait_for(lambda: 2 <= lines_in(path) < 10)
    if target == "second":
        pids = [job.pid, *children(job.pid)]
        os.kill(pids[2], number)
    else:
        pids = send(job, number, target)
    wait_for(is_gone(pids), 10)
    assert job.process.wait(5) != 0
    assert not stage_traceback(job.log()), job.log()
    assert len(own_lines(job.log())) <= 1, own_lines(job.log())
    before = answers(path)
    output = run(work, *SLOW, ranks=3 if target == "second" else 1)
    rows = answers(path)
    assert f"{len(before)}/12" in output and [row["id"] for row in rows] == [
        json.loads(line)["id"] for line in (work / "data/counting_id.jsonl").read_text().splitlines()]
    assert all(row in rows for row in before)


def test_what_no_rank_can_do_is_one_line(work):  # noqa: F811
    """A file of rows that is no such file: rank 0 alone reads it, and says so for all."""
    (work / "tiny/eval").mkdir(exist_ok=True)  # another test may have evaluated what this is a copy of
    (work / "tiny/eval/counting-id.jsonl").write_text('{"id": "0"}\n')
    output = launch(work, *ASK, "--model", "tiny", torchrun=TWO, code=1)
    told = re.findall(r"^eval.py: .*$", output, re.M)
    assert len(told) == 1 and "a row without 'question' is no answer" in told[0], output
    assert not stage_traceback(output)


def test_a_server_is_asked_by_one_rank(work, serve):  # noqa: F811
    """Two ranks would ask, and pay for, everything twice."""
    os.chdir(work)
    make_rows(7)
    server = serve()
    output = launch(work, "eval.py", "--engine", "api", "--base_url", server.url, "--bench", "rows.jsonl",
                    torchrun=TWO)
    assert sorted(server.asked) == [f"row-{i}" for i in range(7)]
    assert output.count("| rows | 7 |") == 1 and MODEL in output
