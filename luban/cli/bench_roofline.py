"""`luban bench roofline MODEL`: which operations are bound by memory and which by matmuls, and what fusing buys."""

from __future__ import annotations

import json
import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from luban.core.arguments import parse

ABOUT = """Every operation of a model's forward: FLOPs, bytes moved, FLOPs a byte, whether memory or matmuls bound it, the least
time that this allows, and its time by itself on this machine. Then what fusing buys in attention, SwiGLU, norms and the loss,
by bytes and measured, and attention's traffic counted load by load beside FlashAttention's formulas."""
EXAMPLES = """
luban bench roofline luban-6m --batch 4 --seq 256
luban bench roofline runs/a --device cuda --dtype bfloat16 --seq 2048 --out roofline.html
luban bench roofline llama-7b --no-measure --flops 989e12 --bandwidth 3.35e12 --dtype bfloat16
"""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the verb takes."""

    # a preset, run, checkpoint or directory
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    batch: int = 1  # sequences
    seq: int = 512  # tokens a sequence
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda if available
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of weights and matmuls
    measure: bool = True  # time every operation; else only FLOPs and bytes
    flops: float | None = None  # a second, of matmuls; none: those of a large matmul here
    bandwidth: float | None = None  # bytes a second; none: those of a sum here
    on_chip: int = 25_600  # elements of on-chip memory, for attention's traffic (an A100's 100 KB in float32)
    out: Path | None = None  # an HTML page with the picture and the tables
    json: Path | None = None  # the rows as JSON


def run(argv: Sequence[str]) -> None:
    """Measure and print."""
    args = parse(Arguments, argv, verb="bench roofline", about=ABOUT, examples=EXAMPLES)
    from luban.core.errors import UsageError

    if min(args.batch, args.seq, args.on_chip) < 1:
        raise UsageError("--batch, --seq and --on-chip must be at least 1")
    if any(rate is not None and not rate > 0 for rate in (args.flops, args.bandwidth)):
        raise UsageError("--flops and --bandwidth must be above 0, a second")
    if not args.measure and (args.flops is None or args.bandwidth is None):
        raise UsageError("without measuring, --flops and --bandwidth of the machine are needed")
    import torch

    from luban.core.log import print_result
    from luban.models.build import build_model
    from luban.models.describe import describe
    from luban.parallel.device import choose_device
    from luban.planner.roofline import Roof, attention_traffic, fusion_table, fusions, points, table, traffic_orders

    spec = spec_of(args.model)
    if args.seq > spec.context:
        raise UsageError(f"--seq {args.seq} is more than the context of {args.model}, {spec.context} tokens")
    graph = describe(spec, batch=args.batch, seq=args.seq, dtype=args.dtype)
    device, dtype = choose_device(args.device), getattr(torch, args.dtype)
    timer, roof = None, Roof(flops=args.flops or 1.0, bandwidth=args.bandwidth or 1.0)
    if args.measure:
        from luban.train.op_times import OpTimer, measured_fusions, measured_roof

        found = measured_roof(device, dtype)
        roof = Roof(flops=args.flops or found.flops, bandwidth=args.bandwidth or found.bandwidth)
        inside = any(op.kind in ("mixing", "recurrent", "gather", "combine") for op in graph.ops)
        timer = OpTimer(graph, build_model(spec, device=device, dtype=dtype).eval() if inside else None, device)
    rows = points(graph, timer)
    attending = next((op for op in graph.ops if op.kind == "attention"), None)
    heads, head_dim = (8, 64) if attending is None else (attending.heads, attending.head_dim)
    gates = [op.out_features for op in graph.ops if op.role in ("gate", "up")]
    sizes = {
        "rows": args.batch,
        "seq": args.seq,
        "width": spec.width,
        "inner": max(gates, default=4 * spec.width),
        "heads": heads,
        "head_dim": head_dim,
        "vocab": spec.vocab_size,
    }
    fused = fusions(**sizes, itemsize=graph.itemsize)
    if args.measure:
        fused = measured_fusions(fused, **sizes, device=device, dtype=dtype)
    separate, tiled = attention_traffic(args.seq, head_dim, args.on_chip)
    orders = traffic_orders(args.seq, head_dim, args.on_chip)
    traffic = (
        f"one head, {args.seq} tokens of {head_dim}, {args.on_chip} elements on chip: {separate:,} elements moved as separate "
        f"operations, {tiled:,} tiled, {separate / tiled:.1f}× fewer\n"
        f"formulas without constants: Nd + N² = {orders[0]:,.0f}, N²d²/M = {orders[1]:,.0f}, {orders[0] / orders[1]:.1f}× fewer"
    )
    print_result(
        f"{device.type}: {roof.flops / 1e9:,.0f} GFLOP/s, {roof.bandwidth / 1e9:,.1f} GB/s, ridge at {roof.ridge:.1f} FLOP/B\n"
        f"{table(rows, roof)}\n\n{fusion_table(fused, roof)}\n\n{traffic}"
    )
    if args.json is not None:
        data = {
            "roof": asdict(roof),
            "points": [asdict(row) for row in rows],
            "fusions": [asdict(each) for each in fused],
        }
        args.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    if args.out is not None:
        from luban import __version__
        from luban.report.roofline import roofline_page

        about = (
            f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
            f"Luban {__version__}; luban bench roofline {shlex.join(argv)}"
        )
        args.out.write_text(
            roofline_page(f"Roofline of {args.model}", rows, fused, traffic, roof, about), encoding="utf-8"
        )


def spec_of(name: str):
    """The specification of a preset or of a model on disk. Raises UsageError for neither."""
    from luban.models.presets import PRESETS, preset

    if name in PRESETS or not Path(name).exists():
        return preset(name)
    from luban.load.model import open_model

    return open_model(name).spec
