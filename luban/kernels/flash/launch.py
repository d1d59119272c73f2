"""The kernels as operators of torch, so that a compiler sees two opaque calls with known shapes and gradients.

B batch, H query heads, K key heads (K divides H), T queries, S keys, D head width. Results are laid out as the
projections around attention want them: (B, T, H, D) in memory, seen as (B, H, T, D).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from luban.kernels.available import INTERPRETED
from luban.kernels.distance import LOG2E
from luban.kernels.flash import backward, forward
from luban.kernels.flash.tile import ALIBI, LOG, NONE, POWER, TABLE

SIDE = 32 if INTERPRETED else 64  # of the tile that a program keeps where rows see intervals: that of `work_items`
NEAR = 2**25  # bytes that the second-level cache keeps for sure: an H100's has 50 MB in two halves
LN2 = 0.6931471805599453
KINDS = {"none": NONE, "alibi": ALIBI, "power": POWER, "log": LOG, "buckets": TABLE}

OPERANDS = (
    "Tensor q, Tensor k, Tensor v, Tensor? numbers, Tensor? weight, Tensor? table, Tensor? buckets, Tensor? start, "
    "Tensor? stop, Tensor? seeing, Tensor? items, Tensor? query_list, Tensor? query_count, Tensor? key_list, Tensor? key_count, "
    "str form, int zero, int reach, int block, bool backward_only, float scale"
)


@dataclass(frozen=True)
class Tiles:
    """Block shapes and launch settings of one kernel."""

    rows: int  # BM, queries a tile
    cols: int  # BN, keys a tile
    warps: int
    stages: int
    registers: int | None = None  # a thread at most, so that more programs share a multiprocessor


def tiles(width: int, which: str, sparse_block: int = 0, intervals: bool = False, curved: bool = False) -> Tiles:
    """Settings by head width, measured on an H100 (`benchmarks/attention_tiles.py`); a block-sparse layout fixes both
    sides to its block. Where rows see short intervals, smaller tiles waste less, and several programs a multiprocessor hide
    each other's beginnings; biases of KERPLE and T5 (`curved`) and their gradients need registers."""
    few = None if curved else 128  # registers, that let four programs in
    if INTERPRETED:
        table = {"forward": Tiles(32, 16, 4, 1), "keys": Tiles(16, 32, 4, 1), "queries": Tiles(32, 16, 4, 1)}
    elif width <= 64 and intervals:
        table = {
            "forward": Tiles(64, 64, 4, 3, few),
            "keys": Tiles(32, 64, 4, 2 if curved else 3, few),
            "queries": Tiles(64, 64, 4, 3),
        }
    elif width <= 128 and intervals:
        table = {"forward": Tiles(64, 64, 4, 3), "keys": Tiles(64, 64, 4, 2), "queries": Tiles(64, 64, 4, 2)}
    elif width <= 64:
        table = {
            "forward": Tiles(128, 64, 4, 3),
            "keys": Tiles(64, 64, 4, 3),
            "queries": Tiles(128, 64, 8, 2) if curved else Tiles(64, 64, 4, 3),
        }
    elif width <= 128:
        keys = Tiles(64, 128, 8, 2) if curved else Tiles(64, 64, 4, 2)
        table = {"forward": Tiles(128, 128, 8, 3), "keys": keys, "queries": Tiles(128, 64, 8, 3)}
    else:
        table = {"forward": Tiles(64, 32, 4, 2), "keys": Tiles(32, 64, 4, 1), "queries": Tiles(64, 32, 4, 1)}
    if sparse_block == 64 and width <= 64 and not curved:
        table = {"forward": Tiles(64, 64, 4, 3, few), "keys": Tiles(64, 64, 4, 2, 168), "queries": Tiles(64, 64, 4, 3)}
    elif sparse_block:
        stages = 3 if (width <= 64 and which != "keys") or which == "forward" else 2
        return Tiles(sparse_block, sparse_block, 4 if sparse_block <= 64 else 8, stages if width <= 128 else 1)
    return table[which]


