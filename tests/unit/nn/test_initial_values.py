"""Initial values depend on seed, name and place alone, so that any shard of a parameter holds what the whole would."""

from __future__ import annotations

import random

import pytest
import torch

from luban.nn.init import BLOCK, InitialValues, Region, whole

SHAPES = [(7,), (3 * BLOCK + 5,), (300, 70), (2, BLOCK + 1), (5000, 40), (64, 9, 11, 3), (0, 4), (4, 0)]


def values(
    shape: tuple[int, ...], region=whole, seed: int = 3, name: str = "weight", dtype=torch.float32, std=1.0
) -> torch.Tensor:
    torch.manual_seed(random.randrange(10**6))  # which must not matter
    return InitialValues(seed, "layers.0", region).normal(name, torch.empty(shape, dtype=dtype), std)


@pytest.mark.parametrize("shape", SHAPES)
def test_any_region_holds_what_the_whole_does(shape):
    right = values(shape)
    for _ in range(8):
        begins = tuple(random.randint(0, size) for size in shape)
        ends = tuple(random.randint(begin, size) for begin, size in zip(begins, shape, strict=True))
        here = tuple(slice(begin, end) for begin, end in zip(begins, ends, strict=True))
        drawn = values(shape, lambda _, tensor, here=here, begins=begins: Region(shape, [(tensor[here], begins)]))
        assert torch.equal(drawn[here], right[here])


@pytest.mark.parametrize("shape", [(400, 500), (2 * BLOCK + 1,)])
def test_they_are_standard_normal_and_no_two_blocks_are_alike(shape):
    drawn = values(shape).flatten()
    error = drawn.numel() ** -0.5
    assert abs(float(drawn.mean())) < 5 * error and abs(float(drawn.var()) - 1) < 5 * 2**0.5 * error
    assert abs(float((drawn[:-BLOCK] * drawn[BLOCK:]).mean())) < 5 * (drawn.numel() - BLOCK) ** -0.5


def test_they_depend_on_seed_and_name_and_not_on_the_dtype():
    right = values((50, 20))
    assert torch.equal(values((50, 20), dtype=torch.float64).float(), right)
    assert torch.equal(values((50, 20), dtype=torch.bfloat16), right.bfloat16())
    assert torch.equal(values((50, 20), dtype=torch.bfloat16, std=0.02), (right * 0.02).bfloat16())  # rounded once
    assert not torch.equal(values((50, 20), seed=4), right) and not torch.equal(values((50, 20), name="bias"), right)


def test_values_of_the_whole_are_cut_to_the_region():
    shape = (6, 5)
    full = torch.randn(shape)
    region = lambda _, tensor: Region(shape, [(tensor[2:4, 1:], (2, 1))])  # noqa: E731
    placed = InitialValues(0, "", region).placed("weight", full, torch.empty(shape))
    assert torch.equal(placed[2:4, 1:], full[2:4, 1:])


def test_a_parameter_in_pieces_of_a_larger_one_holds_their_rows_and_columns():
    right = values((300, 70))
    for dim in (0, 1):
        runs = [(5, 25), (40, 41), (5, 10)]  # a run may come twice
        size = sum(end - begin for begin, end in runs)
        shape = (size, 70) if dim == 0 else (300, size)

        def region(_, tensor, dim=dim, runs=runs):
            parts = tensor.split([end - begin for begin, end in runs], dim)
            begins = [(begin, 0) if dim == 0 else (0, begin) for begin, _ in runs]
            return Region((300, 70), list(zip(parts, begins, strict=True)))

        wanted = torch.cat([right.narrow(dim, begin, end - begin) for begin, end in runs], dim)
        assert torch.equal(values(shape, region), wanted)
