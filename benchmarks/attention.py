"""Attention on one GPU beside its peers, in one run: cuDNN, FlashAttention-2, FlexAttention, flash-attn-4 (if installed).

    python benchmarks/attention.py --out attention.json     every table, about four minutes on an H100, half of it compiling
    python benchmarks/attention.py --only biased            one table
    python benchmarks/attention.py --quick                  a few tokens, to see that it runs

“picked” is what a model gets: the dispatcher's choice, through the same function. FLOPs counted: 4·B·H·D a visible
(query, key) pair forward, 10 backward. Medians of at least 5 runs after warm-up (of two
where one takes over a second). A summary stands at the end.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

sys.path.insert(0, str(Path(__file__).parents[1]))
from luban.data.batch import Batch
from luban.kernels import dispatch
from luban.kernels.attention_mask import AttentionMask
from luban.kernels.distance import alibi, alibi_slopes, kerple_log, kerple_power
from luban.kernels.flash import launch
from luban.kernels.flash.attention import flash_attention, prepared
from luban.kernels.intervals import intervals
from luban.kernels.layout import BlockLayout
from luban.nn.attention.attend import attention
from luban.nn.attention.prepared_mask import prepare

fa4 = fa4_packed = None
if dispatch.flash4_missing() is None:
    from flash_attn.cute import flash_attn_func as fa4
    from flash_attn.cute import flash_attn_varlen_func as fa4_packed

TOKENS, WIDTH = 16384, 2048  # tokens a batch, and heads × head width: the shapes of FlashAttention's own benchmark
HOST_CYCLES = 2_000_000  # about a millisecond, in which the host launches what is timed
ROWS: list[dict] = []
SUMMARY: list[str] = []


def inputs(T, D, rows=None):
    """Queries, keys and values (B, H, T, D), in memory token by token, as the projections of a model leave them."""
    B, H = rows or max(1, TOKENS // T), WIDTH // D
    made = (torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    return [x.transpose(1, 2).requires_grad_() for x in made]


def milliseconds(call, budget=0.12):
    """Median of at least 5 runs (2 where one takes over a second), the second-level cache cleared in between. The device
    sleeps before each, so that the host is ahead as in training: what is timed is the device's work alone."""
    call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    once = time.perf_counter() - begin
    runs = 2 if once > 1 else min(100, max(5, int(budget / max(once, 1e-5))))
    cleared, times = torch.empty(64 * 2**20, dtype=torch.int8, device="cuda"), []
    for _ in range(max(1, runs // 4)):
        call()
    for _ in range(runs):
        cleared.zero_()
        torch.cuda._sleep(HOST_CYCLES)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        times.append((first, last))
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in times)


def measure(table, name, T, D, pairs, call, qkv, extra=(), rows=None):
    """Time forward and backward of `call()`; pairs: visible pairs a batch row and head, of which there are `rows`."""
    try:
        out = call()
        do, leaves = torch.randn_like(out), [*qkv, *extra]
        forward = milliseconds(call)
        backward = milliseconds(lambda: torch.autograd.grad(out, leaves, do, retain_graph=True))
    except Exception as error:
        print(f"{table:<8} {name:<18} T={T:<6} D={D:<4} failed: {' '.join(str(error).split())[:200]}", flush=True)
        return None
    work = 4 * math.prod(rows or qkv[0].shape[:2]) * pairs * D
    row = {
        "table": table,
        "name": name,
        "T": T,
        "D": D,
        "forward_ms": forward,
        "backward_ms": backward,
        "forward_tflops": work / forward / 1e9,
        "backward_tflops": 2.5 * work / backward / 1e9,
    }
    ROWS.append(row)
    print(
        f"{table:<8} {name:<18} T={T:<6} D={D:<4} fwd {row['forward_tflops']:5.0f} TFLOP/s {forward:8.3f} ms   "
        f"bwd {row['backward_tflops']:5.0f} {backward:8.3f} ms",
        flush=True,
    )
    return row


def summarise(case, rows):
    """One line: TFLOP/s forward / backward of everyone who ran."""
    cells = [f"{r['name']} {r['forward_tflops']:.0f}/{r['backward_tflops']:.0f}" for r in rows if r]
    SUMMARY.append(f"{case}: " + ", ".join(cells))


def picked(q, k, v, **restrictions):
    """What a model would run on these tensors: the kernel's name and a call."""
    T = q.shape[2]
    mask = AttentionMask(queries=T, keys=T, causal=True, device=q.device, **restrictions)
    made = prepare(mask, head_dim=q.shape[3], dtype=q.dtype)
    return made.kernel, lambda: attention(q, k, v, made)


def sdpa(backend, q, k, v):
    def call():
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return call


def flexed(q, k, v, score=None, mask=None, rows=None):
    T = q.shape[2]
    blocks = create_block_mask(mask or (lambda b, h, i, j: i >= j), rows, None, T, T, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, score_mod=score, block_mask=blocks)


def by_token(qkv):
    """The same laid out (B, T, H, D), as flash-attn-4 takes it."""
    return [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in qkv]


def first(out):
    return out[0] if isinstance(out, tuple) else out


def plain(sizes=(2048, 4096, 8192, 16384)):
    for D in (64, 128):
        for T in sizes:
            q, k, v = qkv = inputs(T, D)
            pairs = T * (T + 1) / 2
            path, call = picked(q, k, v)
            rows = [
                measure("plain", f"picked {path}", T, D, pairs, call, qkv),
                measure("plain", "luban", T, D, pairs, lambda: flash_attention(q, k, v), qkv),
                measure("plain", "cudnn", T, D, pairs, sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v), qkv),
            ]
            if T == 8192:
                rows.append(measure("plain", "flash2", T, D, pairs, sdpa(SDPBackend.FLASH_ATTENTION, q, k, v), qkv))
            if (D, T) == (128, 8192):  # a peer that compiles for ten seconds and more
                rows.append(measure("plain", "flex", T, D, pairs, flexed(q, k, v), qkv))
            if fa4:
                swapped = by_token(qkv)
                rows.append(
                    measure(
                        "plain",
                        "flash4",
                        T,
                        D,
                        pairs,
                        lambda: first(fa4(*swapped, causal=True)),
                        swapped,
                        rows=q.shape[:2],
                    )
                )
            summarise(f"causal T={T} D={D}", rows)


