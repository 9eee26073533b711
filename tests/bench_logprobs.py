"""Peak memory and time of token_logprobs, forward and backward, against the usual full-logits version.

    python tests/bench_logprobs.py [--vocab 151936] [--tokens 2048] [--hidden 1024]

Needed: at most 1/5 of the memory. Each version runs in its own process. "Extra" is the peak above what any
version holds: inputs, the output head and its gradient. Uses the GPU (bf16) where there is one, else the CPU.
"""
import argparse
import functools
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch  # noqa: E402

import sft


def usual(policy, inputs, mask):
    """Full logits, log_softmax, gather."""
    logits = policy.model(**inputs).last_hidden_state[:, :-1] @ policy.get_output_embeddings().weight.T
    return logits.float().log_softmax(-1).gather(2, inputs["input_ids"][:, 1:, None])[..., 0] * mask


def measure(name, vocab, tokens, hidden):
    """Run one version in this process; returns GiB and seconds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    states = torch.randn(1, tokens + 1, hidden, device=device, dtype=dtype, requires_grad=True)
    head = torch.empty(vocab, hidden, device=device, dtype=dtype).normal_(0, hidden ** -0.5).requires_grad_()
    ids = torch.randint(0, vocab, (1, tokens + 1), device=device)
    mask = torch.ones(1, tokens, dtype=torch.bool, device=device)
    matrix = SimpleNamespace(weight=head)
    matrix.logprobs = functools.partial(sft.head_logprobs, matrix)
    policy = SimpleNamespace(model=lambda **_: SimpleNamespace(last_hidden_state=states), head=sft.Head(),
                             get_output_embeddings=lambda: matrix,
                             banned=torch.empty(0, dtype=torch.long, device=device))

    def peak():
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    held, began = peak(), time.time()
    logps = {"usual": usual, "token_logprobs": sft.token_logprobs}[name](policy, {"input_ids": ids}, mask)
    loss = logps.mean()
    loss.backward()
    value = loss.item()
    gradient = head.numel() * head.element_size() / 2**30
    return {"peak": peak(), "extra": peak() - held - gradient, "seconds": time.time() - began, "loss": value,
            "gradient": head.grad.float().norm().item()}


def main():
    parser = argparse.ArgumentParser()
    for flag, default in (("vocab", 151936), ("tokens", 2048), ("hidden", 1024)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--only", default="", help="run this version in this process and print JSON")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args.vocab, args.tokens, args.hidden)))
        return
    sizes = [f"--{k}={getattr(args, k)}" for k in ("vocab", "tokens", "hidden")]
    found = {}
    print(f"vocabulary {args.vocab}, {args.tokens} response tokens, hidden {args.hidden}")
    print(f"{'':16}{'peak GiB':>10}{'extra GiB':>11}{'seconds':>9}{'loss':>12}{'|gradient|':>12}")
    for name in ("usual", "token_logprobs"):
        done = subprocess.run([sys.executable, __file__, "--only", name, *sizes],
                              capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name} failed (out of memory?): {done.stderr[-300:]}")
        r = found[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:16}{r['peak']:10.2f}{r['extra']:11.2f}{r['seconds']:9.1f}{r['loss']:12.5f}"
              f"{r['gradient']:12.5f}")
    share = {k: found["token_logprobs"][k] / found["usual"][k] for k in ("extra", "peak", "seconds")}
    ratio = share["extra"]
    print(f"extra memory 1/{1 / ratio:.1f}, peak 1/{1 / share['peak']:.1f}, time x{share['seconds']:.2f}")
    sys.exit(0 if ratio <= 0.2 else "token_logprobs needs more than 1/5 of the memory")


if __name__ == "__main__":
    main()
