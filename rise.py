"""RISE: records with an annotation -> rationales from which it can be reconstructed, and SFT data from them.

RISE-CoT (arXiv 2508.13229) asks the policy twice. Hop 1 shows the image and its annotation and asks for a
rationale z that does not give the annotation away; what does is scrubbed. Hop 2 shows the image and the
scrubbed rationale and asks for the annotation. G rationales a record, one reconstruction of each:

    z_i ~ pi(. | image, problem with the annotation)       y_i ~ pi(. | image, scrub(z_i))
    r_i  = agreement(y_i) * (leak_penalty if z_i leaks, else 1) + format_weight * format(y_i)
    A_i  = (r_i - mean(r)) / (std(r) + 1e-4)               over the G rationales of a record
    loss = that of grpo.py with A_i on the tokens of z_i (--graded cot), of y_i (reconstruction), or of both,
           each behind its own prompt

`--phase annotate` is what comes then: sample G rationales a record, keep the best if its reconstruction
agrees to --tau and it does not leak, and write records of the task's own prompt, rationale and gold answer.
RISE-R1 is sft.py on those, then grpo.py with the task's reward.

What differs from the paper and its released code, and why:
  1. The released trainer samples the rationales without gradient and grades the reconstruction's tokens only:
     it learns to read rationales, not to write them (`--graded reconstruction`). The default credits the
     rationale's tokens with what could be reconstructed from them.
  2. A leak is looked for in the rationale as it was sampled. The released code looks at the scrubbed one:
     no decimal is left there, and boxes count only if the rationale is nothing but a list of numbers.
  3. A rationale that is cut at --max_new_tokens, or of which scrubbing leaves nothing, has reward 0 and is
     not exported. The released code has no rule for either.
  4. Both hops are sampled at the temperature at which they are scored; the released second hop samples at 0.7
     with a repetition penalty and scores without.
  5. Hop 2 sees the image, so a rationale may be reconstructed from pixels alone. With `--blind` it sees
     nothing but the rationale.
  6. Filter, threshold and export are in the abstract, not in the code: --tau is ours.
  7. The token mean, a reference only with --kl_beta, and the rest of the objective are those of grpo.py.

    python sft.py --data data/mini/mood_see.jsonl --steps 300 --out out/see    # mini suite, laptop
    python sft.py --model out/see --data data/mini/mood_talk.jsonl --steps 500 --out out/talk
    python rise.py                                               # out/talk -> out/rise
    python rise.py --phase annotate                              # out/rise -> out/annotate/sft.jsonl
    torchrun --nproc_per_node 8 rise.py --model Qwen/Qwen2-VL-2B-Instruct --data boxes.jsonl --engine vllm
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 rise.py ...
    python rise.py --resume                                      # from the newest complete step of --out

Shapes: B rows in a micro-batch, T padded length, H hidden size, V vocabulary, N response tokens, Q questions,
G rationales per question.
Tensors over tokens are (B, T-1), aligned to the predicted token: column t belongs to token t+1.
"""
import dataclasses
import functools
import itertools
import math
import re
import signal
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while the libraries below are loaded: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.distributed as dist
from transformers import AutoProcessor

from rewards import (REWARDS, accuracy, agreement, cot_prompt, extract_answer, format_think_answer,
                     gold_distribution, leaks, parse_boxes, parse_distribution, reconstruct_prompt, scrub)
from data_prep import (check_at_least, check_record, check_records, complete_rows, parse_config, read_records,
                       resolve_model, save_image, write_records)
from sft import (RunLog, Stopwatch, Watchdog, Workers, blank_prompt, catch_signals, check_rows,
                 check_same_run, claim, compute_dtype, data_order, encode_prompt, encode_share,
                 end_on_signals, gather, global_max, global_sum, host_memory, init_distributed, load_policy,
                 lr_at, one_line_errors, open_run, peak_memory, pixel_names, readable, refusing,
                 save_checkpoint)
from eval import build_engine, check_engine, check_run, end_if_mismatched, sleep_engine, sync_weights
from grpo import (MEASURED, balance, encoded_here, group_advantages, has_gradient, rollout_seed,
                  sample_rollouts, train_on, update_metrics, which_update)


