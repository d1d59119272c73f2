"""A training step of a model built from a specification beside the same model written by hand: forward, loss, backward, update.

    python benchmarks/spec_overhead.py                                  # a CPU, both ways, a minute or two
    python benchmarks/spec_overhead.py --device cuda --width 1024 --layers 16 --heads 16 --inner 2816 --batch 8 --seq 1024 \\
        --precision bf16 --steps 20                                     # one GPU

Both have LLaMA's shape, the same weights (checked: equal logits), the same optimizer and the same tokens; they take turns
step by step, so that what else the machine does falls on both. Prints the median of a step, and the median of the ratio of
neighbouring steps with its standard error. The composition should cost nothing: at most 3%.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luban import build_model
from luban.models.spec import uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.mixer.grouped import Grouped
from luban.parallel.device import keep_freed_memory

VOCABULARY, BASE = 4096, 10_000.0


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    swapped = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + swapped * sin


class HandBlock(nn.Module):
    """A LLaMA layer as one writes it for one model."""

    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.head = width // heads
        self.mixer_norm, self.feedforward_norm = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.q, self.k, self.v, self.output = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, E = x.shape
        h = self.mixer_norm(x)
        q, k, v = (p(h).view(B, T, -1, self.head).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).reshape(B, T, E))
        h = self.feedforward_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class HandModel(nn.Module):
    """The whole decoder; its rotary tables are made once."""

    def __init__(self, width: int, layers: int, heads: int, inner: int, seq: int):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(HandBlock(width, heads, inner) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)
        head = width // heads
        angles = torch.arange(seq)[:, None] / BASE ** (torch.arange(0, head, 2) / head)
        self.register_buffer("cos", torch.cat((angles, angles), -1).cos(), persistent=False)
        self.register_buffer("sin", torch.cat((angles, angles), -1).sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        cos, sin = self.cos[: tokens.shape[1]].to(x.dtype), self.sin[: tokens.shape[1]].to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.lm_head(self.norm(x))


def take_weights(hand: HandModel, ours: nn.Module) -> None:
    """The same numbers in both; their names differ by the modules that own them."""
    given = dict(ours.named_parameters())
    renamed = {
        "decoder.": "",
        "embedding.tokens.": "embedding.",
        "mixer.qkv.": "",
        "mixer.output.": "output.",
        "feedforward.": "",
        "head.": "lm_head.",
    }
    for old, new in renamed.items():
        given = {name.replace(old, new): weight for name, weight in given.items()}
    hand.load_state_dict(given)


def step_of(module: nn.Module, *, compiled: bool) -> Callable[[Tensor, Tensor], None]:
    """One training step."""

    def loss_of(tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(module(tokens).flatten(0, 1).float(), targets.flatten())

    loss = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

    def step(tokens: Tensor, targets: Tensor) -> None:
        loss(tokens, targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step: Callable[[Tensor, Tensor], None], tokens: Tensor, targets: Tensor) -> float:
    """Of one step, the device's work included."""
    began = time.perf_counter()
    step(tokens, targets)
    if tokens.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    for name, value in {
        "width": 256,
        "layers": 6,
        "heads": 8,
        "inner": 768,
        "batch": 4,
        "seq": 128,
        "steps": 40,
        "threads": os.cpu_count() or 1,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory(torch.device(args.device))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
    spec = uniform(
        vocab_size=VOCABULARY,
        width=args.width,
        layers=args.layers,
        context=args.seq,
        mixer=Grouped(heads=args.heads),
        feedforward=SwiGLU(width=args.inner),
    )
    record = {
        "arguments": vars(args),
        "torch": torch.__version__,
        "load": os.getloadavg(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else f"{os.cpu_count()} CPU cores",
    }
    for compiled in (False, True):
        torch._dynamo.reset()
        ours = build_model(spec)
        hand = HandModel(args.width, args.layers, args.heads, args.inner, args.seq)
        take_weights(hand, ours)
        tokens = torch.randint(0, VOCABULARY, (args.batch, args.seq + 1))
        torch.testing.assert_close(ours(tokens[:, :-1]), hand(tokens[:, :-1]), atol=1e-4, rtol=1e-4)
        tokens = tokens.to(args.device)
        steps = [step_of(m.to(args.device, dtype), compiled=compiled) for m in (ours, hand)]
        for _ in range(3):
            for step in steps:
                seconds(step, tokens[:, :-1], tokens[:, 1:])
        times = [
            [seconds(step, tokens[:, :-1], tokens[:, 1:]) for step in steps[:: 1 if i % 2 else -1]][
                :: 1 if i % 2 else -1
            ]
            for i in range(args.steps)
        ]
        spec_built, by_hand = (statistics.median(t[i] for t in times) for i in (0, 1))
        ratios = sorted(a / b for a, b in times)
        middle = ratios[len(ratios) // 4 : -(len(ratios) // 4)]  # the middle half: a busy machine has wild outliers
        error = 1.25 * statistics.stdev(middle) / math.sqrt(len(middle))
        name = "compiled" if compiled else "eager"
        record[name] = {
            "spec_ms": 1e3 * spec_built,
            "hand_ms": 1e3 * by_hand,
            "ratio": statistics.median(ratios),
            "error": error,
        }
        print(
            f"{name:9} from a specification {1e3 * spec_built:8.2f} ms, by hand {1e3 * by_hand:8.2f} ms, "
            f"ratio {statistics.median(ratios):.3f} ± {error:.3f}",
            flush=True,
        )
    print(json.dumps(record))


if __name__ == "__main__":
    main()
