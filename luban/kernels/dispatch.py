"""Which attention runs: the fastest of those that can serve the case, by measured rates.

    from luban.kernels import dispatch
    print(dispatch.explain(Case(device="cuda", capability=(9, 0), dtype=torch.bfloat16, width=128, kind="causal")))
    model(tokens, attention=AttentionBackend("luban"))       # or LUBAN_ATTENTION=luban in the environment

A choice is made once for all layers of a forward; under torch.compile, while the graph is traced.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch

from luban.core.errors import ConfigError, UnsupportedError, nearest
from luban.core.log import warn
from luban.kernels.attention_mask import Kind
from luban.kernels.attention_rates import PACKED_RATES, RATES
from luban.kernels.available import INSTALLED, INTERPRETED, unusable
from luban.kernels.limits import BLOCK_SIDES
from luban.kernels.tracing import constant_in_graphs

HALF = (torch.bfloat16, torch.float16)
VARIABLE = "LUBAN_ATTENTION"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs of a kernel choice; all are known without a device-to-host sync."""

    device: str  # "cpu", "cuda"
    dtype: torch.dtype  # of the matmuls
    width: int  # D, of a head
    kind: Kind  # of mask
    bias: str | None = None  # form of a distance bias; "any": one that is no function of the distance
    too_many_documents: bool = False  # packed documents: so many that a list of them doesn't pay
    block: int = 0  # side of the blocks of a layout that restricts the mask; 0: there is none
    square: bool = True  # as many queries as keys
    single: bool = False  # one query alone, as when text is generated
    training: bool = True  # gradients are wanted, and shapes stay the same from step to step
    capability: tuple[int, int] | None = None  # of a CUDA device

    def __str__(self) -> str:
        packed = "many packed documents" if self.too_many_documents else "packed documents"
        mask = {
            "all": "no mask",
            "causal": "causal",
            "packed": packed,
            "intervals": "intervals of keys",
            "irregular": "irregular mask",
        }
        sparse = [f"in blocks of {self.block}"] if self.block else []
        bias = [] if self.bias is None else ["another bias" if self.bias == "any" else f"{self.bias} bias"]
        dtype = str(self.dtype).removeprefix("torch.").replace("bfloat16", "bf16").replace("float", "fp")
        return ", ".join([mask[self.kind], *sparse, *bias, dtype, f"heads of {self.width}"])


NAMES = {
    "flash4": "FlashAttention-4",
    "cudnn": "cuDNN",
    "luban": "Luban's Triton kernel",
    "flash2": "FlashAttention-2",
    "torch": "torch's scaled_dot_product_attention",
}


def refusal(path: str, case: Case) -> str | None:
    """Why a kernel can't serve the case; None where it can."""
    if path == "torch":
        return None
    if path == "luban" and case.device == "cpu" and INTERPRETED:
        return _beyond_luban(case)
    if case.device != "cuda":
        return f"it needs a CUDA GPU, and this is {case.device}"
    return {"cudnn": _beyond_cudnn, "flash2": _beyond_flash2, "flash4": _beyond_flash4, "luban": _beyond_luban}[path](
        case
    )


def _beyond_plain(case: Case, capability: tuple[int, int], widest: int, packed: bool = False) -> str | None:
    """Reason why a kernel for plain masks doesn't support the case; None if it does.

    Args:
        packed: the kernel also supports lists of documents.
    """
    if case.capability is None or case.capability < capability:
        return f"it needs compute capability {capability[0]}.{capability[1]} or later"
    if case.dtype not in HALF:
        return "it works in bf16 and fp16 alone"
    if case.width > widest or case.width % 8:
        return f"it needs heads of a width that 8 divides, up to {widest}"
    if case.bias is not None:
        return "it adds no bias"
    if case.block:
        return "it knows no block-sparse layouts"
    if case.kind == "packed" and packed:
        return None
    if case.kind not in ("all", "causal") or (case.kind == "causal" and not case.square):
        lists = ", lists of packed documents" if packed else ""
        return f"it serves plain causal rows{lists} and rows without a mask alone"
    return None


def _beyond_cudnn(case: Case) -> str | None:
    return _beyond_plain(case, (8, 0), 128)


def _beyond_flash2(case: Case) -> str | None:
    return _beyond_plain(case, (8, 0), 256)


def _beyond_flash4(case: Case) -> str | None:
    if case.width not in (64, 128):
        return "it is trusted with heads of 64 and 128 alone"  # others gave wrong gradients, without a word
    return flash4_missing() or _beyond_plain(case, (9, 0), 128, packed=True)