@dataclass(frozen=True)
class Config:
    # i/o
    phase: str = "cot"  # cot (train the rationales) | annotate (sample, filter, export)
    model: str = ""  # Hub id, model folder or run directory, "" = out/talk, or out/rise to annotate
    data: str = "data/mini/mood_train.jsonl"  # records with an annotation; annotate: or a rationales.jsonl
    out: str = ""  # run directory, "" = out/rise, or out/annotate
    resume: bool = False  # go on from the newest complete step of --out
    strict: bool = False  # stop at an unreadable image instead of skipping its question
    seed: int = 0  # data order and sampling
    # rationales
    engine: str = "hf"  # hf (transformers) | vllm (in this process, on this GPU) | server (--servers)
    tp: int = 1  # ranks that share one vLLM engine (tensor parallel)
    gpu_memory_utilization: float = 0.5  # share of the GPU that vLLM may use while the trainer waits
    servers: tuple[str, ...] = ()  # base URLs of `vllm serve` processes, for --engine server
    timeout: float = 2700.0  # server: seconds to wait for one whole answer
    prompts_per_step: int = 16  # questions per step, over all ranks
    group_size: int = 8  # rationales per question (G)
    max_prompt_tokens: int = 8192  # questions whose first hop is longer are skipped
    max_new_tokens: int = 72  # tokens of a rationale, and of a reconstruction, at most
    temperature: float = 1.0  # for sampling and for scoring alike
    top_p: float = 1.0  # nucleus sampling
    top_k: int = 0  # 0 = off
    rollout_tokens: int = 65536  # prompt and response tokens generated at once on a rank
    blind: bool = False  # hop 2 without the image
    leak_penalty: float = 0.1  # factor on the agreement of a rationale that leaks
    format_weight: float = 1.0  # weight of the reconstruction's format
    tau: float = 0.9  # annotate: agreement at least, for a rationale to be exported
    # objective
    graded: str = "cot"  # tokens that the reward credits: cot | reconstruction | both
    objective: str = "clip"  # clip | gspo (usual: --clip_low 3e-4 --clip_high 4e-4) | cispo | sapo
    adv_std: bool = True  # divide advantages by the group's standard deviation
    clip_low: float = 0.2  # ratio clipped below 1 - clip_low
    clip_high: float = 0.28  # ratio clipped above 1 + clip_high
    kl_beta: float = 0.0  # weight of the k3 KL to the frozen start model, 0 = no reference model
    loss_mean: str = "token"  # token | sequence (each rollout's mean) | constant (over max_new_tokens)
    is_mode: str = "truncate"  # truncate (each token's weight) | sequence (drop a rollout beyond is_cap)
    is_cap: float = 2.0  # cap of the importance weight trainer / sampler
    max_mismatch: float = 0.0  # nats a token, sampler to trainer, that end the run; 0 = by the dtype
    updates: int = 1  # optimizer updates per batch of rationales
    # optimisation
    steps: int = 20  # batches of rationales
    lr: float = 3e-4  # peak learning rate (2e-6 for Qwen2-VL-2B in the released scripts)
    warmup: int = 2  # steps of linear warm-up
    schedule: str = "constant"  # cosine | linear | constant
    lr_floor: float = 0.1  # final learning rate as a share of the peak (cosine, linear)
    weight_decay: float = 0.0  # AdamW
    max_grad_norm: float = 1.0  # gradient clipping
    token_budget: int = 16384  # padded tokens in a micro-batch; those of long rows count more
    # memory and model
    workers: int = -1  # processes that prepare images, per rank; 0 = none, -1 = by the cores
    max_pixels: int = 1003520  # larger images are scaled down to this many pixels
    freeze_vision: bool = False  # train the language model only
    lora_rank: int = 0  # train adapters of this rank beside the frozen weights, 0 = all weights
    lora_alpha: float = 0.0  # an adapter's output is multiplied by alpha / rank, 0 = by 2
    lora_targets: tuple[str, ...] = ()  # ends of layer names, as regex; none = all of the language model
    gradient_checkpointing: bool = False  # redo activations in backward: less memory, a third more compute
    cpu_offload: bool = False  # keep weights and moments in host memory
    shard_ranks: int = 0  # ranks that share a copy of the weights, a node's say; 0 = all of them
    attn: str = "auto"  # auto | sdpa | flash_attention_2 | flash_attention_3 | flex_attention | eager
    # cadence
    eval_data: str = "data/mini/mood_id.jsonl"  # held-out records, "" = no evaluation
    eval_every: int = 4  # steps between evaluations
    eval_n: int = 200  # held-out questions used
    save_every: int = 20  # steps between checkpoints (one is always written at the end)
    keep: int = 2  # checkpoints kept
    log: str = "off"  # where metrics, samples and flags go as well: off | wandb | tensorboard
    stall: float = 20.0  # end the run when a step takes this many medians (10 minutes at least), 0 = never
    dist_timeout: float = 60.0  # minutes that a rank waits for the others
    perception = "off"  # no flag: grpo.train_on asks


