"""Nothing trains on wrong numbers in silence: planted faults are named before step 1;
the GPU path's numerics.
"""
import dataclasses
import json
import math
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import transformers as hf
from conftest import CPU, IDEFICS_TEMPLATE, RECORDS, VISION, WORDS, shake, text_config, tokenizer

import data_prep
import eval as evaluation
import grpo
import sft

ROOT = Path(__file__).resolve().parents[1]


class Log:
    """What RunLog does with messages: notes are kept, a failure raises."""

    def __init__(self):
        self.notes = []
        self.out = Path("out/x")

    def note(self, text):
        self.notes.append(text)

    def fail(self, text):
        assert "\n" not in text
        raise SystemExit(text)


def config(**changed):
    cfg = grpo.Config(max_new_tokens=8, max_prompt_tokens=256, token_budget=512)
    return dataclasses.replace(cfg, **changed)


@pytest.fixture
def run(tiny, group):
    """Policy, optimizer, engine and the rest of a run on the tiny model."""
    cfg = config()
    policy, processor = sft.load_policy(tiny.model, cfg, CPU)
    engine = evaluation.build_engine(tiny.model, processor, cfg, CPU)
    grpo.sync_weights(policy, engine)
    dummy = sft.blank_prompt(processor, cfg.max_pixels)
    prompts = [sft.encode_prompt(record, processor, cfg.max_pixels) for record in tiny.records[:3]]
    return types.SimpleNamespace(cfg=cfg, policy=policy, processor=processor, engine=engine, dummy=dummy,
                                 prompts=prompts, optimizer=sft.make_optimizer(policy, cfg), log=Log())


def rows_of(run):
    return [(prompt, [20 + i, 30, 40, 50]) for i, prompt in enumerate(run.prompts)]


def check(run):
    sft.self_check(run.policy, rows_of(run), run.dummy, run.log)


def check_whole(run):
    return evaluation.check_run(run.policy, run.optimizer, run.engine, run.prompts, run.dummy, run.log,
                                run.cfg)


def refusal(call, *args):
    with pytest.raises(SystemExit) as stop:
        call(*args)
    return str(stop.value.code)


def behind(module, change):
    """Let `change` (module, output) alter what a module gives."""
    module.register_forward_hook(lambda module, inputs, output: change(module, output))


# ----- what is planted is found


def test_a_sound_model_passes_and_keeps_its_weights(run):
    before = {name: p.full_tensor().clone() for name, p in run.policy.named_parameters()}
    worst = check_whole(run)
    assert worst == pytest.approx(10 * sft.TOLERANCE[torch.float32] / 2)
    for name, p in run.policy.named_parameters():
        assert torch.equal(p.full_tensor(), before[name]), name
        assert p.grad is None
    for name, p in run.engine.named_parameters():
        assert torch.equal(p, before[name]), name
    assert any("largest micro-batch" in note for note in run.log.notes)


@pytest.mark.parametrize("fault", ["dropout", "batch norm"])
def test_train_mode(run, fault):
    """A module that works otherwise in train mode; load_policy leaves none in it."""
    size = run.policy.config.get_text_config().hidden_size
    faults = {"dropout": torch.nn.Dropout(0.5), "batch norm": torch.nn.BatchNorm1d(size, affine=False)}
    run.policy.fault = faults[fault]
    norm = run.policy.model.language_model.norm
    behind(norm, lambda _, x: run.policy.fault(x.flatten(0, 1)).view(x.shape))
    run.policy.fault.eval()
    check(run)
    run.policy.fault.train()
    assert "train mode differs from eval mode by" in refusal(check, run)
    assert run.policy.fault.training


def test_load_policy_leaves_no_module_in_train_mode(run, tiny):
    layer = sft.GradientCheckpointingLayer
    assert not [m for m in run.policy.modules() if m.training]
    policy, _ = sft.load_policy(tiny.model, config(gradient_checkpointing=True), CPU)
    layers = {m for m in policy.modules() if isinstance(m, layer)}
    assert {m for m in policy.modules() if m.training} == layers


