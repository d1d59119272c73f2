"""Which tiles suit Luban's attention kernels: milliseconds of a pass by settings of each kernel, on a GPU.

    python benchmarks/attention_tiles.py packed sparse               half a minute a case and width on an H100
    python benchmarks/attention_tiles.py alibi --widths 128

Cases: rows with a bias, documents in packs (512 tokens on average), a block-sparse layout of a tenth, whose blocks of 64 are
the tiles. “Off by”: how far outputs and gradients are from those of the settings in use.
"""

from __future__ import annotations

import argparse

import torch
from attention import inputs, milliseconds, random_layout

from luban.kernels.distance import alibi, alibi_slopes, kerple_log
from luban.kernels.flash import launch
from luban.kernels.flash.attention import flash_attention, prepared
from luban.kernels.intervals import intervals

T, MEAN = 8192, 512  # tokens a row, and of a document

SHORT = {  # rows, columns, warps, stages, registers a thread at most
    "forward": [(64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 3), (64, 32, 4, 4), (128, 64, 8, 2, 128), (128, 64, 4, 3)],
    "keys": [(64, 64, 4, 2), (64, 64, 4, 2, 168), (64, 64, 4, 3), (32, 64, 4, 3), (32, 64, 4, 3, 128), (64, 128, 8, 2)],
    "queries": [
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 32, 4, 2),
        (64, 32, 4, 3),
        (128, 64, 8, 2, 128),
        (128, 32, 8, 2, 128),
    ],
}
LONG = {
    "forward": [(128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 3), (64, 128, 4, 2)],
    "keys": [(64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 2), (128, 64, 8, 2), (32, 64, 4, 3)],
    "queries": [(128, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3), (128, 32, 4, 3), (128, 128, 8, 2)],
}


def cases(D):
    """By name: a call, and what gradients are taken of."""
    torch.manual_seed(0)
    qkv = inputs(T, D)
    B, H = qkv[0].shape[:2]
    documents = (torch.rand(B, T, device="cuda") < 1 / MEAN).cumsum(1).int()
    mask = prepared(intervals(T, T, documents=documents, device="cuda"), T)
    numbers = [torch.rand(H, device="cuda").add(0.5).requires_grad_() for _ in range(2)]
    slopes, layout = alibi_slopes(H, "cuda"), random_layout(T, 0.1)
    return {
        "alibi": (lambda: flash_attention(*qkv, bias=alibi(slopes, T)), qkv),
        "log": (lambda: flash_attention(*qkv, bias=kerple_log(*numbers, T, D**-0.5)), [*qkv, *numbers]),
        "packed": (lambda: flash_attention(*qkv, mask=mask), qkv),
        "sparse": (lambda: flash_attention(*qkv, layout=layout), qkv),
    }


def sweep(case, D, call, leaves):
    """Each kernel by each of its settings, the other two left as they are."""
    usual, out = launch.tiles, call()
    do = torch.randn_like(out)
    want = [out, *torch.autograd.grad(out, leaves, do)]
    for which, settings in (SHORT if case in ("packed", "sparse") else LONG).items():
        for setting in settings:
            if case == "sparse" and setting[:2] != (64, 64):
                continue

            def chosen(width, name, *rest, which=which, setting=setting, **more):
                return launch.Tiles(*setting) if name == which else usual(width, name, *rest, **more)

            launch.tiles = chosen
            try:
                found = timed(which, call, leaves, do, want)
            except Exception as error:  # a setting that asks for more than there is
                found = f"failed: {str(error)[:60]}"
            finally:
                launch.tiles = usual
            print(f"{case} D={D} {which} {setting}: {found}", flush=True)


def timed(which, call, leaves, do, want):
    out = call()

    def backward():
        return torch.autograd.grad(out, leaves, do, retain_graph=True)

    off = max(float((a - b).norm() / b.norm()) for a, b in zip([out, *backward()], want, strict=True))
    return f"{milliseconds(call if which == 'forward' else backward, 0.05):.3f} ms of the pass, off by {off:.1e}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=["alibi", "log", "packed", "sparse"])
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 128], help="of heads")
    call = parser.parse_args()
    for D in call.widths:
        made = cases(D)
        for case in call.cases:
            sweep(case, D, *made[case])


if __name__ == "__main__":
    main()