# ----- two hops --------------------------------------------------------------------------------------------


def hop(record, question, images):
    """Another question about a record, already in full: the task's own prompt must not wrap it."""
    question = question if images else question.replace("<image>", "")
    return {"question": question, "images": images, "answer_type": record["answer_type"], "task": "plain"}


def encode_cot(record, processor, dtype, cfg):
    """encode_prompt of hop 1."""
    first = hop(record, cot_prompt(record), record["images"])
    return encode_prompt(first, processor, cfg.max_pixels, cfg.max_prompt_tokens, dtype)


def encode_reconstruction(record, images, text, processor, cfg):
    """encode_prompt of hop 2 without pixels and images: hop 1 has them, they need not travel."""
    second = hop(record, reconstruct_prompt(record, text), images)
    prompt = encode_prompt(second, processor, cfg.max_pixels)
    for name in pixel_names(prompt):
        del prompt[name]
    del prompt["request"]["images"]
    return prompt


def encode_hop(asked, step, records, processor, dtype, cfg):
    """What the workers are asked for: hop 1 of a question, or hop 2 of (question, images, rationale)."""
    if isinstance(asked, int):
        return encode_cot(records[asked], processor, dtype, cfg)
    q, images, text = asked
    return encode_reconstruction(records[q], images, text, processor, cfg)


def with_pixels(prompt, first, blind):
    """What encode_reconstruction left out, put back: it shares the pixels of its hop 1."""
    shown = {} if blind else {name: first[name] for name in pixel_names(first)}
    images = [] if blind else first["request"]["images"]
    return shown | prompt | {"request": prompt["request"] | {"images": images}}


def two_hops(engine, prompts, workers, records, processor, step, cfg):
    """G rationales a question and a reconstruction from each: (rationales, scrubbed texts, reconstructions).

    Three lists of Q * G, those of a question side by side. `prompts` {question: hop 1} gains the prompts of
    hop 2 under (question, sample), which is the `question` of a reconstruction's rollout.
    """
    tokenizer = processor.tokenizer
    keys = [(q, g) for q in list(prompts) for g in range(cfg.group_size)]

    # Hop 1: image and annotation -> rationale.
    seeds = [rollout_seed(cfg, step, q, g) for q, g in keys]
    cots = sample_rollouts(engine, [q for q, _ in keys], prompts, seeds, tokenizer, cfg)

    # What gives the annotation away is taken out, and so is a placeholder that the policy spelled out:
    # it would be read as an image.
    special = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    placeholders = re.compile("|".join(special) or "(?!)")
    texts = [placeholders.sub(" ", scrub(cot.text, records[cot.question])) for cot in cots]

    # Hop 2: image and scrubbed rationale -> annotation.
    asked = []
    for (q, _), text in zip(keys, texts):
        images = [] if cfg.blind else prompts[q]["request"]["images"]
        asked.append((q, images, text))
    [drawn] = workers.prepared([asked], step)
    for (q, g), (_, prompt) in zip(keys, drawn):
        if isinstance(prompt, ValueError):
            raise prompt
        prompts[q, g] = with_pixels(prompt, prompts[q], cfg.blind)
    seeds = [rollout_seed(cfg, step, q, f"{g}/reconstruction") for q, g in keys]
    reconstructions = sample_rollouts(engine, keys, prompts, seeds, tokenizer, cfg)
    return cots, texts, reconstructions


def score_rationales(cots, texts, reconstructions, records, cfg):
    """Rows (question, sample, parts of the reward) of what two_hops returns."""
    rows = []
    for cot, text, reconstruction in zip(cots, texts, reconstructions):
        q, g = reconstruction.question
        rows.append((q, g, score_rationale(cot, text, reconstruction, records[q], cfg)))
    return rows


