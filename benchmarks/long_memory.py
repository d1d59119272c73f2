"""Associative recall and duplication: what mixers in the place of attention remember, and how LSH rounds matter.

recall: pairs of keys and values with one value for every key of a row, then a key: its value is asked for (Poli et al. 2023, section
4.1; 1,024 tokens, 10 to 30 words: at least 95%).
duplicate: 0 w 0 w, the second half is to be written (Kitaev et al. 2020, section 5). Trained with so many LSH rounds, evaluated with
others and with full attention; the paper, trained with 4: full 0.8, 8 rounds 100, 4 rounds 99.9, 2 rounds 99.4, 1 round 91.9. Tokens a bucket
and buckets are the square root of the row's tokens, nearly. A token and its copy fall into one bucket by chance alone until the model has
found out which positions belong together, so that LSH begins only where all tokens in one bucket have taught it that (--first).

    python benchmarks/long_memory.py recall --mixer hyena --tokens 1024 --words 20 --seconds 600
    python benchmarks/long_memory.py duplicate --tokens 64                            # one CPU thread, two minutes
    python benchmarks/long_memory.py duplicate --tokens 1024 --device cuda --seconds 500
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luban import build_model
from luban.models.spec import ModelSpec, changed, uniform
from luban.nn.feedforward.plain import GELU
from luban.nn.init import FanInInit
from luban.nn.mixer.base import Mixer
from luban.nn.mixer.grouped import Grouped
from luban.nn.mixer.hyena import Hyena
from luban.nn.mixer.lsh import LSH
from luban.nn.mixer.routing import Routing
from luban.nn.norm import LayerNorm
from luban.nn.position.learned import Learned

Task = tuple[Tensor, Tensor, Tensor]  # tokens, the next token of each, whether it counts


def recall(batch: int, tokens: int, words: int, device: str) -> Task:
    """Half of the words are keys, half values. Every value counts whose key came before; the last one is the question."""
    keys, pairs = words // 2, tokens // 2
    value_of = torch.randint(keys, 2 * keys, (batch, keys), device=device)
    asked = torch.randint(0, keys, (batch, pairs), device=device)
    row = torch.stack((asked, value_of.gather(1, asked)), -1).flatten(1)
    same = (asked[:, :, None] == asked[:, None, :]).tril(-1).any(-1)
    counts = torch.zeros_like(row, dtype=torch.bool)
    counts[:, 0::2] = same
    return row[:, :-1], row[:, 1:], counts[:, :-1]


def duplicate(batch: int, tokens: int, words: int, device: str) -> Task:
    """Words from 1 on; 0 stands before each copy."""
    half = torch.randint(1, words, (batch, tokens // 2), device=device)
    half[:, 0] = 0
    row = torch.cat((half, half), 1)
    counts = torch.zeros_like(row, dtype=torch.bool)
    counts[:, tokens // 2 : -1] = True
    return row[:, :-1], row[:, 1:], counts[:, :-1]


TASKS = {"recall": recall, "duplicate": duplicate}
LAYERS = {"recall": 2, "duplicate": 1}  # as the papers have them
DEFAULTS = {  # of a task: mixer, rows, highest learning rate
    "recall": {"mixer": "hyena", "batch": 16, "lr": 2e-3},
    "duplicate": {"mixer": "lsh", "batch": 32, "lr": 5e-3},
}


def mixer_of(name: str, tokens: int, rounds: int) -> Mixer:
    """The mixer at a size for these rows."""
    span = 2 ** int(math.log2(tokens) / 2)
    return {
        "attention": Grouped(heads=4),
        "hyena": Hyena(),
        "lsh": LSH(heads=4, buckets=2 * max(round(tokens / span / 2), 1), span=span, rounds=rounds),
        "routing": Routing(heads=4, local_heads=2, window=64, clusters=round(tokens**0.5), size=round(tokens**0.5)),
    }[name]


def model_of(args: argparse.Namespace) -> ModelSpec:
    """A decoder of few layers."""
    return uniform(
        vocab_size=args.words,
        width=args.width,
        layers=LAYERS[args.task],
        context=args.tokens,
        position=Learned(),
        norm=LayerNorm(),
        mixer=mixer_of(args.mixer, args.tokens, args.rounds),
        feedforward=GELU(width=4 * args.width),
        init=FanInInit(embedding=1.0),
    )


@torch.no_grad()
def accuracy(model: nn.Module, args: argparse.Namespace, *, last: bool = False, rows: int = 64) -> float:
    """Share of right answers; `last`: of the last question alone."""
    model.eval()
    right = total = 0
    for _ in range(rows // args.batch + 1):
        tokens, targets, counts = TASKS[args.task](args.batch, args.tokens, args.words, args.device)
        if last:
            counts[:, :-1] = False
        found = model(tokens).argmax(-1) == targets
        right, total = right + int((found & counts).sum()), total + int(counts.sum())
    model.train()
    return right / max(total, 1)


def one_bucket(mixer: LSH, tokens: int) -> LSH:
    """Attention to all tokens before, its queries and keys one vector as LSH has them."""
    return replace(mixer, buckets=1, span=tokens)


def with_mixer(model: nn.Module, mixer: Mixer, device: str) -> nn.Module:
    """The model with its own weights, not copies of them, and another mixer that has the same."""
    other = build_model(changed(model.spec, mixer=mixer), device=device)
    other.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    return other


def train(args: argparse.Namespace) -> tuple[nn.Module, int]:
    """The model after so many seconds, or as soon as it is right everywhere; and its steps."""
    torch.manual_seed(args.seed)
    model = build_model(model_of(args), seed=args.seed, device=args.device)
    mixer = model.spec.layers[0].mixer
    easy = args.first > 0 and isinstance(mixer, LSH)
    if easy:
        model = with_mixer(model, one_bucket(mixer, args.tokens), args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    began, step = time.monotonic(), 0
    while (spent := time.monotonic() - began) < args.seconds:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 100, 4 * (1 - spent / args.seconds) + 0.02)
        tokens, targets, counts = TASKS[args.task](args.batch, args.tokens, args.words, args.device)
        loss = F.cross_entropy(model(tokens)[counts], targets[counts])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            found = accuracy(model, args)
            print(f"{step:6} {spent:6.0f} s  loss {loss.item():.4f}  accuracy {100 * found:.2f}", flush=True)
            if easy and found >= args.first:
                easy, model = False, with_mixer(model, mixer, args.device)
                print(f"{step:6} {spent:6.0f} s  from here on {mixer.buckets} buckets, {mixer.span} tokens of one seen")
            elif found > args.enough and not easy:
                break
    if easy:
        model = with_mixer(model, mixer, args.device)
    return model, step


def evaluate(model: nn.Module, args: argparse.Namespace) -> None:
    """Accuracy; of LSH by rounds."""
    if args.mixer != "lsh":
        print(
            f"accuracy {100 * accuracy(model, args, rows=256):.2f}, of the last one {100 * accuracy(model, args, last=True, rows=1024):.2f}"
        )
        return
    mixer = model.spec.layers[0].mixer
    others = {"full": one_bucket(mixer, args.tokens)}
    others |= {f"{rounds} rounds": replace(mixer, eval_rounds=rounds) for rounds in (8, 4, 2, 1)}
    for name, other in others.items():
        again = with_mixer(model, other, args.device)
        print(f"{name:9} {100 * accuracy(again, args, rows=256):.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=tuple(TASKS))
    parser.add_argument(
        "--mixer", choices=("attention", "hyena", "lsh", "routing"), help="default: hyena; duplicate: lsh"
    )
    parser.add_argument("--tokens", type=int, default=1024, help="a row")
    parser.add_argument("--words", type=int, default=20, help="of the vocabulary")
    parser.add_argument("--width", type=int, default=64, help="of the model")
    parser.add_argument("--batch", type=int, help="rows (default: 16; duplicate: 32)")
    parser.add_argument("--rounds", type=int, default=4, help="of LSH in training")
    parser.add_argument("--lr", type=float, help="the highest learning rate (default: 2e-3; duplicate: 5e-3)")
    parser.add_argument(
        "--first",
        type=float,
        default=0.95,
        help="accuracy with all tokens in one bucket before LSH begins (0: at once)",
    )
    parser.add_argument("--enough", type=float, default=0.9995, help="accuracy at which training stops")
    parser.add_argument("--seconds", type=float, default=600, help="of training, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    for name, value in DEFAULTS[args.task].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads; {vars(args)}")
    model, steps = train(args)
    print(f"{args.task}, {args.mixer}, {args.tokens} tokens, {args.words} words, {steps} steps")
    evaluate(model, args)


if __name__ == "__main__":
    main()
