"""Attention of prompts over a paged cache, a forward of 8,192 tokens of a 1.1B model: milliseconds and TFLOP/s of one layer.

    python benchmarks/paged_prompts.py                    on a GPU
    python benchmarks/paged_prompts.py --tokens 256 --once --check    what it computes, on a CPU under TRITON_INTERPRET=1

Cases: prompts that begin at their first token, and second halves of such. Rows: all keys read from the pool; the chunk's own ones
read where they were computed, by several settings of the kernel; the kernel of training over the same tokens, where they begin
at 0, and FlashAttention-4 where it is installed. Only pairs that are seen are counted.
"""

from __future__ import annotations

import argparse
import os

import torch

from luban.kernels import paged_launch
from luban.kernels.flash.attention import flash_attention, prepared
from luban.kernels.flash.launch import Tiles
from luban.kernels.intervals import intervals
from luban.kernels.paged_launch import PagedBias, padded_width, paged_attention, paged_tiles, paged_work, store

HEADS, KEY_HEADS, WIDTH, BLOCK = 32, 4, 64, 16
SETTINGS = [(64, 4, 3), (64, 4, 2), (64, 4, 4), (64, 8, 3), (128, 4, 2), (128, 8, 2), (128, 8, 3), (32, 4, 4)]
ROWS = (128, 64)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


class Prompts:
    """Chunks of `count` tokens that begin at `start`, as many as `tokens` hold, in a pool of their own."""

    def __init__(self, tokens: int, start: int, count: int):
        generator = torch.Generator().manual_seed(0)
        self.starts, self.counts = [start] * (tokens // count), [count] * (tokens // count)
        self.N, chunks, length = sum(self.counts), len(self.counts), start + count
        blocks = -(-length // BLOCK)
        self.tables = torch.randperm(chunks * blocks, generator=generator).view(chunks, blocks).int().to(DEVICE)
        at = torch.arange(length, device=DEVICE)
        slots = self.tables[:, at // BLOCK].long() * BLOCK + at % BLOCK
        self.keys, self.values = (self._drawn(chunks * blocks * BLOCK, KEY_HEADS) for _ in range(2))
        self.q, self.k, self.v = (self._drawn(self.N, heads) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
        store(self.k, self.v, self.keys, self.values, None, slots[:, start:].flatten())
        row_bytes = padded_width(WIDTH) * self.q.element_size()
        self.work = paged_work(self.starts, self.counts, HEADS, KEY_HEADS, row_bytes, torch.device(DEVICE))
        pairs = sum(
            start * count + count * (count + 1) // 2 for start, count in zip(self.starts, self.counts, strict=True)
        )
        self.flops = 4 * HEADS * WIDTH * pairs

    def _drawn(self, length: int, heads: int) -> torch.Tensor:
        return torch.randn(length, heads, WIDTH, device=DEVICE).to(DTYPE)

    def paged(self, own: bool) -> torch.Tensor:
        """(N, H, D)."""
        new = (self.k, self.v) if own else None
        options = {"block_size": BLOCK, "window": None, "scale": WIDTH**-0.5, "new": new}
        return paged_attention(
            self.q.transpose(0, 1), self.keys, self.values, None, self.tables, self.work, PagedBias.of(None), **options
        )

    def dense(self):
        """A call of the kernel of training, for chunks that begin at 0."""
        documents = torch.arange(len(self.counts), device=DEVICE).repeat_interleave(self.counts[0])[None].int()
        mask = prepared(intervals(self.N, self.N, documents=documents, device=DEVICE), self.N)
        q, k, v = (x.transpose(0, 1)[None] for x in (self.q, self.k, self.v))
        return lambda: flash_attention(q, k, v, mask=mask)[0].transpose(0, 1)

    def flash4(self):
        """A call of FlashAttention-4, for chunks that begin at 0."""
        from luban.kernels.flash4 import packed_attention

        edges = torch.arange(0, self.N + 1, self.counts[0], device=DEVICE, dtype=torch.int32)
        q, k, v = (x.transpose(0, 1)[None] for x in (self.q, self.k, self.v))
        return lambda: packed_attention(q, k, v, edges, WIDTH**-0.5)[0].transpose(0, 1)


def milliseconds(call) -> float:
    """Of one call, the middle of many, whose launches cost nothing (a CUDA graph)."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(22):
            call()
    times = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 22)
    return sorted(times)[len(times) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="of a forward")
    parser.add_argument("--once", action="store_true", help="compute everything once, without times")
    parser.add_argument("--check", action="store_true", help="how far every result is from the first")
    args = parser.parse_args()
    timed = DEVICE == "cuda" and not args.once
    if DEVICE == "cpu" and not (args.once and os.environ.get("TRITON_INTERPRET")):
        parser.error("without a GPU it takes TRITON_INTERPRET=1 and --once, which measures no times")
    half = args.tokens // 8
    for name, start, count in (("from the beginning", 0, 2 * half), ("second halves", half, half)):
        prompts = Prompts(args.tokens, start, count)
        expected = prompts.paged(own=False)
        print(f"{len(prompts.counts)} chunks of {count} tokens, {name}", flush=True)

        def show(what, call, prompts=prompts, expected=expected):
            try:
                took = milliseconds(call) if timed else None
                found = call() if args.check or not timed else None
                said = [] if took is None else [f"{took:8.3f} ms  {prompts.flops / took / 1e9:6.0f} TFLOP/s"]
                said += [f"off by {(found - expected).abs().max().item():.2g}"] if args.check else []
                print(f"  {what:48} {', '.join(said) or 'computed'}", flush=True)
            except Exception as error:  # a setting that asks for more than there is, or a package that isn't installed
                print(f"  {what:48} failed: {str(error)[:90]}", flush=True)

        usual = paged_tiles
        show("from the pool", lambda: prompts.paged(own=False))
        show("own keys in place", lambda: prompts.paged(own=True))
        for rows in ROWS:
            paged_launch.CHUNK_ROWS = rows
            tried = Prompts(args.tokens, start, count)
            tried.__dict__.update({k: v for k, v in vars(prompts).items() if k != "work"})
            for own in (True, False):
                for cols, warps, stages in SETTINGS:
                    paged_launch.paged_tiles = lambda rows, *_, s=(cols, warps, stages): Tiles(rows, *s)
                    what = f"{'own' if own else 'pool'}: {rows} rows, {cols} keys, {warps} warps, {stages} stages"
                    show(what, lambda tried=tried, own=own: tried.paged(own=own))
        paged_launch.paged_tiles, paged_launch.CHUNK_ROWS = usual, ROWS[0]
        if start == 0:
            show("the kernel of training", prompts.dense())
            show("FlashAttention-4", prompts.flash4())


if __name__ == "__main__":
    main()
