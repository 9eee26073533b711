"""Where a GRPO step's time goes, and what one row a question saves: python tests/bench_step.py [--rounds 5]

    shape        prompt, tokens   response, tokens
    mini         38               20 to 40            the mini suite's images
    448 short    about 280        16 to 48            448 x 448 pixels
    448 long     about 280        128 to 256

8 questions with 8 rollouts each, of the tiny model, fp32, one thread. The rewards are drawn at random, so that
every group counts. Each round trains the same rollouts once with a row for each response (the baseline) and
once with a row for each question, in turns; printed are medians, the ratio of each round's two and its spread.
`else` is what a step takes beside sampling, forward and backward: AdamW, weight sync, collation, the log.

With --trl PYTHON, an interpreter that has `trl` and `accelerate`, TRL's GRPOTrainer does a step of the same
shape beside them (tests/trl_step.py); a GPU adds tokens/s and the share of its peak FLOPs.
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
    """Seconds by arm and part, a list over rounds: {"apart": {"update": [...]}, "shared": {...}}."""
    pixels, least, most = SHAPES[shape]
    cfg = dataclasses.replace(run.cfg, max_new_tokens=most, max_pixels=max(run.cfg.max_pixels, pixels ** 2))
    records = at_size(run.records, pixels)
    prompts = {i: sft.encode_prompt(r, run.processor, cfg.max_pixels) for i, r in enumerate(records)}
    banned = set(run.policy.banned.tolist())
    tokens = [i for i in range(10, 300) if i not in banned]
    asked = [q for q in prompts for _ in range(GROUP)]
    found = {"apart": {"update": [], "sample": [], "else": []}, "shared": {"update": [], "sample": [], "else": []}}
    for number in range(rounds + 1):  # the first warms up
        rollouts = invented(least, most, tokens, random.Random(number))
        for arm in ("apart", "shared"):
            run.policy.packs = arm == "shared"
            run.forward.seconds = run.backward.seconds = 0.0
            copies = [dataclasses.replace(r) for r in rollouts]
            began = time.perf_counter()
            grpo.sample_rollouts(run.engine, asked, prompts, list(range(len(asked))), run.processor.tokenizer, cfg)
            sampled = time.perf_counter()
            grpo.train_on([copies], run.policy, None, run.optimizer, prompts, run.dummy, number + 1, run.log, cfg)
            updated = time.perf_counter()
            grpo.sync_weights(run.policy, run.engine)
            ended = time.perf_counter()
            if number:
                parts = found[arm]
                parts["sample"].append(sampled - began)
                parts["update"].append(updated - sampled)
                parts["else"].append(ended - sampled - run.forward.seconds - run.backward.seconds)
    length = prompts[0]["input_ids"].shape[1]
    return length, found


def trl_seconds(python, room, shape, rounds):
    """Seconds of TRL's steps of that shape."""
    done = subprocess.run([python, str(ROOT / "tests/trl_step.py"), str(room), shape, str(rounds)], check=True,
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
    print("| shape | prompt | sampling, s | update, a row a response, s | a row a question, s | times faster | else |\n"
          "|---|---|---|---|---|---|---|", flush=True)
    for shape in SHAPES:
        if args.only not in shape:
            continue
        length, found = measured(run, shape, args.rounds)
        apart, shared = found["apart"], found["shared"]
        ratios = [a / b for a, b in zip(apart["update"], shared["update"])]
        step = median(shared["sample"]) + median(shared["update"])
        cells = [shape, length, f"{median(shared['sample']):.3f}", f"{median(apart['update']):.3f}",
                 f"{median(shared['update']):.3f}", spread(ratios), f"{100 * median(shared['else']) / step:.0f} %"]
        print("|", " | ".join(map(str, cells)), "|", flush=True)
        if args.trl:
            theirs = trl_seconds(args.trl, room, shape, args.rounds)
            print(f"  TRL {theirs['version']}: {median(theirs['seconds']):.3f} s a step, "
                  f"{median(theirs['seconds']) / step:.2f} times ours", flush=True)


if __name__ == "__main__":
    main()
