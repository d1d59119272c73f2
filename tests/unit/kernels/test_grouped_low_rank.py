"""Low-rank products of many adapters at once: kernels and their plain form against float64, row by row."""

from __future__ import annotations

import random

import pytest
import torch
from drawn import drawn
from interpreter import DEVICE, HERE, here, run_interpreted

from luban.adapters.stack import Chosen, LowRankStack
from luban.kernels.row_groups import MANY, RowGroupBuffers

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [  # inputs, outputs of each projection
    (96, {"q": 130, "k": 40, "v": 40}),
    (33, {"gate": 150, "up": 150}),
    (257, {"weight": 20}),
    (520, {"q": 64, "k": 16, "v": 16}),
]


@pytest.mark.skipif(HERE, reason="the tests below run here")
@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_under_the_interpreter(chosen):
    run_interpreted(__file__, "-m", chosen)


def spans_of(rng: random.Random, slots: int, rows: int) -> list[tuple[int | None, int]]:
    """Sequences of random lengths, of which some have no slot."""
    spans, left = [], rows
    while left:
        count = rng.randint(1, left) if rng.random() < 0.2 else 1
        spans.append((rng.choice([None, *range(slots)]), count))
        left -= count
    return spans


def stack_of(rng: random.Random, inputs: int, sizes: dict[str, int], slots: int, dtype) -> tuple[LowRankStack, dict]:
    """A stack with factors of random ranks at most of its places, and these."""
    stack = LowRankStack(inputs, sizes, slots, 3, torch.empty(0, dtype=dtype, device=DEVICE), Chosen())
    held = {}
    for slot in range(slots):
        rank = rng.choice([1, 3, 16, 21] if slot else [70])
        for projection, outputs in sizes.items():
            if rng.random() < 0.8:
                a = (torch.randn(rank, inputs, device=DEVICE) / inputs**0.5).to(dtype)
                b, scale = torch.randn(outputs, rank, device=DEVICE).to(dtype), rng.uniform(0.1, 3)
                stack.put(slot, projection, a, b, scale)
                held[slot, projection] = a, b, scale
    return stack, held


def expected(y, x, held, sizes, spans):
    """Float64 outputs, and what rounding of the narrow result may change."""
    found, bound, row = y.double(), torch.zeros_like(y, dtype=torch.float64), 0
    for slot, count in spans:
        start, at = 0, slice(row, row + count)
        for projection, outputs in sizes.items():
            if (slot, projection) in held:
                a, b, scale = held[slot, projection]
                h = x[at].double() @ a.double().t() * scale
                found[at, start : start + outputs] += h @ b.double().t()
                bound[at, start : start + outputs] += h.abs() @ b.double().abs().t()
            start += outputs
        row += count
    return found, bound


@here
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", drawn(range(len(SHAPES)), 1))
def test_every_row_by_the_factors_of_its_slot(shape, dtype):
    rng = random.SystemRandom()
    (inputs, sizes), slots, rows = SHAPES[shape], 4, rng.choice([1, 5, 40, MANY])
    stack, held = stack_of(rng, inputs, sizes, slots, dtype)
    spans = spans_of(rng, slots, rows)
    recorded = max(rows, 48)
    buffers = RowGroupBuffers(slots, recorded, torch.device(DEVICE))
    for size in (None, recorded):  # as it is, and as a recorded forward of more rows reads it
        x = torch.randn(size or rows, inputs, device=DEVICE).to(dtype)
        y = torch.randn(size or rows, sum(sizes.values()), device=DEVICE).to(dtype)
        wanted, bound = expected(y, x, held, sizes, spans)
        stack.chosen.groups = buffers.write(spans, size)
        with torch.inference_mode():
            found = stack.add(y[None].clone(), x[None], sizes)[0]
        # the narrow result is rounded, where there are no kernels also scaled, and what is added; 1e-5: sums in float32
        allowed = torch.finfo(dtype).eps * (wanted.abs() + 2 * bound) + 1e-5
        assert ((found.double() - wanted).abs() <= allowed).all()
        free = [row for row, slot in enumerate(slot for slot, count in spans for _ in range(count)) if slot is None]
        assert torch.equal(found[free], y[free]) and torch.equal(found[rows:], y[rows:])
        start = 0
        for projection, outputs in sizes.items():  # each alone, as where weights aren't multiplied together
            part = slice(start, start + outputs)
            if size is None:
                with torch.inference_mode():
                    one = stack.add(y[None, :, part].clone(), x[None], {projection: outputs})[0]
                assert ((one.double() - wanted[:, part]).abs() <= allowed[:, part]).all()
            start += outputs