def score_rationale(cot, text, reconstruction, record, cfg):
    """The reward of a rationale and what it is made of, as rationales.jsonl has them."""
    whole = f"<think> {text} </think> {reconstruction.text}"
    leaked = leaks(cot.text, record)  # in the rationale as it was sampled, before scrubbing
    agrees = agreement(whole, record)
    form = REWARDS[format_name(record)](whole, record)
    reward = agrees * (cfg.leak_penalty if leaked else 1) + cfg.format_weight * form
    if cot.truncated or not text.strip():
        reward = 0.0
    return {"cot": cot.text, "rationale": text, "reconstruction": reconstruction.text, "reward": reward,
            "agreement": agrees, "format": form, "leaks": leaked, "parsed": is_parsed(whole, record),
            "truncated": cot.truncated, "tokens": len(cot.response)}


def format_name(record):
    """The format reward of a record: probabilities must add up, a single box must be flat."""
    kinds = {"distribution": "distribution_format", "ground": "grounding_format"}
    return kinds.get(record.get("task")) or kinds.get(record["answer_type"], "format")


def is_parsed(response, record):
    """Whether an answer could be read, right or wrong."""
    if record["answer_type"] == "boxes":
        return bool(parse_boxes(response))
    if record["answer_type"] == "distribution":
        return parse_distribution(response, gold_distribution(record)) is not None
    return extract_answer(response) is not None


# ----- the log ---------------------------------------------------------------------------------------------


def gathered(rows, questions):
    """All ranks' rows (question, sample, parts), in the order of `questions`. Collective."""
    place_of = {q: place for place, q in enumerate(questions)}
    return sorted(itertools.chain.from_iterable(gather(rows)), key=lambda row: (place_of[row[0]], row[1]))


def write_rationales(log, step, rows, records):
    """Append the step's rationales to rationales.jsonl with the records they are about, images as paths."""
    if log.rank > 0:
        return

    def path_of(image):
        return image if isinstance(image, str) else str((log.out / save_image(image, log.out)).resolve())

    kept = {}
    for q in dict.fromkeys(q for q, _, _ in rows):
        kept[q] = {name: value for name, value in records[q].items() if name != "response"}
        kept[q]["images"] = [path_of(image) for image in records[q]["images"]]
    lines = [{"step": step, "sample": g, **parts, "record": kept[q]} for q, g, parts in rows]
    log.write("rationales.jsonl", lines)


def quality(rows):
    """Means over the rationales of all ranks, of which there may be none."""
    def mean(value):
        return sum(value(parts) for _, _, parts in rows) / max(1, len(rows))

    return {"reward/mean": mean(lambda p: p["reward"]),
            "reward/agreement": mean(lambda p: p["agreement"]),
            "reward/format": mean(lambda p: p["format"]),
            "cot/leaks": mean(lambda p: bool(p["leaks"])),
            "cot/empty": mean(lambda p: not p["rationale"].strip()),
            "reconstruction/parsed": mean(lambda p: p["parsed"]),
            "len/mean": mean(lambda p: p["tokens"]),
            "len/truncated": mean(lambda p: p["truncated"])}


def group_metrics(rows, group_size):
    """How the rewards of a group differ; `rows` are of all ranks."""
    rewards = torch.tensor([parts["reward"] for _, _, parts in rows]).view(-1, group_size)  # (Q, G)
    differing = (rewards != rewards[:, :1]).any(1).float()
    effective = differing.mean().nan_to_num().item()
    return {"reward/std": rewards.std(1).mean().nan_to_num().item(),
            "groups/effective_frac": effective, "groups/zero_adv_frac": 1 - effective}


def evaluate(engine, records, prompts, share, workers, processor, cfg):
    """Both hops once on held-out records, sharded over ranks: agreement, leaks and length.

    records: all, as numbered by encode_share, which gives prompts and share. What cannot be read counts as 0.
    Sampled as in training, since it is samples that --phase annotate keeps.
    """
    once = dataclasses.replace(cfg, group_size=1)
    hops = two_hops(engine, dict(prompts), workers, records, processor, 0, once)
    rows = score_rationales(*hops, records, cfg)
    agrees = sum(parts["agreement"] for _, _, parts in rows)
    leaky = sum(bool(parts["leaks"]) for _, _, parts in rows)
    length = sum(parts["tokens"] for _, _, parts in rows)
    agrees, leaky, length, n = global_sum([agrees, leaky, length, share])
    return {"eval/agreement": agrees / n, "eval/leaks": leaky / n, "eval/len": length / n}


# ----- annotate: filter and export -------------------------------------------------------------------------


