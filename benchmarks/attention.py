"""Attention on one GPU beside its peers, in one run: cuDNN, FlashAttention-2, FlexAttention, flash-attn-4 (if installed).

    python benchmarks/attention.py                    every table
    python benchmarks/attention.py --only biased      one table
    python benchmarks/attention.py --sweep            time tile settings of our kernels

FLOPs counted: 4·B·H·D a visible (query, key) pair forward, 10 backward. Medians of repeated runs after warm-up.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

sys.path.insert(0, str(Path(__file__).parents[1]))
from luban.kernels import layout as layouts
from luban.kernels.distance import alibi, alibi_slopes, kerple_log, kerple_power
from luban.kernels.flash import attention as ours
from luban.kernels.intervals import intervals

try:
    from flash_attn.cute import flash_attn_func as fa4
except ImportError:
    fa4 = None

TOKENS, WIDTH = 16384, 2048  # tokens a batch, and heads × head width: the shapes of FlashAttention's own benchmark
ROWS: list[dict] = []


def inputs(T, D, heads=None):
    B, H = max(1, TOKENS // T), heads or WIDTH // D
    return [torch.randn(B, H, T, D, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)]


def measure(table, name, T, D, pairs, call, qkv, extra=()):
    """Time forward and backward of `call()`; pairs: visible pairs a batch row and head."""
    try:
        out = call()
        do = torch.randn_like(out)
        forward = triton.testing.do_bench(call, warmup=50, rep=200, return_mode="median")
        leaves = [*qkv, *extra]
        backward = triton.testing.do_bench(lambda: torch.autograd.grad(out, leaves, do, retain_graph=True),
                                           warmup=50, rep=200, return_mode="median")  # fmt: skip
    except Exception as error:
        print(f"{table:<10} {name:<16} T={T:<6} D={D:<4} failed: {' '.join(str(error).split())[:140]}", flush=True)
        return None
    work = 4 * qkv[0].shape[0] * qkv[0].shape[1] * pairs * D
    row = {"table": table, "name": name, "T": T, "D": D, "forward_ms": forward, "backward_ms": backward,
           "forward_tflops": work / forward / 1e9, "backward_tflops": 2.5 * work / backward / 1e9}  # fmt: skip
    ROWS.append(row)
    print(f"{table:<10} {name:<16} T={T:<6} D={D:<4} fwd {row['forward_tflops']:6.0f} TFLOP/s ({forward:.3f} ms)   "
          f"bwd {row['backward_tflops']:6.0f} ({backward:.3f} ms)", flush=True)  # fmt: skip
    return row


def sdpa(backend, q, k, v):
    def call():
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return call


def flexed(q, k, v, score=None, mask=None):
    T = q.shape[2]
    blocks = create_block_mask(mask or (lambda b, h, i, j: i >= j), None, None, T, T, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, score_mod=score, block_mask=blocks)


def plain():
    for D in (64, 128):
        for T in (2048, 4096, 8192, 16384):
            q, k, v = qkv = inputs(T, D)
            pairs = T * (T + 1) / 2
            measure("plain", "luban", T, D, pairs, lambda: ours.flash_attention(q, k, v), qkv)
            measure("plain", "cudnn", T, D, pairs, sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v), qkv)
            measure("plain", "flash-2", T, D, pairs, sdpa(SDPBackend.FLASH_ATTENTION, q, k, v), qkv)
            if T == 8192:
                measure("plain", "flex", T, D, pairs, flexed(q, k, v), qkv)
            if fa4:
                swapped = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in qkv]

                def call(swapped=swapped):
                    out = fa4(*swapped, causal=True)
                    return out[0] if isinstance(out, tuple) else out

                measure("plain", "flash-attn-4", T, D, pairs, call, swapped)


def biased():
    for D, T in ((64, 8192), (128, 8192), (128, 16384)):
        q, k, v = qkv = inputs(T, D)
        H, pairs = q.shape[1], T * (T + 1) / 2
        slopes = alibi_slopes(H).cuda()
        r1, r2 = (torch.rand(H, device="cuda").add(0.5).requires_grad_() for _ in range(2))
        scale = 1 / math.sqrt(D)
        measure("biased", "alibi", T, D, pairs, lambda: ours.flash_attention(q, k, v, bias=alibi(slopes, T, T)), qkv)
        measure("biased", "alibi flex", T, D, pairs,
                flexed(q, k, v, lambda s, b, h, i, j: s - slopes[h] * (i - j)), qkv)  # fmt: skip
        for name, make, formula in (
            (
                "power",
                kerple_power,
                lambda s, b, h, i, j: s - scale * r1[h] * torch.pow((i - j).abs().float() + 1e-6, r2[h]),
            ),
            ("log", kerple_log, lambda s, b, h, i, j: s - scale * r1[h] * torch.log(1 + r2[h] * (i - j).abs())),
        ):
            measure("biased", f"kerple {name}", T, D, pairs,
                    lambda make=make: ours.flash_attention(q, k, v, bias=make(r1, r2, T, T, scale)), qkv, (r1, r2))  # fmt: skip
            measure("biased", f"{name} flex", T, D, pairs, flexed(q, k, v, formula), qkv, (r1, r2))


def packed():
    """Documents of exponential length, mean 512, in packs of 8k: time against the tiles that must be touched."""
    T, D = 8192, 128
    for seed in range(2):
        torch.manual_seed(seed)
        q, k, v = qkv = inputs(T, D)
        B = q.shape[0]
        lengths = torch.empty(B, T).exponential_(1 / 512).clamp(min=1).long()
        docs = torch.zeros(B, T, dtype=torch.int32)
        for b in range(B):
            docs[b] = torch.repeat_interleave(torch.arange(T), lengths[b])[:T]
        mask = intervals(T, T, documents=docs.cuda(), device="cuda")
        dense = measure("packed", "dense causal", T, D, T * (T + 1) / 2, lambda: ours.flash_attention(q, k, v), qkv)
        found = measure(
            "packed", "documents", T, D, mask.pairs() / B, lambda: ours.flash_attention(q, k, v, mask=mask), qkv
        )
        measure("packed", "flex", T, D, mask.pairs() / B, flexed_documents(q, k, v, docs.cuda()), qkv)
        for which, kernel in (("forward", "forward"), ("backward", "queries")):
            t = ours.tiles(D, kernel, None)
            touched, total = touched_tiles(mask, T, t.rows, t.cols)
            ideal = dense[f"{which}_ms"] * touched / (total * B)
            exact = mask.pairs() / (touched * t.rows * t.cols)
            ROWS.append(
                {"table": "packed", "name": f"{which} ratio", "ratio": found[f"{which}_ms"] / ideal, "exact": exact}
            )
            print(f"packed     {which} time over its tiles at the dense rate: {found[f'{which}_ms'] / ideal:.2f}; "
                  f"visible pairs in those tiles: {exact:.0%}", flush=True)  # fmt: skip


def flexed_documents(q, k, v, docs):
    T = q.shape[2]
    mask = create_block_mask(
        lambda b, h, i, j: (i >= j) & (docs[b, i] == docs[b, j]), q.shape[0], None, T, T, device="cuda"
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask)


def touched_tiles(mask, T, rows, cols):
    """Tiles of rows × cols that hold a visible pair (all batch rows), and those of one dense causal triangle."""
    starts = mask.start.unfold(1, rows, rows).amin(2) // cols
    stops = -(-mask.stop.unfold(1, rows, rows).amax(2) // cols)
    dense = sum(-(-(m + rows) // cols) for m in range(0, T, rows))
    return int((stops - starts).sum()), dense


def sparse():
    T, D, block = 16384, 128, 64
    q, k, v = qkv = inputs(T, D)
    base = None
    for share in (1.0, 0.5, 0.25, 0.1, 0.03):
        blocks = T // block
        torch.manual_seed(0)
        table = (torch.rand(1, blocks, blocks) < share) | torch.eye(blocks, dtype=torch.bool)
        made = layouts.BlockLayout((table & torch.ones_like(table).tril()).cuda(), block)
        density = made.density()
        row = measure("sparse", f"density {density:.3f}", T, D, density * T * T / 2,
                      lambda made=made: ours.flash_attention(q, k, v, layout=made), qkv)  # fmt: skip
        if row is None:
            return
        time = row["forward_ms"] + row["backward_ms"]
        base = base or time / density
        ROWS.append({"table": "sparse", "name": "ratio", "density": density, "ratio": time / density / base})
        print(f"sparse     time over density, relative to dense: {time / density / base:.3f}", flush=True)


def memory():
    """Peak memory of forward and backward beyond the inputs, in T: the slope of its log."""
    points = []
    for T in (16384, 32768, 65536, 131072, 262144):
        qkv = [torch.randn(1, 2, T, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ours.flash_attention(*qkv).sum().backward()
        points.append((math.log(T), math.log(torch.cuda.max_memory_allocated() - before)))
        print(f"memory     T={T:<7} {math.exp(points[-1][1]) / 1e6:9.1f} MB", flush=True)
    x, y = torch.tensor(points, dtype=torch.float64).T
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    ROWS.append({"table": "memory", "name": "slope", "slope": slope})
    print(f"memory     slope of log bytes in log T: {slope:.3f}")


SETTINGS = {
    "forward": [(128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3), (64, 128, 4, 3), (128, 64, 4, 2)],
    "keys": [(64, 128, 8, 2), (64, 128, 8, 3), (64, 64, 4, 2), (64, 128, 4, 2), (32, 128, 4, 3), (128, 128, 8, 2), (64, 64, 4, 3)],
    "queries": [(128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (128, 64, 4, 2), (128, 32, 4, 3), (128, 128, 8, 2), (64, 64, 4, 3)],
}  # fmt: skip


def sweep():
    """Time tile settings of each kernel, the others left as they are."""
    original = ours.tiles
    for D in (64, 128):
        q, k, v = qkv = inputs(8192, D)
        for which, settings in SETTINGS.items():
            for setting in settings:
                chosen = ours.Tiles(*setting)
                ours.tiles = lambda w, name, s, which=which, chosen=chosen: (
                    chosen if name == which else original(w, name, s)
                )
                measure(
                    "sweep", f"{which} {setting}", 8192, D, 8192 * 8193 / 2, lambda: ours.flash_attention(q, k, v), qkv
                )
    ours.tiles = original


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["plain", "biased", "packed", "sparse", "memory"])
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--out", type=Path, help="write every row as JSON")
    options = parser.parse_args()
    card = torch.cuda.get_device_name()
    print(f"{card}, torch {torch.__version__}, triton {triton.__version__}, flash-attn-4 {'yes' if fa4 else 'no'}")
    tables = {"plain": plain, "biased": biased, "packed": packed, "sparse": sparse, "memory": memory}
    try:
        for name, table in ({"sweep": sweep} if options.sweep else tables).items():
            if options.only in (None, name):
                table()
    finally:
        if options.out:
            options.out.write_text(json.dumps({"device": card, "torch": torch.__version__, "rows": ROWS}, indent=1))


if __name__ == "__main__":
    main()
