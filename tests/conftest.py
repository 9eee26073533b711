"""Shared fixtures: a process group, the mini suite, tiny models of every family with real processors."""
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers as hf  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402

import data_prep  # noqa: E402
import eval as evaluation  # noqa: E402
import grpo  # noqa: E402
import rewards  # noqa: E402
import sft  # noqa: E402

CPU = torch.device("cpu")
WORDS = ["User:", "Assistant:", "user", "model", "assistant",
         "one two three four five six seven eight nine ten red blue green circle square"]
CHATML = data_prep.TINY_TEMPLATE
IDEFICS_TEMPLATE = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}: "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}")
GEMMA_TEMPLATE = (
    "<bos>{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] | trim }}{% endif %}"
    "{% endfor %}{% endif %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")


# ----- other processes


def wait_until(happened, process=None, seconds=300):
    """Wait for happened().

    Fails when it is late, or when `process` has ended without it, and shows its output.
    """
    deadline = time.time() + seconds
    while True:
        ended = process is not None and process.poll() is not None
        if happened():
            return
        if ended or time.time() > deadline:
            output = ""
            if process is not None:
                process.terminate()
                output, _ = process.communicate(timeout=60)
            pytest.fail(f"{'the process ended' if ended else f'{seconds} s passed'}: "
                        f"{(output or '')[-3000:]}")
        time.sleep(0.02)


def lines_in(path):
    """Whole lines of a file that may not be there yet."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


# ----- records


def picture(width, height, seed=0):
    """A deterministic RGB image with a few coloured boxes."""
    image = Image.new("RGB", (width, height), (230, 230, 230))
    pen, step = ImageDraw.Draw(image), 14
    for i, (x, y) in enumerate((x, y) for y in range(0, height, step) for x in range(0, width, step)):
        k = i * 37 + seed * 101
        pen.rectangle((x, y, x + step - 2, y + step - 2), fill=(k % 256, k * 7 % 256, k * 13 % 256))
    return image


def question(text, *images):
    """A record without an answer."""
    return {"id": "q", "question": text, "images": list(images), "answer_type": "text"}


RECORDS = {
    "text": question("one two three"),
    "long text": question("red blue green circle square one two three four five six seven eight " * 2),
    "image": question("one two", picture(84, 84)),
    "wide image": question("red circle <image> blue", picture(140, 56, seed=1)),
    "two images": question("<image> one <image> two three", picture(56, 84, seed=2), picture(84, 56, seed=3)),
}


# ----- models


def tokenizer(*special, eos="<|im_end|>", **named):
    """data_prep's word-level tokenizer with more special tokens; `named` ones become its attributes."""
    made = data_prep.tiny_tokenizer([*WORDS, *(rewards.build_prompt(r) for r in RECORDS.values())])
    made.add_special_tokens({"additional_special_tokens": [*special, *named.values()]})
    return hf.PreTrainedTokenizerFast(tokenizer_object=made.backend_tokenizer, eos_token=eos,
                                      pad_token="<|endoftext|>", extra_special_tokens=named)


def shake(model, seed):
    """Random weights, large enough that positions and images show, small enough that samples vary."""
    embeddings = 0.1 if model.config.model_type == "gemma3" else 0.2
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            of_tokens = name.endswith(("lm_head.weight", "embed_tokens.weight"))
            scale = embeddings if of_tokens else p[0].numel() ** -0.5
            p.data.normal_(0, scale, generator=generator)
        elif name.endswith("bias"):
            p.data.normal_(0, 0.1, generator=generator)
    return model


def text_config(tok, **more):
    """Sizes shared by the language models; two layers, grouped-query attention, vLLM's smallest head."""
    return dict(vocab_size=len(tok), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=4096,
                bos_token_id=None, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id) | more


VISION = dict(hidden_size=32, intermediate_size=64, patch_size=14)
ROPE = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4}


def qwen_ids(tok):
    """Vision token ids of a Qwen configuration."""
    names = dict(image="<|image_pad|>", video="<|video_pad|>", vision_start="<|vision_start|>",
                 vision_end="<|vision_end|>")
    return {f"{name}_token_id": tok.convert_tokens_to_ids(token) for name, token in names.items()}


def qwen_images(patch):
    """Image processor of the Qwen family, without an upper limit that matters here."""
    size = {"shortest_edge": 4 * patch**2, "longest_edge": 10**6}
    return hf.Qwen2VLImageProcessor(size=size, patch_size=patch)