@pytest.mark.parametrize("checkpointing, runs", [(False, 1), (True, 2)])
def test_checkpointing_runs_a_layer_again_in_backward(tiny, group, checkpointing, runs):
    policy, processor = sft.load_policy(tiny.model, config(gradient_checkpointing=checkpointing), CPU)
    calls = []
    policy.model.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    prompt = sft.encode_prompt(tiny.records[0], processor, 10**6)
    inputs, mask = sft.collate([(prompt, [20, 30])], None, 0, CPU)
    policy.token_logprobs(inputs, mask).sum().backward()
    assert len(calls) == runs


def capped(output, scale, cap):
    output.logits = cap * torch.tanh(scale * output.logits / cap)
    return output


def test_soft_capping_and_scaling_that_the_trainer_ignores(run):
    behind(run.policy, lambda _, output: capped(output, 2.0, 0.5))
    assert "token_logprobs differs from the model's own logits by" in refusal(check, run)
    run.policy.head = sft.Head(2.0, 0.5)
    check(run)


def test_a_head_that_the_model_does_not_apply_is_dropped(run):
    """Gemma 3's text config may name a cap that its image-text class never uses."""
    run.policy.head = sft.Head(1.0, 0.5)
    check(run)
    assert run.policy.head == sft.Head()


@pytest.mark.parametrize("named, head", [
    ({}, (1.0, 0.0)), ({"final_logit_softcapping": 30.0}, (1.0, 30.0)),
    ({"logits_scaling": 8.0}, (0.125, 0.0)),
    ({"logit_scale": 0.0625}, (0.0625, 0.0)), ({"final_logit_softcapping": None}, (1.0, 0.0))])
def test_head_of_a_configuration(named, head):
    text = types.SimpleNamespace(**named)
    assert sft.head_of(types.SimpleNamespace(get_text_config=lambda: text)) == head


def test_a_leak(run):
    """Every position sees the mean over all: a later token changes an earlier log-probability."""
    behind(run.policy.model.language_model.norm, lambda _, x: x + 0.1 * x.mean(1, keepdim=True))
    message = refusal(check, run)
    assert "a later token changes" in message or "rows in one batch differ" in message


def test_a_leak_within_equal_rows(run):
    """Rows of one length have no padding, so that only the leak itself can show."""
    run.prompts = run.prompts[:1]
    behind(run.policy.model.language_model.norm, lambda _, x: x + 0.1 * x.mean(1, keepdim=True))
    assert "a later token changes the log-probability of an earlier one by" in refusal(check, run)


def test_rows_that_do_not_go_together(run):
    """Rows see each other, as when image features land in the wrong row."""
    behind(run.policy.model.language_model.norm, lambda _, x: x + 0.1 * x[:, -1:].roll(1, 0) * (len(x) > 1))
    assert "rows in one batch differ from each row alone" in refusal(check, run)


def test_a_skipped_weight_in_the_sync(run, monkeypatch):
    usual = sft.full_weights

    def all_but_one(policy, *args, **options):
        for name, weight in usual(policy, *args, **options):
            if "layers.1.mlp.down_proj" not in name:
                yield name, weight

    monkeypatch.setattr(evaluation, "full_weights", all_but_one)
    assert "sampler and trainer differ once the weights have changed by" in refusal(check_whole, run)


def test_an_engine_that_holds_another_model(run):
    with torch.no_grad():
        weight = run.engine.get_output_embeddings().weight
        weight.add_(0.3 * torch.randn(weight.shape[1]))
    message = refusal(check_whole, run)
    assert "the sampler's log-probabilities differ from the trainer's by" in message
    assert "--engine hf" in message