def biased(sizes=((64, 8192), (128, 8192), (64, 16384), (128, 16384))):
    for D, T in sizes:
        q, k, v = qkv = inputs(T, D)
        H, pairs = q.shape[1], T * (T + 1) / 2
        slopes = alibi_slopes(H, "cuda")
        r1, r2 = (torch.rand(H, device="cuda").add(0.5).requires_grad_() for _ in range(2))
        scale, learned = 1 / math.sqrt(D), (r1, r2)
        rows = [
            measure("biased", "unbiased", T, D, pairs, lambda: flash_attention(q, k, v), qkv),
            measure("biased", "alibi", T, D, pairs, lambda: flash_attention(q, k, v, bias=alibi(slopes, T)), qkv),
            measure(
                "biased",
                "power",
                T,
                D,
                pairs,
                lambda: flash_attention(q, k, v, bias=kerple_power(r1, r2, T, scale)),
                qkv,
                learned,
            ),
            measure(
                "biased",
                "log",
                T,
                D,
                pairs,
                lambda: flash_attention(q, k, v, bias=kerple_log(r1, r2, T, scale)),
                qkv,
                learned,
            ),
        ]
        rows.append(
            measure(
                "biased", "alibi flex", T, D, pairs, flexed(q, k, v, lambda s, b, h, i, j: s - slopes[h] * (i - j)), qkv
            )
        )
        if T == 8192:  # seconds a run
            rows.append(
                measure(
                    "biased",
                    "log flex",
                    T,
                    D,
                    pairs,
                    flexed(q, k, v, lambda s, b, h, i, j: s - scale * r1[h] * torch.log(1 + r2[h] * (i - j).abs())),
                    qkv,
                    learned,
                )
            )
        if (D, T) == (64, 8192):
            rows.append(
                measure(
                    "biased",
                    "power flex",
                    T,
                    D,
                    pairs,
                    flexed(q, k, v, lambda s, b, h, i, j: s - scale * r1[h] * (i - j).abs() ** r2[h]),
                    qkv,
                    learned,
                )
            )
        summarise(f"biased T={T} D={D}", rows)