def qwen25():
    """Qwen2.5-VL: windowed vision attention, tied embeddings."""
    tok = tokenizer()
    config = hf.Qwen2_5_VLConfig(
        text_config=text_config(tok, rope_parameters=ROPE, tie_word_embeddings=True),
        vision_config=VISION | dict(depth=2, num_heads=2, out_hidden_size=64, window_size=56,
                                    fullatt_block_indexes=[1]),
        tie_word_embeddings=True, **qwen_ids(tok))
    return hf.Qwen2_5_VLForConditionalGeneration(config), hf.Qwen2_5_VLProcessor(
        qwen_images(14), tok, hf.Qwen2VLVideoProcessor(), chat_template=CHATML)


def qwen2():
    """Qwen2-VL: untied output head."""
    tok = tokenizer()
    config = hf.Qwen2VLConfig(
        text_config=text_config(tok, rope_parameters=ROPE),
        vision_config=dict(depth=2, embed_dim=32, hidden_size=64, num_heads=2, mlp_ratio=2, patch_size=14),
        tie_word_embeddings=False, **qwen_ids(tok))
    return hf.Qwen2VLForConditionalGeneration(config), hf.Qwen2VLProcessor(
        qwen_images(14), tok, hf.Qwen2VLVideoProcessor(), chat_template=CHATML)


def qwen3():
    """Qwen3-VL: patches of 16, interleaved rotary positions, image features added into early layers."""
    tok = tokenizer()
    config = hf.Qwen3VLConfig(
        text_config=text_config(tok, rope_parameters=ROPE | {"mrope_interleaved": True}),
        vision_config=VISION | dict(depth=2, num_heads=2, out_hidden_size=64, patch_size=16,
                                    num_position_embeddings=64, deepstack_visual_indexes=[0]),
        tie_word_embeddings=False, **qwen_ids(tok))
    return hf.Qwen3VLForConditionalGeneration(config), hf.Qwen3VLProcessor(
        qwen_images(16), tok, hf.Qwen3VLVideoProcessor(), chat_template=CHATML)


def idefics3_parts(config_class):
    """Tokenizer and configuration of Idefics3: tiles of 56 pixels, 4 tokens each."""
    rows = [f"<row_{i}_col_{j}>" for i in range(1, 5) for j in range(1, 5)]
    tok = tokenizer("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *rows,
                    eos="<end_of_utterance>")
    config = config_class(
        text_config=dict(model_type="llama", **text_config(tok)), tie_word_embeddings=False, scale_factor=2,
        vision_config=VISION | dict(num_hidden_layers=2, num_attention_heads=2, image_size=56),
        image_token_id=tok.convert_tokens_to_ids("<image>"), pad_token_id=tok.pad_token_id)
    return tok, config, dict(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})


def idefics3():
    """Idefics3: padded tiles, text positions without image geometry."""
    tok, config, sizes = idefics3_parts(hf.Idefics3Config)
    return hf.Idefics3ForConditionalGeneration(config), hf.Idefics3Processor(
        hf.Idefics3ImageProcessor(**sizes), tok, image_seq_len=4, chat_template=IDEFICS_TEMPLATE)


def gemma3():
    """Gemma 3: sliding-window layers, bidirectional attention inside an image, scaled embeddings."""
    newlines = ["\n" * n for n in (1, 2, 3, 4)]  # vLLM looks these up to merge those around an image
    tok = tokenizer("<bos>", "<start_of_turn>", "<end_of_turn>", *newlines, eos="<end_of_turn>",
                    boi_token="<start_of_image>", eoi_token="<end_of_image>",
                    image_token="<image_soft_token>")
    config = hf.Gemma3Config(
        text_config=text_config(tok, sliding_window=16, tie_word_embeddings=True,
                                layer_types=["sliding_attention", "full_attention"]),
        vision_config=VISION | dict(num_hidden_layers=2, num_attention_heads=2, image_size=56,
                                    vision_use_head=False),
        mm_tokens_per_image=4, boi_token_index=tok.boi_token_id, eoi_token_index=tok.eoi_token_id,
        image_token_index=tok.image_token_id, tie_word_embeddings=True)
    images = hf.Gemma3ImageProcessor(size={"height": 56, "width": 56})
    return hf.Gemma3ForConditionalGeneration(config), hf.Gemma3Processor(
        images, tok, chat_template=GEMMA_TEMPLATE, image_seq_length=4)