@here
@pytest.mark.parametrize("dtype", drawn(DTYPES, 1))
def test_a_row_is_the_same_in_any_batch_where_tiles_are_fixed(dtype):
    """And an adapter that is broken spoils its own rows alone."""
    rng = random.SystemRandom()
    inputs, sizes = 300, {"q": 70, "k": 20, "v": 20}
    stack, _ = stack_of(rng, inputs, sizes, 3, dtype)
    stack.put(1, "k", torch.full((2, inputs), torch.nan), torch.ones(20, 2), 1.0)
    buffers = RowGroupBuffers(3, 90, torch.device(DEVICE), fixed=True)
    x = torch.randn(90, inputs, device=DEVICE).to(dtype)
    y = torch.randn(90, 110, device=DEVICE).to(dtype)
    slots = [rng.choice([None, 0, 1, 2]) for _ in range(90)]

    def read(rows: list[int]) -> torch.Tensor:
        stack.chosen.groups = buffers.write([(slots[row], 1) for row in rows])
        with torch.inference_mode():
            return stack.add(y[rows][None].clone(), x[rows][None], sizes)[0]

    whole = read(list(range(90)))
    for rows in ([5], rng.sample(range(90), 30)):
        assert torch.equal(read(rows).nan_to_num(7), whole[rows].nan_to_num(7))
    broken = torch.tensor([slot == 1 for slot in slots])
    assert whole[broken, 70:90].isnan().all() and whole[~broken].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_kernels(dtype, monkeypatch):
    monkeypatch.setattr("luban.adapters.stack.infers_fused", lambda x: False)
    for shape in range(len(SHAPES)):
        test_every_row_by_the_factors_of_its_slot(shape, dtype)


def test_slots_are_used_again_and_ranks_grow():
    rng = random.SystemRandom()
    sizes = {"q": 12, "k": 6, "v": 6}
    stack, held = stack_of(rng, 9, sizes, 3, torch.float32)
    stack.clear(1)
    held = {place: factors for place, factors in held.items() if place[0] != 1}
    rank = 2 * stack.rank + 1
    held[1, "k"] = torch.randn(rank, 9, device=DEVICE) / 3, torch.randn(6, rank, device=DEVICE), 0.5
    assert stack.put(1, "k", *held[1, "k"]) and not stack.put(1, "k", *held[1, "k"])  # moved by the first alone
    spans = [(slot, 2) for slot in range(3)]
    x, y = torch.randn(6, 9, device=DEVICE), torch.randn(6, 24, device=DEVICE)
    stack.chosen.groups = RowGroupBuffers(3, 6, torch.device(DEVICE)).write(spans)
    with torch.inference_mode():
        found = stack.add(y.clone(), x, sizes)
    torch.testing.assert_close(found.double(), expected(y, x, held, sizes, spans)[0], atol=1e-4, rtol=0)


def test_groups_of_one_size_lie_in_the_same_places():
    buffers = RowGroupBuffers(4, 64, torch.device("cpu"))
    first = buffers.write([(2, 20), (None, 3), (0, 1), (2, 1)], 32)
    again = buffers.write([(None, 1), (3, 1)], 32)
    assert (first.slots.data_ptr(), first.rows.data_ptr()) == (again.slots.data_ptr(), again.rows.data_ptr())
    assert first.rows.shape == again.rows.shape == (32 // 16 + 4, 16) and again.slots.tolist() == [
        3,
        -1,
        -1,
        -1,
        -1,
        -1,
    ]
    assert again.rows[0].tolist() == [1, *[-1] * 15] and (again.rows[1:] == -1).all()
    assert buffers.write([(None, 5)], 32) is None
    whole = buffers.write([(2, 20), (None, 3), (0, 1), (2, 1)])
    assert whole.slots.tolist() == [0, 2, 2] and whole.rows[0].tolist() == [23, *[-1] * 15]
    assert whole.rows[1:].flatten().tolist() == [*range(20), 24, *[-1] * 11]
    assert [(slot, rows.tolist()) for slot, rows in whole.segments] == [(0, [23]), (2, [*range(20), 24])]