def packed(T=8192, mean=512, batches=(2, 8)):
    """Documents of exponential length in packs, two and eight of them: milliseconds, and time against the tiles that must
    be touched."""
    for D, B in itertools.product((64, 128), batches):
        torch.manual_seed(0)
        q, k, v = qkv = inputs(T, D, B)
        lengths = torch.empty(B, T).exponential_(1 / mean).clamp(min=1).long()
        documents = torch.stack([torch.repeat_interleave(torch.arange(T), row)[:T] for row in lengths]).int()
        arrays = dict.fromkeys(("tokens", "targets", "loss_mask", "documents", "positions"), documents.numpy())
        document_starts, documents = torch.from_numpy(Batch(**arrays).document_starts()).cuda(), documents.cuda()
        mask = intervals(T, T, documents=documents, device="cuda")
        pairs, square = mask.pairs() / B, T * (T + 1) / 2
        dense = {"luban": measure("packed", "dense luban", T, D, square, lambda: flash_attention(q, k, v), qkv)}
        path, call = picked(q, k, v, documents=documents, document_starts=document_starts)
        mask = prepared(mask, T)  # once a forward in a model, and so outside what is timed
        rows = [
            (path, measure("packed", f"picked {path}", T, D, pairs, call, qkv)),
            ("luban", measure("packed", "luban", T, D, pairs, lambda: flash_attention(q, k, v, mask=mask), qkv)),
        ]
        if fa4:
            swapped = by_token(qkv)
            dense["flash4"] = measure(
                "packed",
                "dense flash4",
                T,
                D,
                square,
                lambda: first(fa4(*swapped, causal=True)),
                swapped,
                rows=q.shape[:2],
            )
            rows.append(("flash4", flash4_packed(documents, T, D, pairs, qkv)))
        peers = []
        if (D, B) == (128, 2):
            peers.append(
                measure(
                    "packed",
                    "flex",
                    T,
                    D,
                    pairs,
                    flexed(q, k, v, mask=lambda b, h, i, j: (i >= j) & (documents[b, i] == documents[b, j]), rows=B),
                    qkv,
                )
            )
        summarise(f"packed {B} × T={T} D={D}", [*(row for _, row in rows), *peers])
        for kernel, row in rows:
            if row and dense.get(kernel):
                compare_with_tiles(kernel, row, dense[kernel], mask, documents, pairs)


def compare_with_tiles(kernel, row, dense, mask, documents, pairs):
    """Time of packs over that of as many of the kernel's tiles in its dense rows, and how much of them is visible."""
    (B, T), D, cells = documents.shape, row["D"], []
    for which in ("forward", "backward"):
        rows, cols = tile_shape(kernel, D, which)
        whole = triangle_tiles(T, rows, cols)
        if kernel == "luban":  # its tiles stand where the row puts them, those of flash4 begin with the document
            touched = touched_tiles(mask, rows, cols)
        else:
            touched = sum(triangle_tiles(length, rows, cols) for length in document_lengths(documents))
        ratio = row[f"{which}_ms"] / (dense[f"{which}_ms"] * touched / (whole * B))
        visible = pairs * B / (touched * rows * cols)
        ROWS.append(
            {
                "table": "packed",
                "name": f"ratio {row['name']}",
                "D": D,
                "pass": which,
                "rows": B,
                "ratio": ratio,
                "visible": visible,
            }
        )
        cells.append(f"{which} {row[f'{which}_ms']:.3f} ms, {ratio:.2f} (visible pairs in them {visible:.0%})")
    SUMMARY.append(
        f"packed {B} × {T} D={D} {row['name']}, ms and time over its tiles at its dense rate: " + "; ".join(cells)
    )


def tile_shape(kernel, D, which):
    """Queries × keys of a tile. FlashAttention-4's are those of 4.0.0b36 on Hopper for causal rows (`_tile_size_fwd_sm90`
    and `_tile_size_bwd_sm90` in flash_attn/cute/interface.py)."""
    if kernel == "luban":
        t = launch.tiles(D, {"forward": "forward", "backward": "queries"}[which], intervals=True)
        return t.rows, t.cols
    return {
        ("forward", 64): (192, 128),
        ("forward", 128): (128, 128),
        ("backward", 64): (128, 128),
        ("backward", 128): (64, 128),
    }[which, D]


