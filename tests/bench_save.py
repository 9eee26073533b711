"""How long a run waits for a checkpoint, with and without the files:
[torchrun ...] tests/bench_save.py [--folder F]

A random Qwen2-VL of 201M parameters in fp32 with AdamW's moments, 2.4 GB a checkpoint, in a new folder of F
(default: the temporary one). Seconds of save_checkpoint, and until the checkpoint is complete; median of 3.
"""
import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
import conftest as tiny  # noqa: E402
import torch  # noqa: E402
import transformers as hf  # noqa: E402

import sft  # noqa: E402

WIDTH = 1024


def make_model(folder):
    """Save a Qwen2-VL whose language model has 12 layers, WIDTH units and 32,000 words, untied."""
    tok = tiny.tokenizer()
    rope = tiny.ROPE | {"mrope_section": [16, 24, 24]}
    text = tiny.text_config(tok, vocab_size=32000, hidden_size=WIDTH, intermediate_size=2816,
                            num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=2, head_dim=128,
                            rope_parameters=rope)
    vision = dict(depth=2, embed_dim=32, hidden_size=WIDTH, num_heads=2, mlp_ratio=2, patch_size=14)
    config = hf.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False,
                              **tiny.qwen_ids(tok))
    hf.Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    images = tiny.qwen_images(14)
    hf.Qwen2VLProcessor(images, tok, hf.Qwen2VLVideoProcessor(),
                        chat_template=tiny.CHATML).save_pretrained(folder)


def measure(cfg, policy, processor, optimizer, wait):
    """Seconds that the run waits, and until the checkpoint is complete: medians of 3."""
    waited, complete = [], []
    for step in (1, 2, 3) if wait else (4, 5, 6):
        began = time.time()
        sft.save_checkpoint(cfg, step, policy, processor, optimizer, wait=wait)
        waited.append(time.time() - began)
        sft.finish_checkpoint()
        complete.append(time.time() - began)
    return statistics.median(waited), statistics.median(complete)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", default=None)
    folder = parser.parse_args().folder
    rank, world, device = sft.init_distributed()
    torch.set_num_threads(1)
    [folder, *_] = sft.gather(tempfile.mkdtemp(dir=folder) if rank == 0 else "")
    if rank == 0:
        make_model(f"{folder}/model")
        Path(folder, "run").mkdir()
    torch.distributed.barrier()
    cfg = sft.Config(out=f"{folder}/run")
    policy, processor = sft.load_policy(f"{folder}/model", cfg, device)
    optimizer = sft.make_optimizer(policy, cfg)
    for p in policy.parameters():
        p.grad = torch.full_like(p, 0.01)
    optimizer.step()
    optimizer.zero_grad()
    for wait in (True, False):
        waited, complete = measure(cfg, policy, processor, optimizer, wait)
        if rank == 0:
            print(f"| {world} | {'waits' if wait else 'goes on'} | {waited:.1f} | {complete:.1f} |")
    torch.distributed.destroy_process_group()
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