def test_a_model_that_crashes_is_refused_in_one_line(run):
    def crash(*_):
        raise RuntimeError("shape '[6, -1, 1, 32]' is invalid\nfor input of size 8704")

    behind(run.policy.model.language_model.norm, crash)
    with pytest.raises(SystemExit) as stop, sft.refusing("mllama", run.log):
        check(run)
    assert str(stop.value.code) == ("self-check: mllama cannot be trained on these rows: RuntimeError: shape "
                                    "'[6, -1, 1, 32]' is invalid; what trains is listed in "
                                    "docs/reference.md, Families")


def test_a_run_stops_where_the_sampler_drifts_away():
    log = Log()
    evaluation.end_if_mismatched(3, {"mismatch/mean": 0.01}, 0.01, log)
    for found in (0.011, math.nan):
        with pytest.raises(SystemExit, match="step 3: mismatch/mean is .*--max_mismatch"):
            evaluation.end_if_mismatched(3, {"mismatch/mean": found}, 0.01, log)


def test_check_rows_prefers_other_numbers_of_images():
    records = [{"id": str(i), "images": ["x"] * n} for i, n in enumerate([1, 1, 0, 1, 2, 1])]
    assert [r["id"] for r in sft.check_rows(records, dict, Log())] == ["0", "2", "4"]
    assert [r["id"] for r in sft.check_rows(records[:2], dict, Log())] == ["0", "1"]

    def unreadable(record):
        raise ValueError("cannot be read")

    with pytest.raises(SystemExit, match="none of the first rows can be used: record .*: cannot be read"):
        sft.check_rows(records, unreadable, Log())


# ----- worst case first, stalls


@pytest.mark.parametrize("budget", [300, 48, 1])
def test_the_largest_micro_batch_runs_once(run, budget):
    row = rows_of(run)[0]
    length = row[0]["input_ids"].shape[1] + 4
    rows = max(1, budget // length)
    sft.rehearse(run.policy, run.optimizer, row, run.dummy, config(token_budget=budget), run.log)
    assert f"{rows} row(s) of {length} tokens" in run.log.notes[-1] and "GiB" in run.log.notes[-1]
    assert all(p.grad is None for p in run.policy.parameters())


def test_out_of_memory_says_what_to_lower(run):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nmore")

    run.policy.token_logprobs = full
    message = refusal(sft.rehearse, run.policy, run.optimizer, rows_of(run)[0], run.dummy, run.cfg, run.log)
    assert "does not fit: lower --token_budget" in message and "20.00 GiB" in message


STALL = """
import sys, time
sys.path.insert(0, {root!r})
import sft
sft.Watchdog.LEAST, sft.Watchdog.FIRST = {least}, {first}
dog = sft.Watchdog({factor})
for _ in range({steps}):
    time.sleep(0.05)
    dog.step()
time.sleep({hang})
dog.done()
print("ended by itself")
"""


@pytest.mark.parametrize("factor, first, steps, hang, stopped", [
    (2.0, 1, 0, 30, True), (2.0, 30, 3, 30, True), (0.0, 0.1, 3, 1, False), (50.0, 30, 3, 1, False)])
def test_a_step_that_takes_too_long_ends_the_run(factor, first, steps, hang, stopped):
    code = STALL.format(root=str(ROOT), least=0.5, first=first, factor=factor, steps=steps, hang=hang)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode != 0) == stopped, done.stderr
    assert ("Timeout" in done.stderr and "most recent call first" in done.stderr) == stopped


# ----- runs without a usable row, prompts that are too long


def small_run(tiny, tmp_path, **changed):
    return grpo.Config(model=tiny.model, out=str(tmp_path / "out"), steps=2, prompts_per_step=4, group_size=2,
                       max_new_tokens=6, token_budget=512, eval_data="", workers=0, **changed)


