"""Memory of an update, estimated and simulated:
python tests/bench_memory.py [--quick] [--models 3B 7B] [--ranks 8]

Estimated: memory_needed of sft.py, arithmetic on the shapes of a model's weights. Simulated: sft.py's own
load_policy, token_logprobs, backward, clipping and AdamW, with gradients and moments of an earlier
micro-batch there already, as rank 0 of that many, under PyTorch's fake tensors (shapes without numbers), its
fake process group (collectives that move nothing) and its FSDPMemTracker, which adds up the tensors that are
alive. Nothing here ran on a GPU: a CUDA context, the buffers of NCCL and what the allocator cannot use come
on top. "Fits" leaves a tenth of a card for them.

The micro-batch is what --token_budget 16384 allows of a question about a picture of 980 x 980 pixels (4,900
patches, 1,225 tokens) with 100 words and 8 responses of 512 tokens: two rows of 5,430 tokens at each size.
bf16, sdpa.

--cpu_offload is not simulated by itself, since there is no second device: its peak is that of all tensors but
sharded weights, gradients and moments, without the shard on its way to the GPU, which the estimate has.
Windows of the tower are as large as the picture: sdpa makes no attention matrix, so that they need the same
memory, and are 80 times fewer calls.

--quick takes a small model, holds the simulation against the same tracker over real tensors too, and fails
where the estimate is off by more than 15 % or the two simulations by 2 %. --plan prints the table of
docs/reference.md from estimates: the least that fits, C for --gradient_checkpointing, O for --cpu_offload,
and the --tp with which vLLM's weights and half as much for its cache fit beside weights, gradients and
moments while it samples. With --lora_rank 64 that of LoRA.
"""
import argparse
import contextlib
import dataclasses
import sys
from pathlib import Path
from types import MethodType, SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers as hf  # noqa: E402
from torch._subclasses import fake_tensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily  # noqa: E402
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling  # noqa: E402

import sft  # noqa: E402

CPU, GIB = torch.device("cpu"), 2**30
CARDS = {"24 GB": 24e9, "80 GB": 80e9, "141 GB": 141e9}  # bytes; of each a tenth is left to others
# Language model: hidden, intermediate, layers, heads, key-value heads, vocabulary, whether head and embedding
# are one; tower: hidden, intermediate, blocks, heads. From the config.json of Qwen/Qwen2.5-VL-*-Instruct.
SHAPES = {"small": (512, 1408, 6, 8, 2, 4096, False, 128, 344, 4, 4),
          "3B": (2048, 11008, 36, 16, 2, 151936, True, 1280, 3420, 32, 16),
          "7B": (3584, 18944, 28, 28, 4, 152064, False, 1280, 3420, 32, 16),
          "32B": (5120, 27648, 64, 40, 8, 152064, False, 1280, 3456, 32, 16),
          "72B": (8192, 29568, 80, 64, 8, 152064, False, 1280, 3456, 32, 16)}
FLAGS = {"": {}, "freeze_vision": dict(freeze_vision=True),
         "gradient_checkpointing": dict(gradient_checkpointing=True),
         "gradient_checkpointing, freeze_vision": dict(gradient_checkpointing=True, freeze_vision=True),
         "lora_rank 64": dict(lora_rank=64),
         "gradient_checkpointing, lora_rank 64": dict(lora_rank=64, gradient_checkpointing=True)}
SIDE = 70  # patches along an image's side
IMAGE, VIDEO, BEGIN, END, WORD = 2, 3, 4, 5, 6  # token ids