def _by_token(x: Tensor) -> Tensor:
    """Uninitialised (B, H, T, D) like x, whose heads of one token lie side by side."""
    B, H, T, D = x.shape
    return torch.empty(B, T, H, D, dtype=x.dtype, device=x.device).transpose(1, 2)


def fetches_tiles(device: torch.device) -> bool:
    """True if the GPU has hardware tile copies (TMA), which use a tensor descriptor: Hopper and later."""
    return INTERPRETED or torch.cuda.get_device_capability(device) >= (9, 0)


def readable(x: Tensor, fetched: bool) -> Tensor:
    """x, or a copy of it where pointers, or the hardware that fetches tiles of it, could not read it."""
    unit = 16 // x.element_size()  # the hardware takes steps of whole 16 bytes
    steps = [step for size, step in zip(x.shape[:-1], x.stride(), strict=False) if size > 1]
    fine = not fetched or (x.data_ptr() % 16 == 0 and all(step and step % unit == 0 for step in steps))
    return x if x.stride(-1) == 1 and fine else x.clone(memory_format=torch.contiguous_format)


def kept(x: Tensor) -> tuple:
    """(B, heads, length, D) as kernels read or write one tile of it (`load_tile`)."""
    return x, *x.stride()[:3], *x.shape[2:]


def walked(x: Tensor, rows: int, width: int, fetched: bool) -> TensorDescriptor | tuple:
    """(B, heads, length, D), `readable`, as kernels walk over it in tiles of `rows` places and a padded width (`fetch_tile`)."""
    if not fetched:
        return kept(x)
    steps = [step if size > 1 else x.shape[-1] for size, step in zip(x.shape, x.stride(), strict=True)]
    return TensorDescriptor(x, list(x.shape), [*steps[:3], 1], [1, 1, rows, width])