@pytest.fixture
def in_this_process(monkeypatch, group):
    """main without its own process group; what it does to signals ends with the test."""
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    for stage in (grpo, sft):
        monkeypatch.setattr(stage, "init_distributed", lambda _: (0, 1, CPU))
    handlers = {number: signal.getsignal(number) for number in sft.STOPS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_loader_that_is_late_shows_in_the_log(tiny, tmp_path, in_this_process, monkeypatch):
    """time/data is what a step waits for its images: four questions at 0.1 s each."""
    def slow(*args, **kwargs):
        time.sleep(0.1)
        return encode(*args, **kwargs)

    encode = grpo.encode_prompt
    monkeypatch.setattr(grpo, "encode_prompt", slow)
    cfg = small_run(tiny, tmp_path, data=str(tiny.mini / "counting_train.jsonl"))
    grpo.main(cfg)
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(row["time/step"] > row["time/data"] >= 0.4 for row in rows)


def test_a_run_that_is_at_its_end_says_so(tiny, tmp_path, in_this_process, capsys):
    cfg = small_run(tiny, tmp_path, data=str(tiny.mini / "counting_train.jsonl"))
    grpo.main(cfg)
    before = (tmp_path / "out/metrics.jsonl").read_text()
    for steps in (2, 1):
        with pytest.raises(SystemExit) as stop:
            grpo.main(dataclasses.replace(cfg, resume=True, steps=steps))
        assert not stop.value.code
        assert f"out is at step 2 of {steps}: nothing is left to do" in capsys.readouterr().out
    assert (tmp_path / "out/metrics.jsonl").read_text() == before


def test_prompts_beyond_the_limit_are_left_out_and_counted(tiny, tmp_path, in_this_process, capsys):
    words = data_prep.read_records(tiny.mini / "counting_train.jsonl")[:6]
    for record in words[3:]:
        record["question"] += " red" * 400
    data_prep.write_records(tmp_path / "data.jsonl", words)
    cfg = small_run(tiny, tmp_path, data=str(tmp_path / "data.jsonl"), max_prompt_tokens=200)
    grpo.main(cfg)
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert sum(row["data/unreadable"] for row in rows) >= 3
    assert "tokens, --max_prompt_tokens is 200" in capsys.readouterr().out


def test_eval_does_not_answer_prompts_beyond_the_limit(run, tiny):
    """They count as failed rows, with the reason; the others are answered."""
    records = [dict(tiny.records[0], id="short"), dict(tiny.records[0], id="long", question="red " * 300)]
    cfg = evaluation.Config(max_prompt_tokens=200, max_new_tokens=4)
    workers = sft.Workers(lambda r, _: sft.encode_prompt(r, run.processor, 10**6, cfg.max_prompt_tokens), 0)
    short, long = evaluation.answer_rows(records, run.engine, run.processor, workers, cfg)
    assert "error" not in short[1][0] and short[1][0]["tokens"] > 0
    assert "tokens, --max_prompt_tokens is 200" in long[1][0]["error"] and long[1][0]["tokens"] == 0


@pytest.mark.parametrize("stage", [grpo, sft])
def test_a_run_without_one_usable_row_ends(stage, tiny, tmp_path, in_this_process):
    rows = data_prep.read_records(tiny.mini / "counting_train.jsonl")[:6]
    lines = []
    for row in rows:
        (tmp_path / f"{row['id']}.png").write_bytes(b"no picture")
        lines.append(json.dumps(row | {"images": [f"{row['id']}.png"]}) + "\n")
    (tmp_path / "data.jsonl").write_text("".join(lines))
    shared = dict(model=tiny.model, data=str(tmp_path / "data.jsonl"), out=str(tmp_path / "out"),
                  eval_data="", workers=0, steps=2)
    with pytest.raises(SystemExit) as stop:
        stage.main(stage.Config(**shared))
    assert "none of the first rows can be used" in str(stop.value.code)


def test_a_step_without_one_usable_row_ends_the_run(tiny, tmp_path, in_this_process):
    rows = data_prep.read_records(tiny.mini / "counting_train.jsonl")[:2]
    bad = [row | {"id": f"bad{i}", "question": "red " * 600} for i in range(60) for row in rows[:1]]
    data_prep.write_records(tmp_path / "data.jsonl", rows + bad)
    cfg = small_run(tiny, tmp_path, data=str(tmp_path / "data.jsonl"), max_prompt_tokens=200)
    with pytest.raises(SystemExit, match="none of its 4 questions can be used"):
        grpo.main(cfg)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    with pytest.raises(SystemExit, match="none of its rows can be used"):
        sft.main(sft.Config(model=tiny.model, data=cfg.data, out=str(tmp_path / "sft"), eval_data="",
                            workers=0, steps=2, batch_size=4, max_tokens=250))
    assert not (tmp_path / "sft" / "metrics.jsonl").exists()


# ----- numbers in every mode


@pytest.mark.parametrize("gap", [-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4])
def test_no_log_ratio_reaches_infinity(gap):
    logps = torch.tensor([[gap]], requires_grad=True)
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    for advantage in (-1.0, 1.0):
        loss, sums = grpo.grpo_loss(logps, zero, zero - gap, zero, advantage * one, one, config(kl_beta=0.1))
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(logps.grad).all()
        assert all(math.isfinite(float(value)) for value in sums.values())


@pytest.mark.parametrize("d, value", [
    (0.0, 0.0), (0.5, 0.1487), (-1.0, 0.3679), (-20.0, 19.0), (-500.0, 19.0)])
def test_k3(d, value):
    assert grpo.k3(torch.tensor(d)).item() == pytest.approx(value, abs=1e-4)


def test_buffers_keep_their_dtype(run):
    """Rotary frequencies in bf16 would turn tokens by wrong angles, in a reference most of all."""
    for dtype in (torch.bfloat16, torch.float32):
        model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        model.register_buffer("inv_freq", torch.tensor([1.0, 0.12345678]))
        model.requires_grad_(dtype == torch.float32)  # a frozen one is kept in what is computed with
        sft.cast_parameters(model, torch.bfloat16)
        assert model[0].weight.dtype == dtype and model.inv_freq.dtype == torch.float32
        assert torch.equal(model.inv_freq, torch.tensor([1.0, 0.12345678]))


@pytest.fixture
def bf16(monkeypatch):
    """The precision of a GPU on CPU: fp32 masters, bf16 compute."""
    monkeypatch.setattr(sft, "compute_dtype", lambda device: torch.bfloat16)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_bf16_compute_with_fp32_masters(family, bf16, checkpointing):
    """KL of step 0 is exactly 0, gradients are fp32, the sampler agrees within the self-check's bound."""
    cfg = config(kl_beta=0.1, updates=2, gradient_checkpointing=checkpointing, freeze_vision=checkpointing,
                 prompts_per_step=3, group_size=2, token_budget=4096)
    policy, processor = sft.load_policy(family.path, cfg, CPU)
    reference, _ = sft.load_policy(family.path, cfg, CPU, trainable=False)
    optimizer = sft.make_optimizer(policy, cfg)
    assert all(p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16) for p in policy.parameters())
    assert {p.dtype for p in reference.parameters()} == {torch.bfloat16}
    assert policy.compute_dtype == torch.bfloat16
    engine = evaluation.build_engine(family.path, processor, cfg, CPU)
    grpo.sync_weights(policy, engine)
    names = ["text", "image", "wide image"]
    prompts = {i: sft.encode_prompt(RECORDS[name], processor, 10**6) for i, name in enumerate(names)}
    keys = [0, 0, 1, 1, 2, 2]
    rollouts = grpo.sample_rollouts(engine, keys, prompts, range(6), processor.tokenizer, cfg)
    own = grpo.all_logprobs(policy, rollouts, prompts, None, cfg)
    start = grpo.all_logprobs(reference, rollouts, prompts, None, cfg)
    for a, b in zip(own, start):
        assert torch.equal(a, b)  # the KL to the start model is 0 before anything was learnt
    gap = sft.mean_gap([r.sampler_logps for r in rollouts], own)
    assert gap <= sft.TOLERANCE[torch.bfloat16], gap
    for r, advantage in zip(rollouts, (1.0, -1.0) * 3):
        r.advantage = advantage
    dtypes = set()
    for p in policy.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: dtypes.add(p.grad.dtype))
    dummy = sft.blank_prompt(processor, 10**6)
    halves = [rollouts[:3], rollouts[3:]]
    totals = grpo.train_on(halves, policy, reference, optimizer, prompts, dummy, 1, Log(), cfg)
    assert dtypes == {torch.float32}
    assert totals["loss/kl"] >= 0 and math.isfinite(totals["norm"]) and totals["norm"] > 0


