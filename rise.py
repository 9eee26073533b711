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
import importlib.util
import itertools
import math
import re
import resource
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from torch.distributed.tensor import DTensor
from transformers import AutoProcessor

from rewards import (REWARDS, accuracy, agreement, cot_prompt, extract_answer, format_think_answer,
                     gold_distribution, leaks, parse_boxes, parse_distribution, reconstruct_prompt, scrub)
from data_prep import (check_record, check_records, complete_rows, newest_step, parse_config, read_records,
                       resolve_model, save_image, write_records)
from sft import (RunLog, collate, describe, encode_prompt, global_max, global_sum, init_distributed,
                 load_checkpoint, load_policy, lr_at, make_optimizer, micro_batches, prepared,
                 save_checkpoint, schedule)
from eval import Server, build_engine, generate
from grpo import Rollout, all_logprobs, group_advantages, grpo_loss, rollout_seed, sleep_engine, sync_weights


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
    adv_std: bool = True  # divide advantages by the group's standard deviation
    clip_low: float = 0.2  # ratio clipped below 1 - clip_low
    clip_high: float = 0.28  # ratio clipped above 1 + clip_high
    kl_beta: float = 0.0  # weight of the k3 KL to the frozen start model, 0 = no reference model
    loss_mean: str = "token"  # token | sequence
    is_cap: float = 2.0  # cap of the importance weight trainer / sampler
    updates: int = 1  # optimizer updates per batch of rationales
    # optimisation
    steps: int = 20  # batches of rationales
    lr: float = 3e-4  # peak learning rate (2e-6 for Qwen2-VL-2B in the released scripts)
    warmup: int = 2  # steps of linear warm-up
    schedule: str = "constant"  # cosine | linear | constant
    lr_floor: float = 0.1  # final learning rate as a share of the peak (cosine, linear)
    weight_decay: float = 0.0  # AdamW
    max_grad_norm: float = 1.0  # gradient clipping
    token_budget: int = 16384  # padded tokens in a micro-batch
    # memory and model
    workers: int = 1  # processes that prepare images, per rank
    max_pixels: int = 1003520  # larger images are scaled down to this many pixels
    freeze_vision: bool = False  # train the language model only
    param_dtype: str = "fp32"  # weights and AdamW moments: fp32 | bf16
    gradient_checkpointing: bool = False  # redo activations in backward: less memory, a third more compute
    cpu_offload: bool = False  # keep weights and moments in host memory
    attn: str = "sdpa"  # attention: sdpa | flash_attention_2 | flash_attention_3 | flex_attention | eager
    # cadence
    eval_data: str = "data/mini/mood_id.jsonl"  # held-out records, "" = no evaluation
    eval_every: int = 4  # steps between evaluations
    eval_n: int = 200  # held-out questions used
    save_every: int = 20  # steps between checkpoints (one is always written at the end)
    keep: int = 2  # checkpoints kept


# ----- this stage ------------------------------------------------------------------------------------------


def hop(record, question, images):
    """Another question about a record, already in full: the task's own prompt must not wrap it."""
    question = question if images else question.replace("<image>", "")
    return {"question": question, "images": images, "answer_type": record["answer_type"], "task": "plain"}


def encode_cot(record, processor, cfg):
    """encode_prompt of hop 1. Raises ValueError beyond --max_prompt_tokens: no prompt is ever cut."""
    prompt = encode_prompt(hop(record, cot_prompt(record), record["images"]), processor, cfg.max_pixels)
    if (length := prompt["input_ids"].shape[1]) > cfg.max_prompt_tokens:
        raise ValueError(f"its prompt has {length} tokens, --max_prompt_tokens is {cfg.max_prompt_tokens}")
    return prompt


def readable(drawn, records, log, cfg):
    """{question: prompt} of what could be encoded; the rest is named, or ends the run with --strict."""
    prompts = {q: prompt for q, prompt in drawn if not isinstance(prompt, ValueError)}
    for q, error in drawn:
        if q not in prompts:
            if cfg.strict:
                log.fail(error)
            log.note(f"question {records[q]['id']} skipped: {error}")
    return prompts