def internvl():
    """InternVL: tiles of an image, as many as its shape asks for, between two tokens of their own."""
    tok = tokenizer(start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>",
                    video_token="<video>")
    config = hf.InternVLConfig(
        text_config=dict(model_type="qwen2", **text_config(tok, tie_word_embeddings=False)),
        vision_config=VISION | dict(num_hidden_layers=2, num_attention_heads=2, image_size=[56, 56],
                                    patch_size=[14, 14]),
        image_token_id=tok.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=4, downsample_ratio=0.5,
        tie_word_embeddings=False)
    images = hf.GotOcr2ImageProcessor(size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1,
                                      max_patches=4)
    return hf.InternVLForConditionalGeneration(config), hf.InternVLProcessor(
        images, tok, hf.InternVLVideoProcessor(), image_seq_length=4,
        chat_template=CHATML.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\n"))


def llava_onevision():
    """LLaVA-OneVision: an overview and tiles, cut to the image's shape, with a learnt line break."""
    tok = tokenizer(image_token="<image>", video_token="<video>")
    tiles = [[56, 56], [56, 112], [112, 56], [112, 112]]
    config = hf.LlavaOnevisionConfig(
        text_config=dict(model_type="qwen2", **text_config(tok)),
        vision_config=VISION | dict(model_type="siglip_vision_model", num_hidden_layers=2,
                                    num_attention_heads=2, image_size=56, vision_use_head=False),
        image_grid_pinpoints=tiles, image_token_index=tok.convert_tokens_to_ids("<image>"),
        video_token_index=tok.convert_tokens_to_ids("<video>"), tie_word_embeddings=False)
    images = hf.LlavaOnevisionImageProcessor(size={"height": 56, "width": 56}, image_grid_pinpoints=tiles)
    return hf.LlavaOnevisionForConditionalGeneration(config), hf.LlavaOnevisionProcessor(
        images, tok, hf.LlavaOnevisionVideoProcessor(), num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=CHATML.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>\n"))


FAMILIES = {"qwen2.5-vl": qwen25, "qwen2-vl": qwen2, "qwen3-vl": qwen3, "idefics3": idefics3,
            "gemma3": gemma3}
MORE_FAMILIES = {"internvl": internvl, "llava-onevision": llava_onevision}


# ----- fixtures


@pytest.fixture(autouse=True)
def signals_as_before():
    """A stage that ran in this process takes signals; a test after it may fork what must end by them."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def group():
    """A process group of one rank, as every stage makes it."""
    rank, world, device = sft.init_distributed()
    torch.set_num_threads(1)
    yield SimpleNamespace(rank=rank, world=world, device=device)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The mini suite at small sizes and the tiny model that goes with it."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("tiny")
    data_prep.make_mini(root / "mini", 0, sizes={"train": 24, "id": 12, "ood": 12, "left": 12, "right": 12})
    records = data_prep.read_records(root / "mini" / "counting_train.jsonl")
    texts = [text for r in records for text in (rewards.build_prompt(r), r["response"])]
    data_prep.make_tiny(root / "model", texts, 0)
    return SimpleNamespace(root=root, mini=root / "mini", model=str(root / "model"), records=records)


def made_family(name, path):
    """One family: saved model, processor, prompts by name, plain model, FSDP policy, rollout engine."""
    torch.manual_seed(0)
    model, processor = (FAMILIES | MORE_FAMILIES)[name]()
    shake(model, seed=1)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(path)
    processor.save_pretrained(path)
    cfg = grpo.Config(max_new_tokens=8)
    policy, processor = sft.load_policy(path, cfg, CPU)
    engine = evaluation.build_engine(path, processor, cfg, CPU)
    prompts = {key: sft.encode_prompt(record, processor, 10**6) for key, record in RECORDS.items()}
    for prompt in prompts.values():
        del prompt["request"]  # leaves what transformers' own forward and generate take
    plain = hf.AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    assert sum(p.numel() for p in plain.parameters()) < 1_000_000
    return SimpleNamespace(name=name, path=path, processor=processor, policy=policy, engine=engine,
                           prompts=prompts, plain=plain)


@pytest.fixture(scope="session", params=FAMILIES)
def family(request, tmp_path_factory, group):
    return made_family(request.param, str(tmp_path_factory.mktemp(request.param)))
