"""eval.py --engine api against a local server that misbehaves as told: nothing lost, repeated or leaked."""
import base64
import gzip
import io
import json
import shutil
import signal
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from conftest import lines_in, picture, wait_until
from PIL import Image, ImageCms
from test_stages import start

import data_prep
import eval as stage

KEY = "sk-test-5e3f0a"
MODEL = "org/some model:7b"
FOLDER = "out/org--some-model-7b/eval"


# ----- the server: behave(row, n, server) says what the n-th request (from 1) for a row's question gets


def chat(content, finish="stop", **more):
    """A well-formed reply as bytes."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish}
    return json.dumps({"choices": [choice], "usage": {"completion_tokens": 7}} | more).encode()


def right(row, n=1, server=None):
    """The answer that grades as correct: row-3 -> 3."""
    return chat(f"<answer> {row.removeprefix('row-')} </answer>")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.act(self.server.models)

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        texts = [part["text"] for part in body["messages"][0]["content"] if part["type"] == "text"]
        row = next((word for text in texts for word in text.split() if word.startswith("row-")), "")
        with server.lock:
            server.asked.append(row)
            server.bodies.append(body)
            server.headers.append({"path": self.path, **self.headers})
            server.flying += 1
            server.most = max(server.most, server.flying)
            n = server.asked.count(row)
        action = server.behave(row, n, server)
        with server.lock:
            server.flying -= 1
        self.act(action)

    def act(self, action):
        """bytes: 200 with that body. (status, headers, body). A function: it gets the socket's file."""
        if callable(action):
            action(self)
            self.close_connection = True
            return
        status, headers, body = action if isinstance(action, tuple) else (200, {}, action)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    daemon_threads, allow_reuse_address, request_queue_size = True, True, 128
    models = json.dumps({"data": [{"id": MODEL}, {"id": "other"}]}).encode()

    def __init__(self, behave=right, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.behave, self.lock, self.gone = behave, threading.Lock(), threading.Event()
        self.asked, self.bodies, self.headers, self.flying, self.most = [], [], [], 0, 0
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        """Refuse further connections."""
        self.shutdown()
        self.server_close()
        self.gone.set()

    def handle_error(self, request, client_address):
        pass  # clients that gave up


@pytest.fixture
def serve():
    servers = []

    def start(*args, **kwargs):
        servers.append(Server(*args, **kwargs))
        return servers[-1]

    yield start
    for server in servers:
        if not server.gone.is_set():
            server.stop()


@pytest.fixture(autouse=True)
def waits(monkeypatch, tmp_path):
    """Run in tmp_path, without a proxy or a key; waits between attempts are recorded instead of slept."""
    waits = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(data_prep, "time", SimpleNamespace(
        monotonic=time.monotonic, sleep=lambda s: waits.append(s) if s else None))
    return waits


def make_rows(n, images=0):
    """rows.jsonl with n questions whose answers are their numbers; returns their ids."""
    for i in range(n * images):
        picture(56, 42, seed=i).save(f"{i}.png")
    records = [{"id": f"row-{i}", "question": f"row-{i} ?", "answer": str(i), "answer_type": "number",
                "images": [f"{images * i + k}.png" for k in range(images)]} for i in range(n)]
    data_prep.write_records("rows.jsonl", records)
    return [r["id"] for r in records]


def evaluate(server, *flags):
    """Run eval.py's main on rows.jsonl; return the rows it wrote, by id."""
    argv = ["--engine", "api", "--base_url", server.url, "--bench", "rows.jsonl", *flags]
    stage.main(stage.parse_config(stage.Config, argv))
    return {row["id"]: row for row in written()}


def written(folder=FOLDER):
    with open(f"{folder}/rows.jsonl") as lines:
        return [json.loads(line) for line in lines]


def refusal(*flags):
    """The one-line message with which main stops."""
    with pytest.raises(SystemExit) as stop:
        stage.main(stage.parse_config(stage.Config, ["--engine", "api", *flags]))
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


# ----- what is asked and kept


def test_answers_are_graded_and_kept(serve, capsys):
    """Rows, settings and summary; no model is loaded (out/grpo does not exist); the URL is not a setting."""
    ids = make_rows(5)
    server = serve(lambda row, n, s: chat("cut", "length") if row == "row-4" else right(row))
    rows = evaluate(server)
    assert [*rows] == ids and sorted(server.asked) == ids
    assert [row["correct"] for row in rows.values()] == [1, 1, 1, 1, 0]
    assert [row["truncated"] for row in rows.values()] == [False] * 4 + [True]
    assert {row["tokens"] for row in rows.values()} == {7}
    assert rows["row-2"]["extracted"] == "2" and "error" not in rows["row-2"]
    settings = rows["row-0"]["settings"]
    assert settings["engine"] == "api" and settings["model"] == MODEL and server.url not in str(settings)
    with open(f"{FOLDER}/summary.json") as file:
        (summary,) = json.load(file)
    assert (summary["n"], summary["accuracy"], summary["truncated"], summary["failed"]) == (5, 0.8, 0.2, 0)
    assert MODEL in capsys.readouterr().out


def test_only_what_a_server_must_know_is_sent(serve):
    """Sampling fields that change nothing are left out; a row's seed is its own."""
    make_rows(2)
    server = serve()
    evaluate(server, "--max_new_tokens", "9")
    assert all(body.keys() == {"model", "messages", "max_tokens", "temperature"} for body in server.bodies)
    assert (server.bodies[0]["model"], server.bodies[0]["max_tokens"]) == (MODEL, 9)
    evaluate(server, "--temperature", "0.5", "--top_p", "0.9", "--top_k", "3", "--seed", "1")
    later = server.bodies[2:]
    assert all((b["temperature"], b["top_p"], b["top_k"]) == (0.5, 0.9, 3) for b in later)
    assert len({b["seed"] for b in later}) == 2


def test_images_arrive_pixel_by_pixel_and_in_order(serve):
    """Two images, one of them scaled down, one with a colour profile, between the words of the question."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture(64, 48, seed=1).save("a.png", icc_profile=profile)
    picture(90, 80, seed=2).save("b.jpg", quality=50)
    data_prep.write_records("rows.jsonl", [{
        "id": "row-0", "question": "row-0 left <image> right <image> ?", "answer": "0",
        "answer_type": "number", "images": ["a.png", "b.jpg"]}])
    server = serve()
    evaluate(server, "--max_pixels", "4000")
    (body,) = server.bodies
    (turn,) = body["messages"]
    first, one, second, two, last = turn["content"]
    assert turn["role"] == "user" and first["text"] == "row-0 left " and second["text"] == " right "
    assert last["text"].startswith(" ?\nWork it out")
    for part, path in ((one, "a.png"), (two, "b.jpg")):
        head, _, data = part["image_url"]["url"].partition(",")
        assert part["type"] == "image_url" and head == "data:image/png;base64"
        got, want = Image.open(io.BytesIO(base64.b64decode(data))), data_prep.load_image(path, 4000)
        assert got.format == "PNG" and got.mode == "RGB" and "icc_profile" not in got.info
        assert got.size == want.size and got.tobytes() == want.tobytes()
    assert got.width * got.height <= 4000 < 90 * 80


def test_one_question_about_two_images(serve, capsys):
    for name, seed in (("a.png", 1), ("b.png", 2)):
        picture(56, 56, seed=seed).save(name)
    server = serve(lambda row, n, s: chat("the second"))
    argv = ["--engine", "api", "--base_url", server.url + "/", "--image", "b.png", "a.png",
            "--prompt", "Which?"]
    stage.main(stage.parse_config(stage.Config, argv))
    assert capsys.readouterr().out == "the second\n"
    assert server.headers[0]["path"] == "/v1/chat/completions"
    parts = server.bodies[0]["messages"][0]["content"]
    urls = [part["image_url"]["url"] for part in parts[:2]]
    seen = [Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).tobytes() for url in urls]
    assert seen == [Image.open(name).tobytes() for name in ("b.png", "a.png")]
    assert parts[2:] == [{"type": "text", "text": "Which?"}]
    server.behave = lambda row, n, s: (400, {}, b"no such thing")
    assert refusal(*argv).endswith(": HTTP 400: no such thing")


@pytest.mark.parametrize("name, folder", [
    ("org/model", "out/org--model/eval"), ("run", "run/eval"), ("/no such/x:1", "out/no-such--x-1/eval"),
    ("../../up", "out/up/eval")])
def test_results_lie_with_the_model_or_under_its_name(serve, tmp_path, name, folder):
    (tmp_path / "run").mkdir()
    make_rows(1)
    server = serve()
    stage.main(stage.parse_config(stage.Config, ["--engine", "api", "--base_url", server.url, "--bench",
                                                 "rows.jsonl", "--api_model", name]))
    assert [row["settings"]["model"] for row in written(folder)] == [name] == [server.bodies[0]["model"]]


# ----- faults


def sent(text, reset=False):
    """Write these bytes and close the connection, politely or with a reset."""
    def act(handler):
        handler.wfile.write(text)
        handler.wfile.flush()
        if reset:
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
    return act


def hang(handler):
    """Say nothing until the server stops."""
    handler.server.gone.wait(20)


def drip(handler):
    """Blanks for long, as busy servers send to keep a connection open: no single read times out."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.server.gone.wait(0.05)


def dripping(start, drop=b"x"):
    """After `start` a few bytes now and then: each read gets something, the whole never comes."""
    def act(handler):
        handler.wfile.write(start)
        while not handler.server.gone.wait(0.05):
            handler.wfile.write(drop)
    return act


def flood(start, part):
    """After `start` the same part as fast as it is taken, until the client hangs up."""
    def act(handler):
        handler.wfile.write(start)
        while not handler.server.gone.is_set():
            handler.wfile.write(part)
    return act


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
HALF = b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\n\r\n" + right("row-0")[:60]
CHUNK = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n20\r\n" + right("row-0")[:20]
PASSING = {
    "429": (429, {}, b"{}"), "408": (408, {}, b""), "409": (409, {}, b""), "425": (425, {}, b""),
    "500": (500, {}, b"oops"), "503": (503, {}, b"<html>"), "hang": hang, "drip": drip, "not json": b"<html>",
    "empty": b"", "list": b"[]", "no choices": b'{"choices": []}', "error in a 200": b'{"error": "busy"}',
    "null choices": b'{"choices": null}', "null message": b'{"choices": [{"message": null}]}',
    "null content": chat(None), "list content": chat([{"type": "text", "text": "1"}]), "deep": b"[" * 100_000,
    "no content": b'{"choices": [{"message": {}}]}', "half": sent(HALF), "half a chunk": sent(CHUNK),
    "closed": sent(b""), "reset": sent(HALF, reset=True), "not http": sent(b"hello\r\n\r\n"),
    "a million deep": b'{"choices": ' + b"[" * 10**6, "more digits than Python reads": b"9" * 5000,
    "gzip": (200, {"Content-Encoding": "gzip"}, gzip.compress(bytes(10**8))),
    "announces too little": sent(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n" + right("row-0")),
    "announces an exabyte": sent(HALF.replace(b"400", b"1" + b"0" * 18)),
    "announces nonsense": sent(HALF.replace(b"400", b"-7")),
    "a chunk of minus five": sent(CHUNKED + b"-5\r\nx"), "a huge chunk": sent(CHUNKED + b"F" * 40 + b"\r\nx"),
    "a huge status": sent(b"HTTP/1.1 9999999 OK\r\n\r\n"),
    "a header without end": flood(b"HTTP/1.1 200 OK\r\nA: ", b"x" * 9999),
    "headers without end": flood(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n"),
    "a body without end": flood(b"HTTP/1.1 200 OK\r\n\r\n", b" " * 99999),
    "chunks without end": flood(CHUNKED, b"ffff\r\n" + b" " * 65535 + b"\r\n"),
    "continue without end": flood(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "trailers without end": flood(CHUNKED + b"0\r\n", b"A: b\r\n"),
    "status drip": dripping(b"HTTP/1.1 200 "), "header drip": dripping(b"HTTP/1.1 200 OK\r\nA: "),
    "headers drip": dripping(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n"),
    "continue drip": dripping(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "body drip": dripping(b"HTTP/1.1 200 OK\r\n\r\n", b" "), "chunk drip": dripping(CHUNKED, b"1\r\n \r\n"),
    "size drip": dripping(CHUNKED, b"0"), "trailer drip": dripping(CHUNKED + b"0\r\n", b"A: b\r\n"),
}
SLOW = {name for name in PASSING if "drip" in name} | {"hang", "continue without end", "trailers without end"}


@pytest.mark.parametrize("fault", PASSING)
def test_faults_that_pass_are_retried(serve, fault):
    """Twice the fault, then an answer: asked three times, right, and soon."""
    make_rows(1)
    server, began = serve(lambda row, n, s: PASSING[fault] if n <= 2 else right(row)), time.time()
    patience = "0.5" if fault in SLOW else "60"
    row = evaluate(server, "--timeout", patience, "--api_model", MODEL)["row-0"]
    assert time.time() - began < 8
    assert row["correct"] == 1 and "error" not in row and server.asked == ["row-0"] * 3


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
def test_refusals_are_not_retried(serve, waits, status):
    """The row fails at once with the start of the server's message, on one line; other rows go on."""
    make_rows(3)
    refused = status, {"Retry-After": "1"}, ("too\nlong " * 100).encode()
    server = serve(lambda row, n, s: refused if row == "row-1" else right(row))
    rows = evaluate(server)
    assert sorted(server.asked) == ["row-0", "row-1", "row-2"] and not waits
    assert rows["row-1"]["error"] == f"HTTP {status}: " + ("too long " * 100)[:200].strip()
    assert [row["correct"] for row in rows.values()] == [1, 0, 1]


def test_waits_grow_with_full_jitter(serve, waits, monkeypatch):
    drawn = []
    monkeypatch.setattr(data_prep.random, "uniform", lambda a, b: drawn.append((a, b)) or b / 2)
    make_rows(1)
    server = serve(lambda row, n, s: (500, {}, b"busy"))
    row = evaluate(server, "--retries", "7")["row-0"]
    assert len(server.asked) == 8 and row["error"] == "HTTP 500: busy"
    assert drawn[:7] == [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (0, 30), (0, 30)]
    assert waits == [b / 2 for _, b in drawn[:7]]


@pytest.mark.parametrize("header, least, most", [
    ("17", 17, 17), ("86400", 60, 60), ("0", 0, 1), ("-5", 0, 1), ("soon", 0, 1),
    ("Wed, 21 Oct 2026 07:28:00 GMT", 0, 1)])
def test_a_storm_of_429_is_waited_out(serve, waits, header, least, most):
    """Every row is refused once; no attempt comes sooner than Retry-After, which counts up to a minute."""
    make_rows(6)
    server = serve(lambda row, n, s: (429, {"Retry-After": header}, b"slow down") if n == 1 else right(row))
    rows = evaluate(server)
    assert all(row["correct"] for row in rows.values()) and len(server.asked) == 12
    assert len(waits) == 6 and all(least <= wait <= most for wait in waits)


def test_a_reasoning_model_that_ran_out_of_tokens_has_an_empty_answer(serve):
    """Null content is no fault when the length limit says why. Usage may be missing or nonsense."""
    make_rows(3)
    odd = {"row-0": chat(None, "length"), "row-1": chat("<answer> 1 </answer>", usage=None),
           "row-2": chat("<answer> 2 </answer>", usage={"completion_tokens": "many"})}
    server = serve(lambda row, n, s: odd[row])
    rows = evaluate(server)
    assert len(server.asked) == 3 and not any("error" in row for row in rows.values())
    assert [(r["response"] == "", r["truncated"], r["tokens"], r["correct"]) for r in rows.values()] == [
        (True, True, 7, 0), (False, False, 0, 1), (False, False, 0, 1)]


ABSURD = [-5, 10**30, 1e300, "7", "x" * 10**6, None, True, [], {"a": 1}, float("nan"), float("inf"), 2**63]


def test_absurd_numbers_of_tokens_are_no_number(serve):
    """Also a usage that is no object: the answers count, the summary is made."""
    make_rows(len(ABSURD) + 3)
    usages = [*({"completion_tokens": count} for count in ABSURD), [1], "many", 7]
    server = serve(lambda row, n, s: chat(f"<answer> {row[4:]} </answer>", usage=usages[int(row[4:])]))
    rows = evaluate(server)
    assert len(server.asked) == len(usages) and {
        (r["tokens"], r["correct"]) for r in rows.values()} == {(0, 1)}


def test_bytes_that_are_no_text(serve):
    """What is not UTF-8 becomes a mark, and zero bytes and line ends stay in the one line of their row."""
    make_rows(2)
    odd = {"row-0": chat("A<answer> 0 </answer>").replace(b"A", b"\xff\xc3("),
           "row-1": chat("\0\r\n\u2028<answer> 1 </answer>")}
    rows = evaluate(serve(lambda row, n, s: odd[row]))
    assert [row["response"] for row in rows.values()] == [
        "\ufffd\ufffd(<answer> 0 </answer>", "\0\r\n\u2028<answer> 1 </answer>"]
    assert all(row["correct"] for row in rows.values())


def test_thoughts_that_a_server_took_out_are_part_of_the_response(serve):
    """As another engine would give it: row-1 was cut while it thought; half a character harms no file."""
    make_rows(3)
    said = {"row-0": {"content": "It is 0.", "reasoning_content": "1? No."},
            "row-1": {"content": None, "reasoning": "It is"}, "row-2": {"content": "It is 2 \ud83d."}}

    def behave(row, n, server):
        reply = json.loads(chat("", "length" if row == "row-1" else "stop"))
        reply["choices"][0]["message"] |= said[row]
        return json.dumps(reply).encode()

    rows = evaluate(serve(behave)).values()
    assert [(row["response"], row["truncated"], row["correct"]) for row in rows] == [
        ("<think>1? No.</think>It is 0.", False, 1), ("<think>It is", True, 0), ("It is 2 ?.", False, 1)]


def test_a_server_that_dies_costs_only_its_rows(serve, capsys):
    """Killed after 5 of 20 answers: the run ends, the rest is wrong. Once back, only the rest is asked."""
    ids = make_rows(20)
    died = []

    def dying(row, n, server):
        with server.lock:
            answered = len(died)
            died.append(row)
        if answered < 5:
            return right(row)
        if answered == 5:
            threading.Thread(target=server.stop).start()
        server.gone.wait(20)
        return sent(b"")

    first = serve(dying)
    flags = ("--concurrency", "3", "--retries", "2")
    rows = evaluate(first, *flags)
    failed = [i for i in ids if "error" in rows[i]]
    assert len(failed) == 15 and [*rows] == ids
    assert all(rows[i]["correct"] == (i not in failed) for i in ids)
    with open(f"{FOLDER}/summary.json") as file:
        assert json.load(file)[0]["accuracy"] == 0.25
    shown = capsys.readouterr().out.strip().splitlines()
    assert shown[-12].startswith("15 failed") and shown[-1] == "and 5 more"
    assert shown[-11:-1] == [f"rows {i}: {rows[i]['error']}" for i in failed[:10]]
    second = serve(port=first.server_port)
    again = evaluate(second, *flags)
    assert sorted(second.asked) == sorted(failed)
    assert all(row["correct"] and "error" not in row for row in again.values()) and [*again] == ids
    assert "failed" not in capsys.readouterr().out
    evaluate(second, *flags)
    assert len(second.asked) == 15


def test_rows_of_another_engine_are_not_reused(serve):
    make_rows(2)
    server = serve()
    evaluate(server)
    rows = written()
    rows[0]["settings"]["engine"] = "vllm"
    with open(f"{FOLDER}/rows.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    evaluate(server)
    assert server.asked[2:] == ["row-0"]


def test_unreadable_images_fail_unasked_and_are_tried_again(serve):
    make_rows(3, images=1)
    with open("1.png", "wb") as file:
        file.write(b"not an image")
    server = serve()
    rows = evaluate(server)
    assert sorted(server.asked) == ["row-0", "row-2"] and "1.png" in rows["row-1"]["error"]
    picture(56, 42).save("1.png")
    assert evaluate(server)["row-1"]["correct"] == 1 and server.asked[2:] == ["row-1"]


def test_other_engines_list_failed_rows_and_try_them_again(tiny, capsys):
    """The same rules with --engine hf: two images are unreadable, one is mended for the second run."""
    make_rows(3, images=1)
    shutil.copy("rows.jsonl", "more.jsonl")
    for name in ("0.png", "1.png"):
        with open(name, "wb") as file:
            file.write(b"not an image")
    argv = ["--bench", "rows.jsonl", "more.jsonl", "--model", tiny.model, "--max_new_tokens", "1"]
    stage.main(stage.parse_config(stage.Config, argv))
    shown = capsys.readouterr().out.strip().splitlines()
    assert [line.split(":")[0] for line in shown[-4:]] == [
        "rows row-0", "rows row-1", "more row-0", "more row-1"]
    picture(56, 42).save("1.png")
    stage.main(stage.parse_config(stage.Config, argv))
    assert [("error" in row, row["settings"]["engine"]) for row in written(f"{tiny.model}/eval")] == [
        (True, "hf"), (False, "hf"), (False, "hf")]


# ----- many at once


def test_as_many_in_flight_as_allowed_and_no_image_held_longer(serve, monkeypatch):
    """Four at a time, never five; an image is read only when a slot is free for its row."""
    make_rows(16, images=1)
    meet, ahead, loaded = threading.Barrier(4), [], []

    def met(row, n, server):
        meet.wait(20)  # passes only in fours
        time.sleep(0.05)  # a fifth would come now
        return right(row)

    server = serve(met)

    def load(*args):
        loaded.append(1)
        ahead.append(len(loaded) - len(server.asked) + server.flying)
        return data_prep.load_image(*args)

    monkeypatch.setattr(stage, "load_image", load)
    rows = evaluate(server, "--concurrency", "4", "--retries", "0")
    assert server.most == 4 and len(server.asked) == 16 and all(row["correct"] for row in rows.values())
    assert len(loaded) == 16 and max(ahead) <= 4


def test_answers_are_written_as_they_come(serve):
    """The first row is answered last, after it has seen all others in the file; then the order is mended."""
    ids, seen = make_rows(4), []

    def slow_first(row, n, server):
        deadline = time.time() + 20
        while row == "row-0" and len(seen) < 3 and time.time() < deadline:
            seen[:] = [r["id"] for r in written()]
            time.sleep(0.01)
        return right(row)

    rows = evaluate(serve(slow_first), "--concurrency", "2", "--timeout", "60")
    assert sorted(seen) == ids[1:] and [*rows] == ids


def test_an_interrupted_run_asks_no_more(serve):
    """Ctrl-C closes the iterator of replies: rows that were not begun are dropped, not asked first."""
    make_rows(50)
    server = serve()
    cfg = stage.Config(engine="api", base_url=server.url, concurrency=1)
    replies = stage.open_engine(MODEL, cfg)(data_prep.read_records("rows.jsonl"))
    next(replies)
    replies.close()
    time.sleep(0.3)
    assert len(server.asked) < 25


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_at_once(serve, tmp_path, number):
    """With requests in flight to a server that drips, and answers on the way: what came is in the file."""
    make_rows(40)
    server = serve(lambda row, n, s: right(row) if int(row[4:]) < 5 else dripping(b"HTTP/1.1 200 OK\r\nA: "))
    job = start(tmp_path, "eval.py", "--engine", "api", "--base_url", server.url, "--bench", "rows.jsonl")
    wait_until(lambda: len(server.asked) >= 16 and lines_in(tmp_path / FOLDER / "rows.jsonl") == 5, job)
    began = time.time()
    job.send_signal(number)
    output, _ = job.communicate(timeout=60)
    assert time.time() - began < 1 and job.returncode == 128 + number
    assert output.strip().splitlines()[-1] == f"eval.py: ended by {number.name}" and "Traceback" not in output
    assert [row["correct"] for row in written()] == [1] * 5


# ----- the key


def test_the_key_is_sent_and_nowhere_kept(serve, monkeypatch, capfd, tmp_path):
    """Servers that repeat it, in a status or a body, do not bring it into files or onto the terminal."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    make_rows(4)
    echo = {"row-1": (401, {}, f"bad key {KEY}".encode()), "row-2": sent(f"{KEY}\r\n\r\n".encode()),
            "row-3": ("x" * 190 + KEY).encode()}
    server = serve(lambda row, n, s: echo.get(row) or right(row))
    rows = evaluate(server, "--retries", "1")
    assert {(h["Authorization"], h["User-Agent"]) for h in server.headers} == {(f"Bearer {KEY}", "nanoVLR")}
    assert sum("error" in row for row in rows.values()) == 3 and rows["row-1"]["error"].endswith("[key]")
    server.models = f"no models for {KEY}".encode()
    shown = refusal("--base_url", server.url, "--bench", "rows.jsonl") + "".join(capfd.readouterr())
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) >= 3
    assert not any(KEY[:10] in text for text in (shown, *(p.read_text() for p in files)))


def test_a_completion_that_repeats_the_key_is_masked(serve, monkeypatch, capfd, tmp_path):
    """Everywhere: in answers, in thoughts, as a model's name; the rest of the answer is kept."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    make_rows(2)
    thought = {"content": "<answer> 1 </answer>", "reasoning_content": f"The key is {KEY}."}
    replies = {"row-0": chat(f"{KEY}: <answer> 0 </answer>"),
               "row-1": json.dumps({"choices": [{"message": thought}]}).encode()}
    server = serve(lambda row, n, s: replies[row])
    server.models = json.dumps({"data": [{"id": f"model {KEY}"}]}).encode()
    argv = ["--engine", "api", "--base_url", server.url, "--bench", "rows.jsonl"]
    stage.main(stage.parse_config(stage.Config, argv))
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    rows = [json.loads(line) for p in files if p.parent.name == "eval" and p.name == "rows.jsonl"
            for line in open(p)]
    assert [(row["response"], row["correct"]) for row in rows] == [
        ("[key]: <answer> 0 </answer>", 1), ("<think>The key is [key].</think><answer> 1 </answer>", 1)]
    shown = "".join(capfd.readouterr())
    assert "model [key]" in shown and not any(
        KEY in text for text in (shown, *(p.read_text() for p in files)))


def test_a_key_that_is_a_word_changes_no_answer(serve, monkeypatch):
    """Local servers take any key: EMPTY, none, 1."""
    make_rows(2)
    monkeypatch.setenv("OPENAI_API_KEY", "1")
    monkeypatch.setenv("JUDGE_API_KEY", "EMPTY")
    rows = evaluate(serve(lambda row, n, s: chat(f"EMPTY <answer> {row[4:]} </answer>")))
    assert [row["response"] for row in rows.values()] == [f"EMPTY <answer> {i} </answer>" for i in (0, 1)]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_an_error(serve, monkeypatch, status):
    """Neither the key nor the question goes elsewhere; what was said is told, once and without the key."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    make_rows(1)
    elsewhere = serve()
    seen = []
    elsewhere.models = lambda handler: seen.append(handler.path)
    away = status, {"Location": f"{elsewhere.url}/models?{KEY}"}, b"gone"
    server = serve(lambda row, n, s: away)
    server.models = away
    shown = refusal("--base_url", server.url, "--bench", "rows.jsonl")
    told = f"HTTP {status}: redirects to {elsewhere.url}/models?[key]"
    assert f"--base_url {server.url}" in shown and shown.endswith(told)
    row = evaluate(server, "--api_model", MODEL)["row-0"]
    assert row["error"] == told and server.asked == ["row-0"]
    assert not seen and not elsewhere.asked


def test_a_key_that_no_header_can_hold_is_refused_unseen(serve, monkeypatch):
    make_rows(1)
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n{KEY}")
    message = refusal("--base_url", serve().url, "--bench", "rows.jsonl")
    assert "OPENAI_API_KEY" in message and KEY not in message


# ----- mistakes


@pytest.mark.parametrize("flags, named", [
    (["--engine", "tgi"], "--engine: tgi: use hf | vllm | api"), (["--concurrency", "0"], "--concurrency 0"),
    (["--timeout", "0"], "--timeout 0"), (["--timeout", "-1"], "--timeout -1"),
    (["--timeout", "nan"], "--timeout nan"), (["--timeout", "inf"], "--timeout inf"),
    (["--retries", "-1"], "--retries -1"), (["--base_url", "localhost:8000"], "--base_url localhost:8000"),
    (["--base_url", "file:///etc"], "--base_url file:///etc")])
def test_bad_flags_are_one_line_errors(serve, flags, named):
    make_rows(1)
    server = serve()
    assert named in refusal("--base_url", server.url, "--api_model", MODEL, "--bench", "rows.jsonl", *flags)
    assert not server.asked


@pytest.mark.parametrize("models", [
    b"{}", b'{"data": []}', b"[]", b"<html>", b"", (500, {}, b"down"), sent(b""), sent(b"hello\r\n\r\n"),
    hang, *(PASSING[name] for name in ("header drip", "body drip", "a million deep",
                                       "announces an exabyte"))])
def test_a_server_without_models_is_a_one_line_error(serve, models):
    make_rows(1)
    server = serve()
    server.models = models
    message = refusal("--base_url", server.url, "--bench", "rows.jsonl", "--timeout", "0.3")
    assert f"--base_url {server.url}" in message


def test_a_server_that_is_not_there(serve):
    """Without --api_model the run does not start; with it, every row fails after its attempts."""
    make_rows(2)
    server = serve()
    server.stop()
    assert f"--base_url {server.url}" in refusal("--base_url", server.url, "--bench", "rows.jsonl")
    rows = evaluate(server, "--api_model", MODEL, "--retries", "1")
    assert len(rows) == 2 and all("refused" in row["error"] for row in rows.values())