def test_kl_of_the_first_update_is_exactly_zero(family, bf16):
    cfg = config(kl_beta=0.1, token_budget=4096)
    policy, processor = sft.load_policy(family.path, cfg, CPU)
    reference, _ = sft.load_policy(family.path, cfg, CPU, trainable=False)
    prompts = {0: sft.encode_prompt(RECORDS["image"], processor, 10**6)}
    words = processor.tokenizer(" ".join(WORDS[-1].split()[:6]), add_special_tokens=False)["input_ids"]
    rollouts = [grpo.Rollout(0, ids, torch.zeros(len(ids)), False, "", advantage=a)
                for ids, a in ((words[:4], 1.0), (words[1:6], -1.0))]
    optimizer = sft.make_optimizer(policy, cfg)
    totals = grpo.train_on([rollouts], policy, reference, optimizer, prompts, None, 1, Log(), cfg)
    assert totals["loss/kl"] == 0.0 and totals["policy/kl_old"] == 0.0


# ----- the head, forward and backward


@pytest.mark.parametrize("head", [
    sft.Head(), sft.Head(0.125), sft.Head(1.0, 2.0), sft.Head(3.0, 1.5)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_response_logprob_with_a_head_equals_autograd(head, temperature):
    torch.manual_seed(0)
    hidden = torch.randn(7, 16, dtype=torch.float64).float().requires_grad_()
    weight = torch.randn(11, 16).requires_grad_()
    targets, banned = torch.tensor([0, 1, 2, 4, 5, 10, 9]), torch.tensor([3, 7])
    logits = hidden @ weight.T * head.scale
    if head.cap:
        logits = head.cap * torch.tanh(logits / head.cap)
    logits = (logits / temperature).index_fill(1, banned, -torch.inf)
    logps = logits.log_softmax(1)
    expected = logps.gather(1, targets[:, None])[:, 0]
    grads = torch.autograd.grad((expected * torch.arange(7.0)).sum(), (hidden, weight))
    got, entropy = sft.ResponseLogprob.apply(hidden, weight, targets, head, temperature, banned)
    own = torch.autograd.grad((got * torch.arange(7.0)).sum(), (hidden, weight))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(own, grads):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    slow = -(logps.exp() * logps.masked_fill(logps.isneginf(), 0)).sum(1)
    torch.testing.assert_close(entropy, slow, atol=1e-5, rtol=1e-5)
    assert not entropy.requires_grad


# ----- placeholders


@pytest.mark.parametrize("fields, ids", [
    ({"image_token_id": 5, "video_token_index": 6, "eos_token_id": 7, "pad_token_id": 8}, [5, 6]),
    ({"vision_start_token_id": 1, "vision_end_token_id": 2, "vision_token_id": 3}, [1, 2, 3]),
    ({"visual_indicator_token_ids": [4, 9], "image_token_id": 5}, [4, 5, 9]),
    ({"boi_token_index": 1, "eoi_token_index": 2, "boa_token_id": 3, "eoa_token_index": 4}, [1, 2, 3, 4]),
    ({"audio_token_id": 3, "image_token_index": 1, "image_seq_length": 99}, [1, 3]),
    ({"image_start_token_id": 3, "image_break_token_id": 4, "bos_token_id": 9, "eos_token_id": [9]}, [3, 4]),
    ({"image_token_id": None}, [])])
def test_placeholders_that_are_never_sampled(fields, ids):
    config = types.SimpleNamespace(to_dict=lambda: fields)
    assert sft.vision_ids(config, "cpu").tolist() == ids


# ----- families with something of their own


def paligemma():
    """Soft-capped logits, eager attention only, a prompt that sees itself whole,
    labels from the processor.
    """
    tok = tokenizer("<image>", image_token="<image>")
    tok.bos_token = "<|im_start|>"  # its processor writes one
    size = len(tok) + 1030  # its processor adds 1,024 places and more
    text = text_config(tok, vocab_size=size, layer_types=["sliding_attention", "full_attention"],
                       final_logit_softcapping=1.0)
    vision = VISION | dict(model_type="siglip_vision_model", num_hidden_layers=2, num_attention_heads=2,
                           image_size=56, vision_use_head=False, projection_dim=64)
    config = hf.PaliGemmaConfig(text_config=dict(model_type="gemma2", **text), vision_config=vision,
                                image_token_index=tok.image_token_id, projection_dim=64, hidden_size=64,
                                vocab_size=size)
    config._attn_implementation = "eager"
    images = hf.SiglipImageProcessor(size={"height": 56, "width": 56})
    images.image_seq_length = 16
    template = IDEFICS_TEMPLATE.replace("<end_of_utterance>", "<|im_end|>")
    return (hf.PaliGemmaForConditionalGeneration(config),
            hf.PaliGemmaProcessor(images, tok, chat_template=template))


def granite4_vision():
    """Scaled logits, and no KV cache of its own making."""
    tok = tokenizer("<image>", image_token="<image>")
    text = text_config(tok, logits_scaling=0.25)
    del text["head_dim"]
    vision = VISION | dict(model_type="siglip_vision_model", num_hidden_layers=2, num_attention_heads=2,
                           hidden_size=64, image_size=56, vision_use_head=False)
    squeeze = dict(model_type="blip_2_qformer", intermediate_size=64, num_hidden_layers=1, vocab_size=8,
                   cross_attention_frequency=1)
    tiles = [[56, 112], [112, 56]]
    config = hf.Granite4VisionConfig(
        text_config=text, vision_config=vision, qformer_config=squeeze, image_token_index=tok.image_token_id,
        image_grid_pinpoints=tiles, vision_feature_select_strategy="full", vision_feature_layer=-1,
        downsample_rate="1/2", deepstack_layer_map=[[-1, 0]], image_seq_length=16)
    images = hf.LlavaNextImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56},
                                        image_grid_pinpoints=tiles)
    template = IDEFICS_TEMPLATE.replace("<end_of_utterance>", "<|im_end|>")
    return hf.Granite4VisionForConditionalGeneration(config), hf.Granite4VisionProcessor(
        images, tok, patch_size=14, vision_feature_select_strategy="full", downsample_rate="1/2",
        chat_template=template)