def _beyond_luban(case: Case) -> str | None:
    if not INSTALLED:
        return "Triton is not installed"
    if case.device == "cuda" and (case.capability is None or case.capability < (8, 0)):
        return "it needs compute capability 8.0 or later"
    if case.dtype not in HALF and case.device == "cuda":
        return "it is fast in bf16 and fp16 alone"
    if case.width > 256:
        return "it holds heads of a width up to 256"
    if case.dtype == torch.float64:
        return "it leaves float64 to references"
    if case.block and not case.square:
        return "it takes block-sparse layouts for whole rows alone"
    if case.block and case.block not in BLOCK_SIDES:
        return f"it has tiles for blocks of {', '.join(map(str, BLOCK_SIDES))}"
    if case.block > 64 and case.width > 128:
        return "its blocks of 128 are for heads of at most 128"
    if case.bias == "any":
        return "it takes biases of the distance between slots, and this is no function of that"
    if case.kind == "irregular":
        return "it takes masks in which a query sees one interval of keys, and here some see several"
    return None


@cache
def flash4_missing() -> str | None:
    """Why flash-attn-4 can't be used; None where it can."""
    return unusable("flash-attn-4", "flash_attn", lambda: import_module("luban.kernels.flash4").load(), "attention")


_warned: set[str] = set()
chosen: dict[str, str] = {}  # case → kernel of every choice so far, for logs and reports


def check_kernel(kernel: str | None, where: str = "") -> str | None:
    """`kernel`, or None for "auto". Raises ConfigError for an unknown name."""
    if kernel in (None, "auto"):
        return None
    if kernel not in NAMES:
        raise ConfigError(f"unknown attention '{kernel}'{where}{nearest(kernel, NAMES)}")
    return kernel


def pick(case: Case, kernel: str | None = None) -> str:
    """The name of the kernel for a case.

    Args:
        kernel: asked for by name; None: that of the environment's LUBAN_ATTENTION, or the fastest.

    Raises:
        UnsupportedError: a kernel was asked for by name that can't serve the case.
    """
    wanted, where = kernel, ""
    if wanted is None and os.environ.get(VARIABLE):
        wanted, where = os.environ[VARIABLE], f" in the environment's {VARIABLE}"
    wanted = check_kernel(wanted, where)
    if wanted is None:
        return fastest(case)
    if reason := refusal(wanted, case):
        raise UnsupportedError(
            f"{NAMES[wanted]} can't compute this attention ({case}): {reason}; it was asked for by name"
            f"{where}, and without one the fastest that can is picked (--train.attention auto)"
        )
    return wanted


def fastest(case: Case) -> str:
    """The kernel with the highest measured rate of those that can serve the case; torch's own where there is none,
    which is said once in training, and where it costs a square of memory."""
    plain = case.bias is None and not case.block and case.kind in ("all", "causal")
    if case.device != "cuda" or case.single or (plain and not case.training):
        return "torch"  # generation changes shapes at every token, for which others plan or compile anew
    able = [path for path in dict.fromkeys(name for name, _ in RATES) if refusal(path, case) is None]
    if case.too_many_documents:  # who asked for it by name gets it all the same
        able = [path for path in able if path != "flash4"]
    if able:
        return max(able, key=lambda path: _rate(path, case))
    if case.training or case.square:
        _warn_once(case, refusal("luban", case))
    return "torch"


def _rate(path: str, case: Case) -> float:
    """Forward and backward together (1 : 2.5 of the work), in TFLOP/s."""
    table = RATES | PACKED_RATES if case.kind == "packed" else RATES
    up_to = min(limit for name, limit in table if name == path and limit >= case.width)
    forward, backward = table[path, up_to]
    return 3.5 / (1 / forward + 2.5 / backward)


def _warn_once(case: Case, reason: str | None) -> None:
    if reason and reason not in _warned:
        _warned.add(reason)
        written = case.kind not in ("all", "causal") or case.bias or case.block
        square = "" if not written else ", with queries × keys written out"
        warn(f"attention falls back to {NAMES['torch']}{square} ({case}): Luban's kernel can't serve it, {reason}")


def explain(case: Case, kernel: str | None = None) -> str:
    """One line: what would run, and why not each of the others."""
    path = pick(case, kernel)
    others = [f"{NAMES[p]}: {reason}" for p in NAMES if p != path and (reason := refusal(p, case))]
    return f"attention: {NAMES[path]} ({case})" + "".join(f"; not {line}" for line in others)


def report() -> list[str]:
    """A line for every case that was met so far."""
    return [f"attention: {NAMES[path]} ({case})" for case, path in chosen.items()]


@constant_in_graphs
def choice(
    device: str,
    dtype: torch.dtype,
    width: int,
    kind: Kind,
    bias: str | None,
    square: bool,
    single: bool,
    training: bool,
    too_many_documents: bool,
    block: int,
    kernel: str | None = None,
) -> str:
    """`pick` from plain values, for graphs that are being traced; remembered for `report`."""
    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    case = Case(
        device=device,
        dtype=dtype,
        width=width,
        kind=kind,
        bias=bias,
        square=square,
        single=single,
        training=training,
        too_many_documents=kind == "packed" and too_many_documents,
        block=block,
        capability=capability,
    )
    chosen[str(case)] = pick(case, kernel)
    return chosen[str(case)]
