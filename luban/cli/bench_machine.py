"""`luban bench machine`: how fast this device is by the size of the work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from luban.core.arguments import parse
from luban.core.config import to_toml
from luban.core.errors import UsageError
from luban.core.log import print_result

ABOUT = """Measure matmuls by size, attention, a copy and a kernel launch, and write them as a table for luban plan: name the file as
`machine` in the cluster's file. About a minute on a GPU."""
EXAMPLES = """
luban bench machine --out h100.toml
luban bench machine --out cpu.toml --device cpu --gpu h100-sxm --largest 512    # tries it out on a CPU
"""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the verb takes."""

    out: Path  # the table
    gpu: str | None = None  # row of the table of accelerators; none: that of the device
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda if available
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # of the matmuls
    largest: int = 8192  # side of a matmul


def run(argv: Sequence[str]) -> int:
    """Measure and write."""
    args = parse(Arguments, argv, verb="bench machine", about=ABOUT, examples=EXAMPLES)
    import torch

    from luban.parallel.bench_machine import measure_machine
    from luban.parallel.device import choose_device
    from luban.planner.accelerators import accelerator, accelerator_of, accelerators

    if args.largest < 256:
        raise UsageError(f"--largest is at least 256, not {args.largest}")
    device = choose_device(args.device)
    gpu = args.gpu
    if gpu is None:
        row = accelerator_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        gpu = next((name for name, each in accelerators().items() if each is row), None)
    if gpu is None:
        raise UsageError(
            "this device has no row in the table of accelerators, whose peak the shares refer to: give --gpu, such as "
            "--gpu h100-sxm"
        )
    accelerator(gpu)
    found = measure_machine(gpu, device, getattr(torch, args.dtype), largest=args.largest)
    rounded = {name: _rounded(value) for name, value in found.items()}
    args.out.write_text(to_toml(rounded), encoding="utf-8")
    print_result("\n".join(f"{name:<20} {value}" for name, value in rounded.items()))
    print_result(args.out)
    return 0


def _rounded(value: object) -> object:
    """Numbers of four digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value
