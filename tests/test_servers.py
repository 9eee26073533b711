"""--engine server: requests go to all servers, reloads run at once, and the server that fails is named.

The servers are HTTP servers in this process that answer as vLLM does, with transformers' model and our
sampler.
"""
import base64
import dataclasses
import io
import json
import re
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import CPU, RECORDS
from PIL import Image
from safetensors.torch import load_file, save_file
from test_stages import GRPO, launch, metrics, work  # noqa: F401

import eval as evaluation
import grpo
import sft

TWO = ["--standalone", "--nproc_per_node", "2"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.answer(200, {"data": [{"id": self.server.name}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "null")
        route = self.path.strip("/").split("/")[-1]
        with self.server.lock:
            self.server.asked.append(route)
        status, reply = self.server.behave(route, body) or (200, self.server.reply(route, body))
        self.answer(status, reply)

    def answer(self, status, reply):
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class FakeVLLM(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 512
    sampling = threading.Lock()  # of all of them: torch has one thread here

    def __init__(self, model, number, together):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.name, self.together = model, f"served-{number}", together
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lock, self.asked = threading.Lock(), []
        self.behave = lambda route, body: None  # or a (status, reply) instead of its own
        self.processor = evaluation.AutoProcessor.from_pretrained(model)
        self.load()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # clients that gave up

    def load(self):
        self.engine = evaluation.build_engine(str(self.model), self.processor, grpo.Config(), CPU)

    def reply(self, route, body):
        if route == "collective_rpc":
            # A server is loaded only if all others are being loaded at the same time.
            self.together.wait(20)
            weights = {}
            for path in sorted((self.model / body["kwargs"]["weights_path"]).glob("*.safetensors")):
                weights |= load_file(path)
            save_file(weights, self.model / "model.safetensors", {"format": "pt"})
            with self.sampling:
                self.load()
        if route != "completions":
            return None
        assert body["model"] == self.name
        images, messages = [], []
        for turn in body["messages"]:
            parts = []
            for part in turn["content"]:
                if part["type"] == "image_url":
                    png = base64.b64decode(part["image_url"]["url"].partition(",")[2])
                    images.append(Image.open(io.BytesIO(png)))
                    part = {"type": "image"}
                parts.append(part)
            messages.append(turn | {"content": parts})
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt = self.processor(text=[text], images=[images] if images else None, add_special_tokens=False,
                                return_tensors="pt")
        cfg = grpo.Config(max_new_tokens=body["max_tokens"], temperature=body["temperature"])
        seeds = [body["seed"] + k for k in range(body["n"])]
        with self.sampling:
            samples = evaluation.generate(self.engine, [dict(prompt)] * body["n"], seeds, cfg)
        choices = []
        for sample in samples:
            content = [{"logprob": logprob} for logprob in sample.logprobs.tolist()]
            choices.append({"token_ids": sample.ids, "logprobs": {"content": content},
                            "finish_reason": "length" if sample.truncated else "stop"})
        return {"prompt_token_ids": prompt["input_ids"][0].tolist(), "choices": choices}


@pytest.fixture
def fleet(work, monkeypatch):  # noqa: F811
    """fleet(n): n servers of the tiny model."""
    monkeypatch.setenv("no_proxy", "*")
    torch.set_num_threads(1)
    running = []

    def begin(count):
        together = threading.Barrier(count)
        for number in range(count):
            folder = shutil.copytree(work / "tiny", work / f"served{number}")
            running.append(FakeVLLM(folder, number, together))
        return running

    yield begin
    for server in running:
        server.shutdown()
        server.server_close()


def served(servers, *more):
    return [*GRPO, "--engine", "server", "--servers", *[server.url for server in servers], "--steps", "2",
            "--eval_data", "", "--lr", "1e-3", *more]


def test_every_rank_asks_all_servers_and_reloads_run_at_once(work, fleet):  # noqa: F811
    """The run is the one of --engine hf with one rank; the barrier breaks if servers load one by one."""
    servers = fleet(3)
    launch(work, *served(servers, "--out", "served"), torchrun=TWO)
    rows = metrics(work / "served")
    assert [row["step"] for row in rows] == [1, 2] and all(row["mismatch/max"] < 1e-3 for row in rows)
    counts = [server.asked.count("completions") for server in servers]
    assert sum(counts) >= 12 and max(counts) - min(counts) <= 3, counts
    assert {server.asked.count("collective_rpc") for server in servers} == {5}  # 3 of them in the self-check
    for cache in ("prefix", "mm", "encoder"):
        assert {server.asked.count(f"reset_{cache}_cache") for server in servers} == {5}


def own_lines(output):
    return [line for line in output.splitlines() if line.startswith("grpo.py: ")]


@pytest.mark.parametrize("route, told", [
    ("completions", "/v1/chat/completions: HTTP 500 \"out of memory\""),
    ("collective_rpc", "/collective_rpc: HTTP 500 \"out of memory\""), ("late", "no whole answer within 3 s"),
    ("odd", "/v1/chat/completions: KeyError: 'logprobs'")])
def test_the_server_that_fails_is_named_at_once(work, fleet, route, told):  # noqa: F811
    """The run waits for no other server, not even for one that would answer in ten minutes."""
    servers = fleet(2)
    gone = threading.Event()

    def fails(asked, body):
        if route == "late" and asked == "completions":
            gone.wait(60)
        if route == "odd" and asked == "completions":
            return 200, {"prompt_token_ids": [], "choices": [{}]}
        return (500, "out of memory") if asked == route else None

    servers[1].behave = fails
    if route == "completions":
        servers[0].behave = lambda asked, body: gone.wait(60) if asked == route else None
    began = time.time()
    more = ["--timeout", "3"] if route == "late" else []
    output = launch(work, *served(servers, "--out", "failed", *more), code=1)
    gone.set()
    assert time.time() - began < 45
    [line] = own_lines(output)
    assert servers[1].url in line and told in line and servers[0].url not in line, output[-2000:]
    assert "Traceback" not in output


def test_a_server_that_is_not_there_is_named_before_the_first_step(work, fleet):  # noqa: F811
    [server] = fleet(1)
    output = launch(work, *served([server]), "--servers", server.url, "http://127.0.0.1:9", code=1)
    [line] = own_lines(output)
    assert "rollout server http://127.0.0.1:9/v1/models: " in line and server.url not in line


@pytest.mark.parametrize("ranks, prompts, servers", [(1, 7, 3), (2, 2, 4), (8, 3, 8), (4, 1, 4), (3, 5, 2)])
def test_servers_get_equal_shares(ranks, prompts, servers, monkeypatch):
    """Also where each rank has fewer prompts than there are servers."""
    asked = []
    monkeypatch.setattr(evaluation.Server, "__init__", lambda self: None)
    monkeypatch.setattr(evaluation.Server, "ask",
                        lambda self, url, prompt, option: asked.append(url) or prompt)
    engine = evaluation.Server()
    engine.urls = [f"http://{i}" for i in range(servers)]
    for rank in range(ranks):
        monkeypatch.setattr(evaluation.dist, "get_rank", lambda: rank)
        assert engine.sample([*range(prompts)], [None] * prompts) == [*range(prompts)]
    counts = [asked.count(url) for url in engine.urls]
    assert max(counts) - min(counts) <= 1, counts


# ----- time-outs


@pytest.mark.parametrize("timeout, minutes, fits", [
    (2700, 60, True), (3600, 60, False), (0, 60, False), (-1, 60, False), (float("nan"), 60, False),
    (100, 1, False), (59, 1, True)])
def test_a_server_is_given_up_before_the_ranks_are(timeout, minutes, fits, group):
    cfg = grpo.Config(engine="server", servers=("http://a",), timeout=timeout, dist_timeout=minutes)
    if fits:
        return grpo.check_engine(cfg)
    with pytest.raises(ValueError, match=f"--timeout {timeout:g}.*--dist_timeout {minutes}") as error:
        grpo.check_engine(cfg)
    assert "\n" not in str(error.value)
    grpo.check_engine(dataclasses.replace(cfg, engine="hf", servers=()))  # there nobody waits for a server


def test_defaults_fit_each_other(group, monkeypatch):
    grpo.check_engine(grpo.Config(engine="server", servers=("http://a",)))
    monkeypatch.setattr(evaluation, "WORLD", 8)
    cfg = evaluation.Config(judge="api")
    evaluation.check(cfg)
    with pytest.raises(ValueError, match="--timeout 20000.*--retries 5.*--dist_timeout 1440"):
        evaluation.check(dataclasses.replace(cfg, timeout=20000.0))


LATE = """
import sys, time
sys.argv[0] = "sft.py"
import torch.distributed as dist
import sft
rank, world, device = sft.init_distributed(float(sys.argv[1]))
sft.end_on_signals()
group = dist.new_group([0, 1]) if sys.argv[2] == "later" else None
dist.barrier(group)
if rank == 1:
    time.sleep(30)
began = time.time()
try:
    dist.barrier(group)
finally:
    print("waited", time.time() - began, flush=True)
"""


@pytest.mark.parametrize("which", ["first", "later"])
def test_a_rank_waits_for_another_as_long_as_the_flag_says(tmp_path, which):
    """Also in groups that are made later: torch would give them its own default."""
    (tmp_path / "late.py").write_text(LATE)
    output = launch(tmp_path, tmp_path / "late.py", "0.05", which, torchrun=TWO, code=1)
    waited = float(re.search(r"waited ([\d.]+)", output)[1])
    assert 2 < waited < 15
    assert "rank 0 ends because another rank was not there within --dist_timeout" in output
    assert "Traceback" not in output.split("another rank")[0]


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "1e9"])
def test_a_wait_that_is_none_is_refused(tmp_path, minutes):
    output = launch(tmp_path, "grpo.py", "--dist_timeout", minutes, code=1)
    assert output.count("\n") == 1 and "grpo.py: --dist_timeout" in output


def test_prompts_are_those_of_the_trainer(fleet, group):
    """The fake reads images and text as the trainer does; else the tests above would test nothing."""
    [server] = fleet(1)
    cfg = grpo.Config(engine="server", servers=(server.url,), max_new_tokens=4, out=str(server.model / "run"))
    engine = evaluation.build_engine(str(server.model), server.processor, cfg, CPU)
    prompts = [sft.encode_prompt(record, server.processor, 10**6) for record in RECORDS.values()]
    samples = evaluation.generate(engine, prompts, range(5), cfg)
    same = evaluation.generate(server.engine, prompts, range(5), cfg)
    assert [sample.ids for sample in samples] == [sample.ids for sample in same]