def saved(build, path):
    torch.manual_seed(0)
    model, processor = build()
    shake(model, seed=1)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("build, attn, head", [
    (paligemma, "auto", sft.Head(1.0, 1.0)), (granite4_vision, "sdpa", sft.Head(4.0, 0.0))])
def test_family(build, attn, head, tmp_path, group):
    if not hasattr(hf, "Granite4VisionConfig"):
        pytest.skip("this transformers is older than the family")
    path = saved(build, tmp_path)
    cfg = config(attn=attn)
    policy, processor = sft.load_policy(path, cfg, CPU)
    engine = evaluation.build_engine(path, processor, cfg, CPU)
    optimizer, dummy = sft.make_optimizer(policy, cfg), sft.blank_prompt(processor, cfg.max_pixels)
    prompts = [sft.encode_prompt(record, processor, cfg.max_pixels) for record in RECORDS.values()
               if record["images"]]
    evaluation.check_run(policy, optimizer, engine, prompts, dummy, Log(), cfg)
    assert policy.head == head


def test_an_attention_that_a_family_lacks(tmp_path, group):
    path = saved(paligemma, tmp_path)
    with pytest.raises(ValueError, match="^--attn sdpa: Gemma2Model does not support .*; try --attn auto$"):
        sft.load_policy(path, config(attn="sdpa"), CPU)
    policy, _ = sft.load_policy(path, config(attn="auto"), CPU)
    assert policy.config.get_text_config()._attn_implementation == "eager"