def config_of(name):
    """A model's configuration; windows of its tower take a whole image."""
    hidden, inner, layers, heads, kv, words, tied, width, vision_inner, blocks, vision_heads = SHAPES[name]
    eighth = hidden // heads // 8
    rope = {"rope_type": "default", "rope_theta": 1e6,
            "mrope_section": [eighth, 3 * eighth // 2, 3 * eighth // 2]}
    text = dict(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=kv, vocab_size=words, rope_parameters=rope,
                bos_token_id=None, eos_token_id=1)
    vision = dict(hidden_size=width, intermediate_size=vision_inner, depth=blocks, num_heads=vision_heads,
                  out_hidden_size=hidden, window_size=14 * SIDE)
    return hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied,
                               image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=BEGIN,
                               vision_end_token_id=END)


def question(side, words, responses, length):
    """A Group: an image of side x side patches, words, and responses, as grpo.py trains on it."""
    ids = torch.tensor([[WORD] * words + [BEGIN] + [IMAGE] * (side // 2) ** 2 + [END]])
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids),
              "mm_token_type_ids": (ids == IMAGE).long(),
              "pixel_values": torch.zeros(side * side, 3 * 2 * 14 * 14),
              "image_grid_thw": torch.tensor([[1, side, side]])}
    return sft.Group(prompt, [[WORD] * length] * responses)


class Tracker(FSDPMemTracker):
    """Bytes at the peak: of all tensors, and of those that --cpu_offload leaves on the GPU."""
    ON_HOST = (_FSDPRefType.SHARDED_PARAM, _FSDPRefType.SHARDED_GRAD, _FSDPRefType.OPT)

    def __init__(self, *args):
        super().__init__(*args)
        self.peak = self.offloaded = 0

    def _update_peak_stats(self, _):
        now = self._curr_mem_snap[CPU]
        on_host = sum(now[kind] for kind in self.ON_HOST)
        self.peak = max(self.peak, now["Total"])
        self.offloaded = max(self.offloaded, now["Total"] - on_host)


def of_numbers(function):
    """Have a function of an image's grid compute on numbers, which fake tensors have not."""
    def computed(grid, **kwargs):
        numbers = grid.tolist()
        with unset_fake_temporarily():
            found = function(torch.tensor(numbers), **kwargs)
        return [torch.tensor(x.tolist()) for x in found]
    return computed


def prepare():
    """Have sft.py load configurations, compute in bf16 without a GPU,
    and fake tensors keep the small numbers.
    """
    fake_tensor.CONSTANT_NUMEL_LIMIT = 10**6  # token ids, grids and masks decide shapes
    modeling.get_vision_window_index = of_numbers(modeling.get_vision_window_index)
    sft.AutoProcessor = SimpleNamespace(from_pretrained=lambda path: SimpleNamespace(chat_template="-"))
    sft.compute_dtype = lambda device: torch.bfloat16


@contextlib.contextmanager
def loaded(name, ranks, cfg, mode):
    """The policy, sharded over `ranks`."""
    def load_model(path, dtype, attn):
        with mode:
            return hf.AutoModelForImageTextToText.from_config(config, dtype=torch.float32,
                                                              attn_implementation=attn)

    config = config_of(name)
    sft.load_model = load_model
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    yield sft.load_policy("", cfg, CPU)[0]
    dist.destroy_process_group()


def estimated(policy, rows, cfg, ranks):
    """Bytes without and with --cpu_offload, and those of weights, gradients and moments without it."""
    parts, unknown = sft.memory_needed(policy, rows, cfg, ranks)
    assert not unknown, unknown
    offloaded, _ = sft.memory_needed(policy, rows, dataclasses.replace(cfg, cpu_offload=True), ranks)
    return sum(parts.values()), sum(offloaded.values()), parts["weights, gradients and moments"]


def batch_of(policy, group, cfg):
    """As many rows as sft.py's rehearse takes."""
    cost = sft.computed(len(group), sft.attention_scale(policy.config))
    return [group] * max(1, int(cfg.token_budget / cost))


def measured(name, ranks, cfg, group, real=False):
    """(estimated bytes, simulated bytes), each (without, with --cpu_offload)."""
    mode = contextlib.nullcontext() if real else FakeTensorMode(allow_non_fake_inputs=True)
    with loaded(name, ranks, cfg, mode) as policy:
        optimizer = sft.make_optimizer(policy, cfg)
        rows = batch_of(policy, group, cfg)
        estimate = estimated(policy, rows, cfg, ranks)[:2]
        inputs, mask = sft.collate(rows, None, 0, CPU)
        inputs = sft.placed_inputs(policy.model, **inputs)  # positions are computed from numbers
        with mode:
            if not real:
                with_numbers = ("input_ids", "image_grid_thw")
                inputs = {key: torch.tensor(value.tolist()) if key in with_numbers
                          else mode.from_tensor(value) for key, value in inputs.items()}
                mask, policy.banned = torch.tensor(mask.tolist()), torch.tensor(policy.banned.tolist())
            for p in policy.parameters():
                if p.requires_grad:
                    p.grad = torch.zeros_like(p)
            # Makes the moments. And from now on DTensor knows how to compute a norm: the fake tensors of the
            # whole gradient's size, with which it finds out, would be counted.
            torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
            optimizer.step()
            # The tracker looks at forward only.
            matrix = policy.get_output_embeddings()
            policy.forward = MethodType(sft.token_logprobs, policy)
            matrix.forward = MethodType(sft.head_logprobs, matrix)
            matrix.logprobs = matrix.__call__
            tracker = Tracker(policy, optimizer)
            tracker.track_inputs((inputs, mask))
            with tracker:
                policy(inputs, mask).sum().backward()
                torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
                optimizer.step()
    return estimate, (tracker.peak, tracker.offloaded)


def fits(size):
    return ["yes" if size <= 0.9 * card else "no" for card in CARDS.values()]


def table(models, ranks):
    """Every flag on 8 ranks, checkpointing on any number: activations do not depend on it."""
    print("| model | ranks | flags | estimated, GiB | simulated, GiB | ratio |",
          *(f"{card} |" for card in CARDS))
    print("|---" * (6 + len(CARDS)) + "|", flush=True)
    group = question(SIDE, 100, 8, 512)
    for name in models:
        for world in ranks:
            for flags, values in FLAGS.items():
                if not flags.startswith("gradient_checkpointing") and world != 8:
                    continue
                pairs = zip(*measured(name, world, sft.Config(attn="sdpa", **values), group))
                for offload, (estimate, simulation) in zip(("", "cpu_offload"), pairs):
                    given = ", ".join(filter(None, (flags, offload)))
                    print("|", " | ".join([name, str(world), given, f"{estimate / GIB:.1f}",
                                           f"{simulation / GIB:.1f}", f"{estimate / simulation:.2f}",
                                           *fits(simulation)]), "|", flush=True)


def plan(models, ranks, lora_rank):
    """The least that makes an update fit, for each model and number of GPUs:
    flags, GiB, and the engine's --tp.
    """
    group = question(SIDE, 100, 8, 512)
    print("| model | GPUs |", *(f"{card} |" for card in CARDS))
    print("|---" * (2 + len(CARDS)) + "|")
    for name in models:
        # flags, bytes of an update, of them what stays while vLLM samples
        choices = {world: [] for world in ranks}
        for values, flags in (({}, "as it is"), (dict(gradient_checkpointing=True), "C")):
            cfg = sft.Config(attn="sdpa", lora_rank=lora_rank, **values)
            with loaded(name, 8, cfg, FakeTensorMode(allow_non_fake_inputs=True)) as policy:
                weights = 2 * sft.numbers_of(policy)
                for world in ranks:
                    plain, offloaded, states = estimated(policy, batch_of(policy, group, cfg), cfg, world)
                    choices[world].append((flags, plain, states))
                    if values:
                        choices[world].append((f"{flags}, O", offloaded, 0))
        for world in ranks:
            cells = [least(choices[world], weights, world, 0.9 * card) for card in CARDS.values()]
            print("|", " | ".join([name, str(world), *cells]), "|", flush=True)


def least(choices, weights, world, room):
    """The first choice with which update and engine fit.

    An engine's cache is taken to be half of its weights.
    """
    for flags, size, states in choices:
        shares = [tp for tp in (1, 2, 4, 8) if tp <= world and states + 1.5 * weights / tp <= room]
        if size <= room and shares:
            return f"{flags}: {size / GIB:.0f} GiB" + (f", tp {shares[0]}" if shares[0] > 1 else "")
    return "no"


def quick():
    """Whether estimate, simulation and the tracker over real tensors agree on a small model."""
    wrong = 0
    group = question(16, 20, 4, 60)
    for flags, values in FLAGS.items():
        cfg = sft.Config(attn="sdpa", token_budget=1000, **values)
        estimate, simulation = measured("small", 8, cfg, group)
        _, reality = measured("small", 8, cfg, group, real=True)
        for number, offload in enumerate(("", "cpu_offload")):
            given = ", ".join(filter(None, (flags, offload))) or "no flags"
            off = estimate[number] / simulation[number]
            alike = simulation[number] / reality[number]
            good = abs(off - 1) <= 0.15 and abs(alike - 1) <= 0.02
            wrong += not good
            print(f"{given}: simulated {simulation[number] / 2**20:.1f} MiB, "
                  f"with real tensors x{1 / alike:.3f}, "
                  f"estimated x{off:.2f}{'' if good else ' WRONG'}", flush=True)
    sys.exit(f"{wrong} of them disagree" if wrong else 0)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=list(SHAPES)[1:], choices=SHAPES)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 8, 16, 32, 64])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--lora_rank", type=int, default=0)
    args = parser.parse_args()
    prepare()
    if args.quick:
        quick()
    if args.plan:
        plan(args.models, args.ranks, args.lora_rank)
    else:
        table(args.models, args.ranks)


if __name__ == "__main__":
    main()
