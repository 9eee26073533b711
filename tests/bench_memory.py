"""Memory of an update."""
import argparse
import functools
import sys
import time
from pathlib import Path
from types import MethodType, SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers as hf  # noqa: E402
from torch._subclasses import fake_tensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily  # noqa: E402
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType as Kind  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling  # noqa: E402

import sft  # noqa: E402

CPU = torch.device("cpu")
# Language model: hidden, intermediate, layers, heads, key-value heads, vocabulary, tied; tower: hidden, intermediate,
# blocks, heads. From config.json of Qwen/Qwen2.5-VL-*-Instruct.
SHAPES = {"tiny": (256, 704, 4, 8, 2, 4096, True, 128, 344, 4, 4),
          "3B": (2048, 11008, 36, 16, 2, 151936, True, 1280, 3420, 32, 16),
          "7B": (3584, 18944, 28, 28, 4, 152064, False, 1280, 3420, 32, 16),
          "32B": (5120, 27648, 64, 40, 8, 152064, False, 1280, 3456, 32, 16),
          "72B": (8192, 29568, 80, 64, 8, 152064, False, 1280, 3456, 32, 16)}


def config_of(name, side):
    """The configuration of a model. Windows of the tower are as large as an image of `side` patches."""
    hidden, inner, layers, heads, kv_heads, vocabulary, tied, width, vision_inner, blocks, vision_heads = SHAPES[name]
    head = hidden // heads
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [head // 8, head * 3 // 16, head * 3 // 16]}
    text = dict(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
                num_key_value_heads=kv_heads, vocab_size=vocabulary, rope_parameters=rope,
                bos_token_id=None, eos_token_id=1)
    vision = dict(hidden_size=width, intermediate_size=vision_inner, depth=blocks, num_heads=vision_heads,
                  out_hidden_size=hidden, window_size=14 * side)
    return hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied,
                               image_token_id=2, video_token_id=3, vision_start_token_id=4, vision_end_token_id=5)


def row_of(side, words, responses, length):
    """A question about an image of side x side patches with its responses, as grpo.py trains on it."""
    ids = torch.tensor([[6] * words + [4] + [2] * (side // 2) ** 2 + [5]])
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == 2).long(),
              "pixel_values": torch.zeros(side * side, 3 * 2 * 14 * 14),
              "image_grid_thw": torch.tensor([[1, side, side]])}
    return sft.Group(prompt, [[7] * length] * responses)


class Tracker(FSDPMemTracker):
    """Peak of all tensors, and of those that --cpu_offload leaves on the GPU."""
    ON_HOST = (Kind.SHARDED_PARAM, Kind.SHARDED_GRAD, Kind.OPT)

    def __init__(self, *args):
        super().__init__(*args)
        self.peak = self.offloaded = 0
        self.snap = {}

    def _update_peak_stats(self, _):
        now = self._curr_mem_snap[CPU]
        total = now["Total"]
        here = total - sum(now[kind] for kind in self.ON_HOST)
        if total > self.peak:
            self.peak = total
            self.snap = {str(getattr(k, "value", k)): round(v / 2**30, 2) for k, v in now.items() if v > 2**25}
        self.offloaded = max(self.offloaded, here)


def with_numbers(function):
    """A function of numbers, which a fake tensor has only where it is small and was made from them."""
    def run(grid, **kwargs):
        numbers = grid.tolist()
        with unset_fake_temporarily():
            found = function(torch.tensor(numbers), **kwargs)
        return [torch.tensor(x.tolist()) for x in found]
    return run


def simulated(name, ranks, cfg, row, side, fake=True):
    """(estimated, simulated peak, the same with cpu_offload) in bytes."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    mode = FakeTensorMode(allow_non_fake_inputs=True) 
    config = config_of(name, side)

    def load_model(path, dtype, attn):
        with mode:
            return hf.AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation=attn)

    sft.load_model = load_model
    policy, _ = sft.load_policy("", cfg, CPU)
    optimizer = sft.make_optimizer(policy, cfg)
    scale = sft.attention_scale(policy.config)
    rows = [row] * max(1, int(cfg.token_budget / sft.computed(len(row), scale)))
    inputs, mask = sft.collate(rows, None, 0, CPU)
    inputs = sft.placed_inputs(policy.model, **inputs)
    with mode:
        known = ("input_ids", "image_grid_thw")
        inputs = {k: torch.tensor(v.tolist()) if k in known else mode.from_tensor(v) for k, v in inputs.items()}
        mask = torch.tensor(mask.tolist())
        policy.banned = torch.tensor(policy.banned.tolist())
        for p in policy.parameters():
            if p.requires_grad:
                p.grad = torch.zeros_like(p)
        optimizer.step()
        policy.forward = MethodType(sft.token_logprobs, policy)
        tracker = Tracker(policy, optimizer)
        tracker.track_inputs((inputs, mask))
        with tracker:
            policy(inputs, mask).sum().backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
            optimizer.step()
    dist.destroy_process_group()
    needs, unknown = sft.memory_needed(policy, rows, cfg, ranks); assert not unknown, unknown
    return needs, tracker


def main():
    fake_tensor.CONSTANT_NUMEL_LIMIT = 10**6
    modeling.get_vision_window_index = with_numbers(modeling.get_vision_window_index)
    sft.AutoProcessor = SimpleNamespace(from_pretrained=lambda path: SimpleNamespace(chat_template="-"))
    sft.MixedPrecisionPolicy = functools.partial(sft.MixedPrecisionPolicy, torch.bfloat16, torch.float32)
    name, ranks = sys.argv[1], int(sys.argv[2])
    side = 8 if name == "tiny" else 72
    row = row_of(side, 100, 8, 512)
    for flags in ([], ["freeze_vision"], ["gradient_checkpointing"], ["gradient_checkpointing", "freeze_vision"]):
        cfg = sft.Config(**dict.fromkeys(flags, True))
        t = time.time()
        needs, tr = simulated(name, ranks, cfg, row, side)
        print(name, ranks, flags, f"{time.time()-t:.0f} s, sim {tr.peak/2**30:.2f} off {tr.offloaded/2**30:.2f}", tr.snap, flush=True)
        print("   est", f"{sum(needs.values())/2**30:.2f} ratio {sum(needs.values())/tr.peak:.2f}", {k: round(v/2**30, 2) for k, v in needs.items()}, flush=True)


if __name__ == "__main__":
    main()