def test_the_vision_tower_has_a_kernel_of_its_own(tiny, monkeypatch, group):
    """flash-attn, where it is installed; here eager stands in for it."""
    def choose(model, kernels):
        asked.append(kernels)
        chosen(model, dict.fromkeys(kernels, "eager"))

    asked = []
    chosen = hf.PreTrainedModel.set_attn_implementation
    before = hf.AutoModelForImageTextToText.from_pretrained(tiny.model, dtype=torch.float32)
    monkeypatch.setattr(hf.PreTrainedModel, "set_attn_implementation", choose)
    monkeypatch.setattr(sft, "is_flash_attn_2_available", lambda: True)
    model = sft.load_model(tiny.model, torch.float32, "auto")
    assert asked == [{"vision_config": "flash_attention_2"}]
    assert model.model.visual.config._attn_implementation == "eager"
    assert model.model.language_model.config._attn_implementation == "sdpa"
    prompt = sft.encode_prompt(tiny.records[0], hf.AutoProcessor.from_pretrained(tiny.model), 10**6)
    del prompt["request"]
    with torch.no_grad():
        torch.testing.assert_close(model(**prompt).logits, before(**prompt).logits)
    assert sft.load_model(
        tiny.model, torch.float32, "sdpa").model.visual.config._attn_implementation == "sdpa"
    assert len(asked) == 1