def sample(engine, keys, prompts, seeds, tokenizer, cfg):
    """One rollout for each key of `prompts`."""
    samples = generate(engine, [prompts[key] for key in keys], seeds, cfg)
    texts = tokenizer.batch_decode([ids for ids, _, _ in samples], skip_special_tokens=True)
    return [Rollout(key, *drawn, text) for key, drawn, text in zip(keys, samples, texts)]


def two_hops(engine, prompts, records, processor, step, cfg):
    """G rationales a question and a reconstruction from each: (rationales, scrubbed texts, reconstructions).

    Three lists of Q * G, those of a question side by side. `prompts` {question: hop 1} gains the prompts of
    hop 2 under (question, sample), which is the `question` of a reconstruction's rollout.
    """
    asked = [(q, g) for q in prompts for g in range(cfg.group_size)]
    tokenizer, seed = processor.tokenizer, functools.partial(rollout_seed, cfg, step)
    cots = sample(engine, [q for q, _ in asked], prompts, [seed(q, g) for q, g in asked], tokenizer, cfg)
    # A placeholder that the policy spelled out would be read as an image.
    special = [re.escape(t.content) for t in tokenizer.added_tokens_decoder.values() if t.special]
    texts = [re.sub("|".join(special) or "(?!)", " ", scrub(cot.text, records[cot.question])) for cot in cots]
    for (q, g), text in zip(asked, texts):
        images = [] if cfg.blind else prompts[q]["request"]["images"]
        second = hop(records[q], reconstruct_prompt(records[q], text), images)
        prompts[q, g] = encode_prompt(second, processor, cfg.max_pixels)
    seeds = [seed(q, f"{g}/reconstruction") for q, g in asked]
    return cots, texts, sample(engine, asked, prompts, seeds, tokenizer, cfg)


def scored(cots, texts, backs, records, cfg):
    """[(question, sample, parts of the reward)] of what two_hops returns."""
    return [(*back.question, score(cot, text, back, records[cot.question], cfg))
            for cot, text, back in zip(cots, texts, backs)]