def document_edges(documents):
    """(documents + 1,) int32: where those of all rows begin, and the end; as long as there are documents."""
    fresh = torch.ones_like(documents, dtype=torch.bool)
    fresh[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return torch.cat([fresh.flatten().nonzero().flatten(), torch.tensor([fresh.numel()], device="cuda")]).int()


def document_lengths(documents):
    return document_edges(documents).diff().tolist()


def flash4_packed(documents, T, D, pairs, qkv):
    edges = document_edges(documents)
    swapped = [x.detach().flatten(0, 1).requires_grad_() for x in by_token(qkv)]
    return measure(
        "packed",
        "flash4 varlen",
        T,
        D,
        pairs,
        lambda: first(
            fa4_packed(*swapped, cu_seqlens_q=edges, cu_seqlens_k=edges, max_seqlen_q=T, max_seqlen_k=T, causal=True)
        ),
        swapped,
        rows=qkv[0].shape[:2],
    )


def touched_tiles(mask, rows, cols):
    """Tiles of rows × cols that hold a visible pair, over all batch rows."""
    starts = mask.start.unfold(1, rows, rows).amin(2) // cols
    stops = -(-mask.stop.unfold(1, rows, rows).amax(2) // cols)
    return int((stops - starts).sum())


def triangle_tiles(length, rows, cols):
    """Those of one causal triangle."""
    return sum(-(-min(m + rows, length) // cols) for m in range(0, length, rows))


def random_layout(T, share):
    """Random blocks of 64, causal, and every query block's own."""
    torch.manual_seed(0)
    table = (torch.rand(1, T // 64, T // 64) < share) | torch.eye(T // 64, dtype=torch.bool)
    return BlockLayout((table & torch.ones_like(table).tril()).cuda(), 64)


def sparse(lengths=(16384, 65536)):
    for D, T in itertools.product((64, 128), lengths):
        q, k, v = qkv = inputs(T, D)
        base, cells = None, []
        for share in (1.0, 0.5, 0.25, 0.1, 0.03):
            made = random_layout(T, share)
            density = made.density()
            row = measure(
                "sparse",
                f"density {density:.3f}",
                T,
                D,
                density * T * T / 2,
                lambda made=made: flash_attention(q, k, v, layout=made),
                qkv,
            )
            if row is None:
                break
            times = torch.tensor([row["forward_ms"], row["backward_ms"]]) / density
            base = times if base is None else base
            both, (fwd, bwd) = float(times.sum() / base.sum()), (times / base).tolist()
            ROWS.append({"table": "sparse", "name": "ratio", "T": T, "D": D, "density": density, "ratio": both})
            cells.append(f"{density:.3f} → {both:.2f} (fwd {fwd:.2f}, bwd {bwd:.2f})")
        SUMMARY.append(f"sparse T={T} D={D}: time over density, relative to dense: " + ", ".join(cells))


def memory(sizes=(16384, 32768, 65536, 131072, 262144)):
    """Peak memory of forward and backward beyond the inputs, in T: the slope of its log."""
    points = []
    for T in sizes:
        qkv = [torch.randn(1, 2, T, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        flash_attention(*qkv).sum().backward()
        points.append((math.log(T), math.log(torch.cuda.max_memory_allocated() - before)))
    x, y = torch.tensor(points, dtype=torch.float64).T
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    ROWS.append({"table": "memory", "name": "slope", "slope": slope, "bytes": [math.exp(b) for _, b in points]})
    SUMMARY.append(
        f"memory beyond the inputs, T = {sizes[0]} … {sizes[-1]}: {math.exp(points[-1][1]) / 1e6:.0f} MB "
        f"at the end, slope of log bytes in log T {slope:.3f}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["plain", "biased", "packed", "sparse", "memory"])
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--out", type=Path, help="write every row as JSON")
    options = parser.parse_args()
    card = torch.cuda.get_device_name()
    print(f"{card}, torch {torch.__version__}, triton {triton.__version__}, flash-attn-4 {'yes' if fa4 else 'no'}")
    tables = {"plain": plain, "biased": biased, "packed": packed, "sparse": sparse, "memory": memory}
    small = {
        "plain": ([512],),
        "biased": ([(64, 512)],),
        "packed": (512, 64),
        "sparse": ([1024],),
        "memory": ([1024, 2048],),
    }
    try:
        for name, table in tables.items():
            if not options.only or name in options.only:
                begin = time.perf_counter()
                table(*small.get(name, ()) if options.quick else ())
                print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
    finally:
        print("\n".join(["", "summary (TFLOP/s forward/backward)", *SUMMARY, *dispatch.report()]))
        if options.out:
            found = {"device": card, "torch": torch.__version__, "triton": triton.__version__, "rows": ROWS}
            options.out.write_text(json.dumps(found | {"summary": SUMMARY}, indent=1))


if __name__ == "__main__":
    main()
