"""Where a GRPO step's time goes, and what one row a question saves: python tests/bench_step.py [--rounds 5]

    shape        prompt, tokens   response, tokens
    mini         38               20 to 40            the mini suite's images
    448 short    about 280        16 to 48            448 x 448 pixels
    448 long     about 280        128 to 256

8 questions with 8 rollouts each, of the tiny model, fp32, one thread. The rewards are drawn at random, so
that every group counts. Each round trains the same invented rollouts once with a row for each response (the
baseline) and once with a row for each question, in turns; printed are medians, the ratio of each round's two
and its spread. Then it does a whole step, sampling, update and weight sync, on what the random model samples:
nearly always the longest that is allowed. `else` is what is neither sampling nor forward nor backward: AdamW,
sync, collation.

With --trl PYTHON, an interpreter that has `trl` and `accelerate`, TRL's GRPOTrainer does whole steps of the
same shape in a process of its own, after ours (bench_step_trl.py).
"""
import argparse
import dataclasses
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import data_prep  # noqa: E402
import rewards  # noqa: E402
import sft
import eval as evaluation
import grpo  # noqa: E402

QUESTIONS, GROUP = 8, 8
SHAPES = {"mini": (0, 20, 40), "448 short": (448, 16, 48), "448 long": (448, 128, 256)}  # pixels, least, most


def make_room(root):
    """The mini suite's counting questions, the same with large images, and the tiny model."""
    data_prep.make_mini(root / "data", 0, sizes={"train": 64, "id": 2, "ood": 2, "left": 2, "right": 2})
    records = data_prep.read_records(root / "data/counting_train.jsonl")
    texts = [text for r in records for text in (rewards.build_prompt(r), r["response"])]
    data_prep.make_tiny(root / "tiny", texts, 0)
    return records


def at_size(records, pixels):
    """Records with their image scaled to a square of `pixels`; 0 leaves it."""
    scaled = []
    for record in records[:QUESTIONS]:
        if pixels:
            image = Image.open(record["images"][0]).convert("RGB").resize((pixels, pixels))
            record = dict(record, images=[image])
        scaled.append(record)
    return scaled


def invented(least, most, tokens, chance):
    """A group of rollouts with random tokens, lengths and advantages for each question."""
    rollouts = []
    for question in range(QUESTIONS):
        drawn = torch.tensor([[chance.random() for _ in range(GROUP)]])
        for advantage in grpo.group_advantages(drawn)[0].tolist():
            ids = chance.choices(tokens, k=chance.randint(least, most))
            logps = torch.full((len(ids),), -5.0)
            rollouts.append(grpo.Rollout(question, ids, logps, False, "", advantage=advantage))
    return rollouts


class Clock:
    """Seconds spent in a function, over all its calls."""

    def __init__(self, owner, name):
        self.seconds = 0.0
        called = getattr(owner, name)

        def timed(*args, **kwargs):
            began = time.perf_counter()
            try:
                return called(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        setattr(owner, name, timed)


def measured(run, shape, rounds):
    """(prompt tokens, seconds over rounds by what was done):
    updates of both arms, and a whole step's parts.
    """
    pixels, least, most = SHAPES[shape]
    cfg = dataclasses.replace(run.cfg, max_new_tokens=most, max_pixels=max(run.cfg.max_pixels, pixels ** 2))
    records = at_size(run.records, pixels)
    prompts = {i: sft.encode_prompt(r, run.processor, cfg.max_pixels) for i, r in enumerate(records)}
    banned = set(run.policy.banned.tolist())
    tokens = [i for i in range(10, 300) if i not in banned]
    asked = [q for q in prompts for _ in range(GROUP)]
    found = {"apart": [], "shared": [], "sampling": [], "step": [], "else": []}

    def update(rollouts, number):
        began = time.perf_counter()
        grpo.train_on([rollouts], run.policy, None, run.optimizer, prompts, run.dummy, number, run.log, cfg)
        return time.perf_counter() - began

    for number in range(rounds + 1):
        chance = random.Random(number)
        rollouts = invented(least, most, tokens, chance)
        for arm in ("apart", "shared"):
            run.policy.packs = arm == "shared"
            copies = [dataclasses.replace(r) for r in rollouts]
            found[arm].append(update(copies, number + 1))

        run.forward.seconds = run.backward.seconds = 0.0
        began = time.perf_counter()
        sampled = grpo.sample_rollouts(run.engine, asked, prompts, range(len(asked)),
                                       run.processor.tokenizer, cfg)
        found["sampling"].append(time.perf_counter() - began)
        drawn = torch.tensor([[chance.random() for _ in range(GROUP)] for _ in range(QUESTIONS)])
        for r, advantage in zip(sampled, grpo.group_advantages(drawn).flatten().tolist()):
            r.advantage = advantage
        update(sampled, number + 1)
        grpo.sync_weights(run.policy, run.engine)
        found["step"].append(time.perf_counter() - began)
        known = found["sampling"][-1] + run.forward.seconds + run.backward.seconds
        found["else"].append(found["step"][-1] - known)
    length = prompts[0]["input_ids"].shape[1]
    return length, {name: seconds[1:] for name, seconds in found.items()}  # the first round warms up


def trl_seconds(python, room, shape, rounds):
    """Seconds of TRL's steps of that shape."""
    pixels, _, most = SHAPES[shape]
    script = ROOT / "tests/bench_step_trl.py"
    done = subprocess.run([python, script, room, str(pixels), str(most), str(rounds)], check=True,
                          capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def spread(values):
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--trl", default="", help="Python that has trl")
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    _, _, device = sft.init_distributed()
    torch.set_num_threads(1)
    room = Path(tempfile.mkdtemp())
    records = make_room(room)
    cfg = grpo.Config(group_size=GROUP, prompts_per_step=QUESTIONS, lr=1e-6)
    policy, processor = sft.load_policy(str(room / "tiny"), cfg, device)
    run = SimpleNamespace(cfg=cfg, records=records, policy=policy, processor=processor, log=None,
                          engine=evaluation.build_engine(str(room / "tiny"), processor, cfg, device),
                          optimizer=sft.make_optimizer(policy, cfg),
                          dummy=sft.blank_prompt(processor, cfg.max_pixels))
    run.forward, run.backward = Clock(policy, "token_logprobs"), Clock(torch.Tensor, "backward")
    print("| shape | prompt | update, a row a response, s | a row a question, s | times faster | step, s "
          "| of it sampling, s | else |\n|---|---|---|---|---|---|---|---|", flush=True)
    for shape in SHAPES:
        if args.only not in shape:
            continue
        length, found = measured(run, shape, args.rounds)
        ratios = [a / b for a, b in zip(found["apart"], found["shared"])]
        seconds = {name: median(values) for name, values in found.items()}
        step = seconds["step"]
        cells = [shape, length, f"{seconds['apart']:.3f}", f"{seconds['shared']:.3f}", spread(ratios),
                 f"{step:.3f}", f"{seconds['sampling']:.3f}", f"{100 * seconds['else'] / step:.0f} %"]
        print("|", " | ".join(map(str, cells)), "|", flush=True)
        if args.trl:
            theirs = trl_seconds(args.trl, room, shape, args.rounds)
            print(f"  TRL {theirs['version']}: {median(theirs['seconds']):.3f} s a step, "
                  f"{median(theirs['seconds']) / step:.2f} times ours", flush=True)


if __name__ == "__main__":
    main()