def read_rationales(path):
    """Lines of a rationales.jsonl; a last one that was cut off is left out. Raises ValueError."""
    rows = complete_rows(path)
    for number, row in enumerate(rows, 1):
        missing = {"record", "rationale", "reward", "agreement", "leaks", "truncated"} - row.keys()
        if missing:
            raise ValueError(f"{path} line {number}: no {sorted(missing)[0]!r}; is it from rise.py?")
        check_record(row["record"], f"{path} line {number}")
    return rows


def sft_response(row):
    """What SFT learns: the rationale, then the gold annotation, not the reconstruction."""
    return f"<think> {row['rationale']} </think> <answer> {row['record']['answer']} </answer>"


def refusal(row, tau):
    """Why a rationale is not worth learning, "" if it is."""
    if row["leaks"]:
        return "leak"
    if row["truncated"] or not row["rationale"].strip():
        return "cut off or empty"
    if row["agreement"] < tau:
        return f"below --tau {tau}"
    response, record = sft_response(row), row["record"]
    if accuracy(response, record) < 1 or format_think_answer(response, record) < 1:
        return "unreadable as a response"
    return ""


def best_of(rows, tau):
    """SFT records of each record's best rationale, and a count of what was left out and why.

    Best by reward, then agreement, then the shorter rationale, then the first in the file.
    """
    best = {}  # record id -> (rank, row)
    reasons = Counter()
    for row in rows:
        reason = refusal(row, tau)
        if reason:
            reasons[reason] += 1
            continue
        reasons["not the best"] += 1  # all but one of each record, see below
        rank = (row["reward"], row["agreement"], -len(row["rationale"]))
        name = row["record"]["id"]
        if name not in best or rank > best[name][0]:
            best[name] = rank, row
    reasons["not the best"] -= len(best)
    kept = [row["record"] | {"response": sft_response(row)} for _, row in best.values()]
    return kept, reasons


def sample_all(cfg, source, rank, world, device):
    """Sample G rationales of every record into `source`, from where an earlier run stopped.

    Returns whether all are there; SIGTERM or Ctrl-C end it after a step, to be resumed.
    """
    if rank == 0 and Path(cfg.out).is_dir():
        claim(cfg.out)
    if cfg.resume and source.exists():
        check_same_run(cfg)
    records = read_records(cfg.data)
    model = resolve_model(cfg.model)
    steps = math.ceil(len(records) / cfg.prompts_per_step)
    cfg = dataclasses.replace(cfg, steps=steps)
    processor = AutoProcessor.from_pretrained(model)
    encode = functools.partial(encode_hop, records=records, processor=processor, dtype=compute_dtype(device),
                               cfg=cfg)
    workers = Workers(encode, cfg.workers)
    engine = build_engine(model, processor, cfg, device)
    begun = read_rationales(source) if rank == 0 and cfg.resume else []
    # The last step may have been cut short.
    done = int(global_max(begun[-1]["step"] - 1 if begun else 0))
    log = RunLog(cfg, done)

    everything = list(range(len(records)))
    order = []
    for start in range(done * cfg.prompts_per_step, len(records), cfg.prompts_per_step):
        order.append(everything[start:start + cfg.prompts_per_step])
    shares = [questions[rank::world] for questions in order]
    drawn_ahead = workers.prepared(shares)
    log.note(f"{len(records)} records; images are prepared by {len(workers.crew)} process(es) a rank")
    stopping = catch_signals()
    for step, questions, drawn in zip(itertools.count(done + 1), order, drawn_ahead):
        prompts = readable(drawn, records, cfg.strict, log)
        hops = two_hops(engine, prompts, workers, records, processor, step, cfg)
        rows = gathered(score_rationales(*hops, records, cfg), questions)
        write_rationales(log, step, rows, records)
        log.step(step, quality(rows), shown=("reward/mean", "reward/agreement", "cot/leaks"))
        if global_sum([len(stopping)])[0] and step < steps:
            log.note(f"interrupted: {step} of {steps} steps are in {source}; go on with --resume")
            return False
    log.bar.close()
    return True