def score(cot, text, back, record, cfg):
    """The reward of a rationale and what it is made of, as rationales.jsonl has them."""
    whole, said = f"<think> {text} </think> {back.text}", leaks(cot.text, record)
    agrees, form = agreement(whole, record), REWARDS[format_name(record)](whole, record)
    worth = agrees * (cfg.leak_penalty if said else 1) + cfg.format_weight * form
    return {"cot": cot.text, "rationale": text, "reconstruction": back.text,
            "reward": worth if text.strip() and not cot.truncated else 0.0,
            "agreement": agrees, "format": form, "leaks": said, "parsed": is_parsed(whole, record),
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


def gathered(rows, questions):
    """All ranks' (question, sample, parts), in the order of `questions`. Collective."""
    shares, place = [None] * dist.get_world_size(), {q: j for j, q in enumerate(questions)}
    dist.all_gather_object(shares, rows)
    return sorted(itertools.chain(*shares), key=lambda row: (place[row[0]], row[1]))


def write_rationales(log, step, rows, records):
    """Append the step's rationales to rationales.jsonl with the records they are about, images as paths."""
    def path(ref):
        return ref if isinstance(ref, str) else str((log.out / save_image(ref, log.out)).resolve())

    if log.rank == 0:
        kept = {q: {k: v for k, v in records[q].items() if k != "response"} for q, *_ in rows}
        kept = {q: record | {"images": [path(ref) for ref in record["images"]]} for q, record in kept.items()}
        log.write("rationales.jsonl", [{"step": step, "sample": g, **parts, "record": kept[q]}
                                       for q, g, parts in rows])


def update(policy, optimizer, rollouts, denominator, prompts, dummy, cfg):
    """One optimizer step on this rank's rollouts, of either hop.

    denominator: the global count of tokens (or rollouts) in the policy loss. Fills in missing old_logps: this
    very policy sampled those rollouts.
    """
    device, stats = policy.banned.device, {}
    lengths = [prompts[r.question]["input_ids"].shape[1] + len(r.response) for r in rollouts]
    for group in micro_batches(lengths, cfg.token_budget):
        rows = [rollouts[i] for i in group]
        inputs, mask = collate([(prompts[r.question], r.response) for r in rows], dummy, 0, device)

        def spread(parts):  # one value a response token -> (B, T-1)
            values = torch.cat([*parts, torch.zeros(0)]).to(device)
            return torch.zeros(mask.shape, device=device).masked_scatter(mask, values)

        logps = policy.token_logprobs(inputs, mask, cfg.temperature)
        for r, own in zip(rows, logps.detach()[mask].cpu().split([len(r.response) for r in rows])):
            r.old_logps = own if r.old_logps is None else r.old_logps
        old = spread([r.old_logps for r in rows])
        sampler = spread([r.sampler_logps for r in rows])
        reference = spread([r.ref_logps for r in rows]) if cfg.kl_beta else None
        advantages = spread([torch.full((len(r.response),), r.advantage) for r in rows])
        ones = [torch.ones(len(r.response)) for r in rows]
        weights = spread([one / (denominator if cfg.loss_mean == "token" else denominator * len(one))
                          for one in ones])
        loss, extra = grpo_loss(logps, old, sampler, reference, advantages, weights, cfg)
        # FSDP averages gradients over ranks; the weights already sum to 1 over all ranks together.
        (loss * dist.get_world_size()).backward()
        gap = (old - sampler)[mask].abs()
        for k, v in {**extra, "gap": gap.sum(), "tokens": mask.sum()}.items():
            stats[k] = stats.get(k, 0.0) + v.item()
        stats["gap_max"] = max([stats.get("gap_max", 0.0), *gap.tolist()])
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
    stats["norm"] = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    if math.isfinite(stats["norm"]):
        optimizer.step()
    optimizer.zero_grad()
    return stats


def quality(rows):
    """Means over the rationales of all ranks, of which there may be none."""
    parts, n = [parts for *_, parts in rows], max(1, len(rows))
    return {"reward/mean": sum(p["reward"] for p in parts) / n,
            "reward/agreement": sum(p["agreement"] for p in parts) / n,
            "reward/format": sum(p["format"] for p in parts) / n,
            "cot/leaks": sum(bool(p["leaks"]) for p in parts) / n,
            "cot/empty": sum(not p["rationale"].strip() for p in parts) / n,
            "reconstruction/parsed": sum(p["parsed"] for p in parts) / n,
            "len/mean": sum(p["tokens"] for p in parts) / n,
            "len/truncated": sum(p["truncated"] for p in parts) / n}


def step_metrics(rows, rollouts, trained, totals, cfg):
    """The step's numbers over all ranks: `rows` are of all, rollouts and totals of this one."""
    rewards = torch.tensor([parts["reward"] for *_, parts in rows]).view(-1, cfg.group_size)  # (Q, G)
    metrics = {**quality(rows), "reward/std": rewards.std(1).mean().nan_to_num().item(),
               "groups/effective_frac": (rewards != rewards[:, :1]).any(1).float().mean().nan_to_num().item()}
    metrics["groups/zero_adv_frac"] = 1 - metrics["groups/effective_frac"]
    keys = ["loss/policy", "loss/clip_low", "loss/clip_high", "loss/kl"]
    metrics |= dict(zip(keys, global_sum([sum(t.get(k, 0.0) for t in totals) / cfg.updates for k in keys])))
    gap, tokens, metrics["tokens/gen"], metrics["tokens/train"] = global_sum(
        [sum(t["gap"] for t in totals), sum(t["tokens"] for t in totals),
         sum(len(r.response) for r in rollouts),
         sum(len(r.response) for r in trained)])
    metrics["mismatch/mean"] = gap / max(1, tokens)
    metrics["mismatch/max"] = global_max(max((t["gap_max"] for t in totals), default=0.0))
    metrics["optim/grad_norm"] = totals[-1]["norm"] if totals else 0.0
    return metrics


def evaluate(engine, records, processor, cfg):
    """Both hops once on held-out records, sharded over ranks: agreement, leaks and length.

    Sampled as in training, since it is samples that --phase annotate keeps.
    """
    share = [list(range(dist.get_rank(), len(records), dist.get_world_size()))]
    encode = functools.partial(encode_cot, processor=processor, cfg=cfg)
    drawn = [pair for batch in prepared(share, lambda i: encode(records[i]), cfg.workers) for pair in batch]
    prompts = {i: prompt for i, prompt in drawn if not isinstance(prompt, ValueError)}  # the rest counts as 0
    once = dataclasses.replace(cfg, group_size=1)
    rows = scored(*two_hops(engine, prompts, records, processor, 0, once), records, cfg)
    parts = [parts for *_, parts in rows]
    agrees, leaky, length, n = global_sum(
        [sum(p["agreement"] for p in parts), sum(bool(p["leaks"]) for p in parts),
         sum(p["tokens"] for p in parts), len(drawn)])
    return {"eval/agreement": agrees / n, "eval/leaks": leaky / n, "eval/len": length / n}


# ----- annotate: filter and export


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
    told = sft_response(row), row["record"]
    return "" if accuracy(*told) == format_think_answer(*told) == 1 else "unreadable as a response"


def best_of(rows, tau):
    """SFT records of each record's best rationale, and a count of what was left out and why.

    Best by reward, then agreement, then the shorter rationale, then the first in the file.
    """
    best, reasons = {}, Counter()
    for row in rows:
        reason, name = refusal(row, tau), row["record"]["id"]
        reasons[reason] += 1
        rank = (row["reward"], row["agreement"], -len(row["rationale"]))
        if not reason and (name not in best or rank > best[name][0]):
            best[name] = rank, row
    reasons["not the best"] = reasons.pop("", 0) - len(best)
    return [row["record"] | {"response": sft_response(row)} for _, row in best.values()], reasons


def annotate(cfg, rank, world, device):
    """Sample G rationales of every record, then write the best ones as SFT records, to OUT/sft.jsonl.

    A --data named rationales.jsonl has been sampled already, perhaps in training, and is filtered only.
    """
    source = Path(cfg.data)
    if source.name != "rationales.jsonl":
        records, first = read_records(cfg.data), resolve_model(cfg.model)
        cfg = dataclasses.replace(cfg, steps=math.ceil(len(records) / cfg.prompts_per_step))
        source, processor = Path(cfg.out) / "rationales.jsonl", AutoProcessor.from_pretrained(first)
        engine = (Server(first, processor, cfg) if cfg.engine == "server"
                  else build_engine(first, processor, cfg, device))
        begun = read_rationales(source) if rank == 0 and cfg.resume else []
        # The last step may have been cut short.
        done = int(global_max(begun[-1]["step"] - 1 if begun else 0))
        log = RunLog(cfg, done)
        plan = [range(len(records))[i:i + cfg.prompts_per_step]
                for i in range(done * cfg.prompts_per_step, len(records), cfg.prompts_per_step)]
        share = prepared([[*drawn[rank::world]] for drawn in plan],
                         lambda i: encode_cot(records[i], processor, cfg), cfg.workers)
        for step, questions, drawn in zip(itertools.count(done + 1), plan, share):
            prompts = readable(drawn, records, log, cfg)
            rows = scored(*two_hops(engine, prompts, records, processor, step, cfg), records, cfg)
            rows = gathered(rows, questions)
            write_rationales(log, step, rows, records)
            log.step(step, quality(rows), ("reward/mean", "reward/agreement", "cot/leaks"))
        log.bar.close()
    if rank == 0:
        rows = read_rationales(source)
        kept, reasons = best_of(rows, cfg.tau)
        counts = (f"{len(kept)} of {len({row['record']['id'] for row in rows})} records; left out of "
                  f"{len(rows)} rationales: {', '.join(f'{n} {why}' for why, n in sorted(reasons.items()))}")
        path = Path(cfg.out) / "sft.jsonl"
        write_records(path, check_records(kept, f"{source} ({counts})", need=("answer", "response")))
        print(f"{path}: {counts}")
    if cfg.engine != "vllm":  # vLLM takes the process group down itself when Python exits
        dist.destroy_process_group()


def check(cfg):
    """Refuse what cannot work. Raises ValueError naming the flag."""
    for flag in ("steps", "prompts_per_step", "group_size", "max_prompt_tokens", "max_new_tokens",
                 "rollout_tokens", "updates", "tp", "token_budget", "eval_every", "eval_n", "save_every",
                 "keep"):
        if getattr(cfg, flag) < 1:
            raise ValueError(f"--{flag} must be at least 1")
    if cfg.phase == "cot" and cfg.group_size < 2:
        raise ValueError("--group_size must be at least 2: the advantage compares the rationales of a group")
    if not 0 <= cfg.tau <= 1:
        raise ValueError(f"--tau {cfg.tau}: agreement lies between 0 and 1")
    if cfg.engine == "vllm" and not importlib.util.find_spec("vllm"):
        raise ValueError("--engine vllm: vLLM is not installed, see requirements-gpu.txt")
    if (cfg.engine == "server") != bool(cfg.servers):
        raise ValueError("--engine server and --servers URL... go together")
    if cfg.tp > 1 and (cfg.engine != "vllm" or dist.get_world_size() % cfg.tp):
        raise ValueError(f"--tp {cfg.tp} needs --engine vllm and a multiple of {cfg.tp} ranks")
    if not 0 < cfg.gpu_memory_utilization <= 1:
        raise ValueError("--gpu_memory_utilization is a share, above 0 and at most 1")
    if cfg.temperature <= 0:
        raise ValueError("--temperature must be above 0: greedy rationales of a group are all the same")


def main(cfg):
    """Train, or annotate. A training step has ten beats, numbered below."""
    rank, world, device = init_distributed()
    try:
        check(cfg)
        usual = {"cot": ("out/talk", "out/rise"), "annotate": ("out/rise", "out/annotate")}[cfg.phase]
        cfg = dataclasses.replace(cfg, model=cfg.model or usual[0], out=cfg.out or usual[1])
        # The default held-out file belongs to the default data.
        eval_data = cfg.eval_data if cfg.data == Config.data or cfg.eval_data != Config.eval_data else ""
        start = newest_step(cfg.out) if cfg.resume else None
        if cfg.phase == "annotate":
            return annotate(cfg, rank, world, device)
        first = resolve_model(cfg.model)
        origin = Path(first).resolve()
        if not cfg.resume and Path(cfg.out).resolve() in [origin, *origin.parents]:
            raise ValueError(f"--out {cfg.out} holds the model to start from: "
                             "name another --out, or --resume")
        records = read_records(cfg.data, need=("answer",))
        held_out = read_records(eval_data, limit=cfg.eval_n) if eval_data else []
        policy, processor = load_policy(start or first, cfg, device)
        optimizer = make_optimizer(policy, cfg)
        done = load_checkpoint(start, policy, optimizer)[0] if start else 0
        engine = (Server(first, processor, cfg) if cfg.engine == "server"
                  else build_engine(first, processor, cfg, device))
        log = RunLog(cfg, done)
    except (ValueError, OSError) as e:
        sys.exit(f"{Path(sys.argv[0]).name}: {str(e).strip().splitlines()[0]}")
    reference = load_policy(first, cfg, device, trainable=False)[0] if cfg.kl_beta else None
    sync_weights(policy, engine)
    blank = {"question": "", "images": [Image.new("RGB", (56, 56))], "answer_type": "text"}
    dummy = encode_prompt(blank, processor, cfg.max_pixels)
    log.note(describe(policy, cfg, (cfg.engine == "hf") + bool(cfg.kl_beta)))
    log.note(f"{len(records)} records; a step: {cfg.prompts_per_step} x {cfg.group_size} rationales "
             f"on {world} rank(s)")
    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    if held_out and not done:
        before = evaluate(engine, held_out, processor, cfg)
        log.write("metrics.jsonl", [{"step": 0, **before}])
        log.note(f"before training: agreement {before['eval/agreement']:.3f} "
                 f"on {len(held_out)} held-out records")

    plan = schedule(len(records), cfg.prompts_per_step, done, cfg.steps, cfg.seed)
    share = prepared([drawn[rank::world] for drawn in plan],
                     lambda i: encode_cot(records[i], processor, cfg), cfg.workers)
    failures = 0
    for step, questions, drawn in zip(itertools.count(done + 1), plan, share):
        clock = [time.time()]

        def tick():
            clock.append(time.time())
            return clock[-1] - clock[-2]

        # 1. draw this rank's questions; their images were prepared in the background
        prompts = readable(drawn, records, log, cfg)
        unreadable = len(drawn) - len(prompts)
        if step == done + 1 and prompts:
            ids = next(iter(prompts.values()))["input_ids"][0]
            log.note("first prompt: " + processor.tokenizer.decode(ids))

        # 2. generate G rationales of each, and reconstruct the annotation from every one
        cots, texts, backs = two_hops(engine, prompts, records, processor, step, cfg)
        sleep_engine(engine)
        seconds = {"time/gen": tick()}
        if step == done + 1 and backs:
            ids = prompts[backs[0].question]["input_ids"][0]
            log.note("first prompt of hop 2: " + processor.tokenizer.decode(ids))

        # 3. score
        mine = scored(cots, texts, backs, records, cfg)
        rows = gathered(mine, questions)
        seconds["time/score"] = tick()

        # 4. advantages within each group, the same for a rationale and its reconstruction
        rewards = torch.tensor([parts["reward"] for *_, parts in mine]).view(-1, cfg.group_size)  # (Q, G)
        advantages = group_advantages(rewards, cfg.adv_std)
        for cot, back, a in zip(cots, backs, advantages.flatten().tolist()):
            cot.advantage = back.advantage = a

        # 5. the tokens that are graded, each with the update it belongs to
        place = {q: j for j, q in enumerate(questions)}
        hops = {"cot": [cots], "reconstruction": [backs], "both": [cots, backs]}[cfg.graded]
        batch = [(place[cot.question] * cfg.updates // len(questions), r)
                 for graded in hops for cot, r in zip(cots, graded)]
        trained = [r for _, r in batch if r.advantage or cfg.kl_beta]

        # 6. logprobs before the updates; with one update they are those of the update itself
        if cfg.updates > 1:
            for r, logps in zip(trained, all_logprobs(policy, trained, prompts, dummy, cfg)):
                r.old_logps = logps
        if reference:
            for r, logps in zip(trained, all_logprobs(reference, trained, prompts, dummy, cfg)):
                r.ref_logps = logps

        # 7. update: slices of questions, cut alike for every number of ranks
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, cfg)
        totals = []
        for u in range(cfg.updates):
            part = [r for update, r in batch if update == u]
            mine = [r for r in part if r.advantage or cfg.kl_beta]
            size = sum(len(r.response) for r in part) if cfg.loss_mean == "token" else len(part)
            denominator, active = global_sum([size, len(mine)])
            if active:
                totals.append(update(policy, optimizer, mine, denominator, prompts, dummy, cfg))
                failures = 0 if math.isfinite(totals[-1]["norm"]) else failures + 1
        if failures >= 3:
            log.fail(f"step {step}: gradient norm not finite {failures} times in a row; "
                     f"the last checkpoint in {cfg.out} is sound, lower --lr")
        seconds["time/train"] = tick()

        # 8. sync
        sync_weights(policy, engine)
        seconds["time/sync"] = tick()

        # 9. log; every rationale is kept, for --phase annotate
        write_rationales(log, step, rows, records)
        metrics = step_metrics(rows, cots + backs, trained, totals, cfg)
        metrics["data/unreadable"], stop_now = global_sum([unreadable, len(stopping)])
        metrics |= {"optim/lr": lr_at(step, cfg), **seconds, "time/step": clock[-1] - clock[0],
                    "mem/peak_gb": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda"
                    else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}

        # 10. evaluate and save
        if held_out and (step % cfg.eval_every == 0 or step == cfg.steps):
            metrics |= evaluate(engine, held_out, processor, cfg)
            log.note(f"step {step}: agreement {metrics['eval/agreement']:.3f} on {len(held_out)} held-out "
                     f"records, {100 * metrics['eval/leaks']:.1f} % leak")
        log.step(step, metrics, ("reward/mean", "reward/agreement", "cot/leaks", "eval/agreement"))
        if step % cfg.save_every == 0 or step == cfg.steps or stop_now:
            save_checkpoint(cfg, step, policy, processor, optimizer)
        if stop_now:
            log.note(f"SIGTERM: saved step {step}; go on with --resume")
            break
    if cfg.engine != "vllm":  # vLLM takes the process group down itself when Python exits
        dist.destroy_process_group()


if __name__ == "__main__":
    main(parse_config(Config))
