"""TRL's side of bench_step.py: ROOM PIXELS TOKENS ROUNDS; prints {"version", "seconds": [of each step]}.

Runs under an interpreter that has trl and accelerate: the same tiny model, questions, images and group size,
rewards drawn at random, one thread, fp32, no KL term.
"""
import json
import random
import sys
import time
from pathlib import Path

import datasets
import torch
import transformers
import trl
from PIL import Image

QUESTIONS, GROUP = 8, 8


def main():
    room, pixels, tokens, rounds = Path(sys.argv[1]), *map(int, sys.argv[2:])
    torch.set_num_threads(1)
    records = [json.loads(line) for line in (room / "data/counting_train.jsonl").read_text().splitlines()]
    rows = []
    for record in records[:QUESTIONS]:
        image = Image.open(room / "data" / record["images"][0]).convert("RGB")
        if pixels:
            image = image.resize((pixels, pixels))
        rows.append({"prompt": [{"role": "user", "content": record["question"]}], "image": image})
    data = datasets.Dataset.from_list(rows)
    cfg = trl.GRPOConfig(
        output_dir=str(room / "trl"), per_device_train_batch_size=QUESTIONS * GROUP, num_generations=GROUP,
        max_completion_length=tokens, max_steps=rounds + 1, learning_rate=1e-6, beta=0.0, bf16=False,
        use_cpu=True, gradient_checkpointing=False, report_to=[], save_strategy="no", logging_steps=10**6,
        disable_tqdm=True)

    def drawn(completions, **_):
        return [random.random() for _ in completions]

    ends = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    processor = transformers.AutoProcessor.from_pretrained(room / "tiny")
    model = transformers.AutoModelForImageTextToText.from_pretrained(room / "tiny", dtype=torch.float32)
    trainer = trl.GRPOTrainer(model=model, reward_funcs=drawn, args=cfg, train_dataset=data,
                              processing_class=processor, callbacks=[Clock()])
    trainer.train()
    seconds = [b - a for a, b in zip(ends, ends[1:])]  # the first step warms up
    print(json.dumps({"version": trl.__version__, "seconds": seconds}))


if __name__ == "__main__":
    main()