def annotate(cfg, rank, world, device):
    """Sample G rationales of every record, then write the best ones as SFT records, to OUT/sft.jsonl.

    A --data named rationales.jsonl has been sampled already, perhaps in training, and is filtered only.
    """
    source = Path(cfg.data)
    complete = True
    if source.name != "rationales.jsonl":
        source = Path(cfg.out) / "rationales.jsonl"
        complete = sample_all(cfg, source, rank, world, device)
    if rank == 0 and complete:
        rows = read_rationales(source)
        kept, reasons = best_of(rows, cfg.tau)
        total = len({row["record"]["id"] for row in rows})
        why = ", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items()))
        counts = f"{len(kept)} of {total} records; left out of {len(rows)} rationales: {why}"
        path = Path(cfg.out) / "sft.jsonl"
        write_records(path, check_records(kept, f"{source} ({counts})", need=("answer", "response")))
        print(f"{path}: {counts}")
    if cfg.engine != "vllm":  # vLLM takes the process group down itself when Python exits
        dist.destroy_process_group()


# ----- the run ---------------------------------------------------------------------------------------------


def check(cfg):
    """Refuse what cannot work. Raises ValueError naming the flag."""
    check_engine(cfg)
    check_at_least(-1, cfg, "workers")
    check_at_least(1, cfg, "steps", "prompts_per_step", "group_size", "max_prompt_tokens", "max_new_tokens",
                   "rollout_tokens", "updates", "tp", "token_budget", "eval_every", "eval_n", "save_every",
                   "keep")
    if cfg.phase == "cot" and cfg.group_size < 2:
        raise ValueError("--group_size must be at least 2: the advantage compares the rationales of a group")
    if not 0 <= cfg.tau <= 1:
        raise ValueError(f"--tau {cfg.tau}: agreement lies between 0 and 1")