class _Call:
    """Arguments shared by all kernel launches of one attention."""

    def __init__(self, q, k, numbers, table, start, items, form, zero, reach, block, backward_only, scale):
        self.B, self.H, self.T, self.dim = q.shape
        self.K, self.S = k.shape[1:3]
        self.padded = max(16, 1 << (self.dim - 1).bit_length())
        self.intervals = start is not None
        self.interval_stride = 0 if start is None or start.shape[0] == 1 else start.stride(0)
        self.items = None if block else items
        self.fetch = fetches_tiles(q.device)
        self.kind = KINDS[form]
        self.numbers = q if numbers is None else numbers
        self.table, self.table_stride = (q, 0) if table is None else (table, table.stride(0))
        self.block, self.scale, self.zero, self.reach = block, scale, zero, reach
        self.curved = form in ("power", "log", "buckets")
        self.linear = form == "alibi" and backward_only

    def lists(self, blocks: Tensor | None, counts: Tensor | None) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
        """A layout's block lists and their strides; a layout of one head serves all."""
        if blocks is None or counts is None:
            return self.table, self.table, (0, 0, 0)
        one = blocks.shape[0] == 1
        return blocks, counts, (0 if one else blocks.stride(0), blocks.stride(1), 0 if one else counts.stride(0))

    def walked(self, x: Tensor, rows: int) -> TensorDescriptor | tuple:
        """(B, heads, length, D) in tiles of `rows` places."""
        return walked(x, rows, self.padded, self.fetch)

    def order(self, own: Tensor, other: Tensor, side: int, which: int) -> tuple[tuple[int, int], Tensor, dict]:
        """How programs follow each other that keep `side` places of a head of one tensor and walk over another and its like
        (K and V, or Q and dO), `own_block`: the grid, the listed blocks, if they are listed, and the constants. Without a
        list a power of two of heads stand side by side, so that kernels are compiled for few numbers of them."""
        B, heads, length, _ = own.shape
        blocks = -(-length // side)
        if self.items is not None and side == SIDE:
            rows = self.items.shape[1] // blocks
            return (rows * blocks * heads, B // rows), self.items[which], {"EACH": heads, "ORDERED": True}
        fit = max(1, NEAR * heads // (2 * other[0].numel() * other.element_size()))
        each = min(1 << (fit.bit_length() - 1), (B * heads) & -(B * heads))
        return (blocks * each, B * heads // each), self.table, {"EACH": each, "ORDERED": False}

    def constants(self, t: Tiles) -> dict:
        """Compile-time values of every kernel that walks tiles."""
        return {
            "H": self.H,
            "GROUP": self.H // self.K,
            "D": self.padded,
            "BM": t.rows,
            "BN": t.cols,
            "BIAS": self.kind,
            "LINEAR": self.linear,
            "INTERVALS": self.intervals,
            "SPARSE": self.block > 0,
            "FETCH": self.fetch,
            "UPCAST": INTERPRETED,
            "num_warps": t.warps,
            "num_stages": t.stages,
            "maxnreg": t.registers,
        }


def _forward(
    q,
    k,
    v,
    numbers,
    weight,
    table,
    buckets,
    start,
    stop,
    seeing,
    items,
    query_list,
    query_count,
    key_list,
    key_count,
    form,
    zero,
    reach,
    block,
    backward_only,
    scale,
):
    call = _Call(q, k, numbers, table, start, items, form, zero, reach, block, backward_only, scale)
    out, lse = _by_token(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if not q.numel():
        return out, lse
    q, k, v = readable(q, False), readable(k, call.fetch), readable(v, call.fetch)
    gathering = call.kind == TABLE  # from a table, which takes shared memory for every stage
    t = tiles(call.dim, "forward", block, call.intervals or gathering, call.curved)
    lists, counts, strides = call.lists(query_list, query_count)
    grid, listed, placed = call.order(q, k, t.rows, 0)
    forward.forward_kernel[grid](
        kept(q),
        call.walked(k, t.cols),
        call.walked(v, t.cols),
        kept(out),
        lse,
        lse if start is None else start,
        lse if stop is None else stop,
        listed,
        call.table,
        call.numbers,
        lists,
        counts,
        call.interval_stride,
        call.table_stride,
        *strides,
        call.T,
        call.S,
        scale * LOG2E,
        zero,
        reach,
        **placed,
        **call.constants(t),
    )
    return out, lse


def _backward(
    do,
    out,
    lse,
    q,
    k,
    v,
    numbers,
    weight,
    table,
    buckets,
    start,
    stop,
    seeing,
    items,
    query_list,
    query_count,
    key_list,
    key_count,
    form,
    zero,
    reach,
    block,
    backward_only,
    scale,
    learned,
):
    call = _Call(q, k, numbers, table, start, items, form, zero, reach, block, backward_only, scale)
    width = 0 if weight is None else weight.shape[1]
    if not q.numel():
        return _by_token(q), _by_token(k).zero_(), _by_token(v).zero_(), lse.new_zeros(call.H, width or 2)
    do, q, k, v = (readable(x, call.fetch) for x in (do, q, k, v))
    delta = torch.empty_like(lse)
    start, stop, seeing = (lse if x is None else x for x in (start, stop, seeing))
    dq, sums = _queries_gradient(
        call, q, k, v, out, do, lse, delta, start, stop, buckets, query_list, query_count, learned, width
    )
    dk, dv = _keys_gradient(call, q, k, v, do, lse, delta, seeing, key_list, key_count)
    return dq, dk, dv, sums


def _keys_gradient(call, q, k, v, do, lse, delta, seeing, key_list, key_count):
    t = tiles(call.dim, "keys", call.block, call.intervals, call.curved)
    dk, dv = _by_token(k), _by_token(k)
    grid, items, placed = call.order(k, q, t.cols, 1)
    lists, counts, strides = call.lists(key_list, key_count)
    backward.keys_kernel[grid](
        call.walked(q, t.rows),
        kept(k),
        kept(v),
        call.walked(do, t.rows),
        lse,
        delta,
        kept(dk),
        kept(dv),
        seeing,
        items,
        call.table,
        call.numbers,
        lists,
        counts,
        seeing.stride(0) if call.interval_stride else 0,
        call.table_stride,
        *strides,
        call.T,
        call.S,
        call.scale * LOG2E,
        call.scale,
        call.zero,
        call.reach,
        WHOLE=call.T % t.rows == 0,
        **placed,
        **call.constants(t),
    )
    return dk, dv


def _queries_gradient(
    call, q, k, v, out, do, lse, delta, start, stop, buckets, query_list, query_count, learned, width
):
    t = tiles(call.dim, "queries", call.block, call.intervals, call.curved)
    dq, blocks = _by_token(q), -(-call.T // t.rows)
    bucketed, moments = learned and width > 0, learned and width == 0
    shape = (call.B, call.H, blocks, width or 2)
    sums = torch.zeros(shape, dtype=torch.float32, device=q.device) if learned else lse
    lists, counts, strides = call.lists(query_list, query_count)
    grid, items, placed = call.order(q, k, t.rows, 0)
    backward.queries_kernel[grid](
        kept(q),
        call.walked(k, t.cols),
        call.walked(v, t.cols),
        kept(out),
        kept(do),
        lse,
        delta,
        kept(dq),
        start,
        stop,
        items,
        call.table,
        call.numbers,
        buckets if bucketed else lse,
        sums,
        lists,
        counts,
        call.interval_stride,
        call.table_stride,
        *strides,
        call.T,
        call.S,
        call.scale * LOG2E,
        call.scale,
        call.zero,
        call.reach,
        MOMENTS=moments,
        BUCKETS=width if bucketed else 0,
        **placed,
        **call.constants(t),
    )
    return dq, sums.sum((0, 2)) if learned else lse.new_empty(call.H, width or 2)


flash_forward = torch.library.custom_op(
    "luban::flash_forward", _forward, mutates_args=(), schema=f"({OPERANDS}) -> (Tensor, Tensor)"
)
flash_backward = torch.library.custom_op(
    "luban::flash_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor do, Tensor out, Tensor lse, {OPERANDS}, bool learned) -> (Tensor, Tensor, Tensor, Tensor)",
)


@flash_forward.register_fake
def _(q, *rest):
    return _by_token(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@flash_backward.register_fake
def _(do, out, lse, q, k, v, numbers, weight, *rest):
    return _by_token(q), _by_token(k), _by_token(k), lse.new_empty(q.shape[1], 2 if weight is None else weight.shape[1])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*output, *inputs[:15])
    ctx.rest = inputs[15:]


def _differentiate(ctx, do, _):
    out, lse, *tensors = ctx.saved_tensors
    numbers = tensors[3]
    learned = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    dq, dk, dv, sums = flash_backward(do, out, lse, *tensors, *ctx.rest, learned)
    by_numbers = _numbers_gradient(ctx.rest[0], numbers, sums) if ctx.needs_input_grad[3] else None
    return dq, dk, dv, by_numbers, sums if ctx.needs_input_grad[4] else None, *[None] * 16


def _numbers_gradient(form: str, numbers: Tensor, sums: Tensor) -> Tensor:
    """(H, 2), from row sums of (gradient of the score) × Δ^r2 and × Δ^r2·log₂Δ (power), or × log₂(1 + r2·Δ) and
    × Δ / (1 + r2·Δ) (log). The bias in base 2 is −n1·Δ^n2 or −n1·log₂(1 + n2·Δ), ln 2 of it in natural units."""
    by_first = -LN2 * sums[:, 0]
    by_second = -numbers[:, 0] * sums[:, 1] * (LN2 * LN2 if form == "power" else 1.0)
    return torch.stack([by_first, by_second], 1)


flash_forward.register_autograd(_differentiate, setup_context=_save)