def test_a_processor_without_a_chat_template(tiny, tmp_path, group):
    path = shutil.copytree(tiny.model, tmp_path / "model")
    (path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="the processor of .* has no chat template"):
        sft.load_policy(str(path), config(), CPU)


@pytest.mark.parametrize("told, line", [
    ("Package `num2words` is required. Install it with `pip install num2words`.", "pip install num2words"),
    ("\nTimmWrapperModel requires timm, install it:\n`pip install timm`", "install it: `pip install timm`")])
def test_a_package_that_a_processor_needs(told, line):
    with pytest.raises(SystemExit) as stop, sft.one_line_errors():
        raise ImportError(told)
    assert line in str(stop.value.code) and "\n" not in str(stop.value.code)


def test_patches_side_by_side_in_a_batch_of_one():
    """MiniCPM-V: pixel_values is (1, 3, patch, all patches x patch)."""
    rows = []
    for grid in ([2, 2], [2, 4]):
        pixels = torch.full((1, 3, 14, 14 * grid[0] * grid[1]), float(grid[1]))
        prompt = {"input_ids": torch.ones(1, 3, dtype=torch.long), "pixel_values": pixels,
                  "target_sizes": torch.tensor([grid])}
        rows.append((prompt, [5]))
    inputs, _ = sft.collate(rows, None, 0, CPU)
    assert inputs["pixel_values"].shape == (1, 3, 14, 14 * 12)
    assert inputs["pixel_values"][0, 0, 0].tolist() == [2.0] * 56 + [4.0] * 112
    assert inputs["target_sizes"].tolist() == [[2, 2], [2, 4]]