def main(cfg):
    """Train the rationales, or annotate. A training step has nine beats, those of grpo.py, numbered below."""
    rank, world, device = init_distributed(cfg.dist_timeout)
    end_on_signals()
    usual = {"cot": ("out/talk", "out/rise"), "annotate": ("out/rise", "out/annotate")}
    model, out = usual[cfg.phase]
    cfg = dataclasses.replace(cfg, model=cfg.model or model, out=cfg.out or out)
    with one_line_errors():
        check(cfg)
        if cfg.phase == "annotate":
            return annotate(cfg, rank, world, device)
        run = open_run(cfg, device, need=("answer",))
        everything = run.records + run.held_out
        dtype = run.policy.compute_dtype
        encode = functools.partial(encode_hop, records=everything, processor=run.processor, dtype=dtype,
                                   cfg=cfg)
        workers = Workers(encode, cfg.workers)
        engine = build_engine(run.origin, run.processor, cfg, device)
        dummy = blank_prompt(run.processor, cfg.max_pixels, dtype)
        log = RunLog(cfg, run.done)
    policy, processor, optimizer, records = run.policy, run.processor, run.optimizer, run.records
    tokenizer = processor.tokenizer
    reference = None
    if cfg.kl_beta:  # with LoRA the policy is its own: train_on turns the adapters off
        reference = policy if cfg.lora_rank else load_policy(run.origin, cfg, device, trainable=False)[0]
    sync_weights(policy, engine)
    log.note(f"{len(records)} records; a step: {cfg.prompts_per_step} x {cfg.group_size} rationales "
             f"on {world} rank(s); images are prepared by {len(workers.crew)} process(es) a rank")
    encode_record = functools.partial(encode_cot, processor=run.processor, dtype=dtype, cfg=cfg)
    few = check_rows(records, encode_record, log)
    with refusing(policy.config.model_type, log):
        worst_mismatch = check_run(policy, optimizer, engine, few, dummy, log, cfg)
    if reference:
        reference.packs = policy.packs
    held_out, share = encode_share(run, workers)
    if run.held_out and not run.done:
        before = evaluate(engine, everything, held_out, share, workers, processor, cfg)
        log.write("metrics.jsonl", [{"step": 0, **before}])
        log.note(f"before training: agreement {before['eval/agreement']:.3f} "
                 f"on {len(run.held_out)} held-out records")

    order = data_order(len(records), cfg.prompts_per_step, run.done, cfg.steps, cfg.seed)
    shares = [questions[rank::world] for questions in order]
    drawn_ahead = workers.prepared(shares)
    stopping = catch_signals()
    watchdog, watch = Watchdog(cfg.stall), Stopwatch()
    for step, questions, drawn in zip(itertools.count(run.done + 1), order, drawn_ahead):
        watch.lap("time/data")

        # 1. draw this rank's questions; their images were prepared in the background
        prompts = readable(drawn, records, cfg.strict, log)
        usable, unreadable = global_sum([len(prompts), len(drawn) - len(prompts)])
        if not usable:
            log.fail(f"step {step}: none of its {len(questions)} questions can be used; see the lines above")
        if step == run.done + 1 and prompts:
            first = next(iter(prompts.values()))
            log.note("first prompt: " + tokenizer.decode(first["input_ids"][0]))

        # 2. generate G rationales of each, and reconstruct the annotation from every one
        cots, texts, reconstructions = two_hops(engine, prompts, workers, records, processor, step, cfg)
        sleep_engine(engine)
        watch.lap("time/gen")
        if step == run.done + 1 and reconstructions:
            first = prompts[reconstructions[0].question]
            log.note("first prompt of hop 2: " + tokenizer.decode(first["input_ids"][0]))

        # 3. score
        own_rows = score_rationales(cots, texts, reconstructions, records, cfg)
        rows = gathered(own_rows, questions)
        watch.lap("time/score")

        # 4. advantages within each group, the same for a rationale and its reconstruction
        rewards = torch.tensor([parts["reward"] for _, _, parts in own_rows])
        rewards = rewards.view(-1, cfg.group_size)  # (Q, G)
        advantages = group_advantages(rewards, cfg.adv_std)
        for cot, reconstruction, advantage in zip(cots, reconstructions, advantages.flatten().tolist()):
            cot.advantage = reconstruction.advantage = advantage

        # 5. the tokens that are graded, in the update that their question belongs to
        choices = {"cot": [cots], "reconstruction": [reconstructions], "both": [cots, reconstructions]}
        graded = choices[cfg.graded]
        place_of = {q: place for place, q in enumerate(questions)}
        per_update = [[] for _ in range(cfg.updates)]
        for rollouts in graded:
            for cot, r in zip(cots, rollouts):
                number = which_update(place_of[cot.question], len(questions), cfg.updates)
                per_update[number].append(r)

        loads = {}
        if cfg.graded == "cot":  # the prompt of a reconstruction is not one that another rank could encode
            per_update, loads, _ = balance(per_update, prompts, cfg)
        trained = [r for r in itertools.chain.from_iterable(per_update) if has_gradient(r, cfg)]
        encoded = encoded_here(trained, prompts, records, workers, step, log)

        # 6. update
        totals = train_on(per_update, policy, reference, optimizer, encoded, dummy, step, log, cfg)
        watch.lap("time/train")

        # 7. hand the new weights to the sampler
        sync_weights(policy, engine)
        watch.lap("time/sync")

        # 8. log; every rationale is kept, for --phase annotate
        write_rationales(log, step, rows, records)
        metrics = quality(rows) | group_metrics(rows, cfg.group_size)
        metrics |= update_metrics(totals, MEASURED, cfg)
        tokens = global_sum([sum(map(len, cots + reconstructions)), sum(map(len, trained))])
        metrics["tokens/gen"], metrics["tokens/train"] = tokens
        metrics["data/unreadable"] = unreadable
        stop_now = global_sum([len(stopping)])[0]
        metrics |= {**loads, "optim/lr": lr_at(step, cfg), **watch.laps, "time/step": watch.total(),
                    "mem/peak_gb": peak_memory(device), "mem/host_gb": host_memory()}
        end_if_mismatched(step, metrics, worst_mismatch, log)

        # 9. evaluate and save
        if run.held_out and (step % cfg.eval_every == 0 or step == cfg.steps):
            metrics |= evaluate(engine, everything, held_out, share, workers, processor, cfg)
            log.note(f"step {step}: agreement {metrics['eval/agreement']:.3f} "
                     f"on {len(run.held_out)} held-out records, {100 * metrics['eval/leaks']:.1f} % leak")
        log.step(step, metrics, shown=("reward/mean", "reward/agreement", "cot/leaks", "eval/agreement"))
        if step % cfg.save_every == 0 or step == cfg.steps or stop_now:
            with one_line_errors():
                save_checkpoint(cfg, step, policy, processor, optimizer,
                                wait=stop_now or step == cfg.steps)
        if stop_now:
            log.note(f"interrupted: saved step {step}; go on with --resume")
            break
        watchdog.step()
        watch = Stopwatch()
    watchdog.done()
    if cfg.engine != "vllm":
        dist.destroy_process_group()


if __name__ == "__main__":
    main(parse_config(Config))
