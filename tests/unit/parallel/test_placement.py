"""Parts of parameters, heads and tokens: what is cut can be put together, and every head meets the key head it had."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luban.core.errors import ConfigError
from luban.core.plan import ParallelPlan, even_runs
from luban.parallel.context import slots_of, tokens_of
from luban.parallel.heads import head_runs, local_key_heads
from luban.parallel.placement import Placement, Placements, on_first, replicated
from luban.parallel.stages import stage_parts

RNG = np.random.default_rng()


def test_even_runs_cover_everything_and_differ_by_one_at_most():
    for total in range(30):
        for parts in range(1, 9):
            runs = list(even_runs(total, parts))
            assert [x for begin, end in runs for x in range(begin, end)] == list(range(total))
            sizes = [end - begin for begin, end in runs]
            assert max(sizes) - min(sizes) <= 1 and sorted(sizes, reverse=True) == sizes


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_every_query_head_reads_the_key_head_of_its_group(ranks):
    for key_heads in (1, 2, 3, 4):
        for group in (1, 2, 3, 4):
            heads = key_heads * group
            if heads < ranks:
                with pytest.raises(ConfigError, match=f"at most --plan.tensor {heads}"):
                    head_runs(heads, key_heads, 8, ranks)
                continue
            for begin, end in even_runs(heads, ranks):
                local = local_key_heads(begin, end, group)
                each = (end - begin) // len(local)  # attention lets so many consecutive queries read one key head
                assert [local[i // each] for i in range(end - begin)] == [head // group for head in range(begin, end)]
            if key_heads % ranks == 0:  # then no key head is copied
                runs = head_runs(heads, key_heads, 8, ranks)
                assert sum(end - begin for rank in runs.keys for begin, end in rank) == key_heads * 8


def random_placement(ranks: int) -> Placement:
    shape = tuple(int(n) for n in RNG.integers(4, 9, 2))
    dim = int(RNG.integers(2))
    runs = list(even_runs(shape[dim], ranks))
    extra = [(0, 2)] if RNG.random() < 0.5 else []  # held several times
    return Placement(shape, dim, tuple((run, *extra) for run in runs))


def test_cut_parts_lie_where_regions_say_and_are_counted():
    for _ in range(40):
        ranks = int(RNG.integers(1, 5))
        placement = random_placement(ranks)
        whole, count = torch.randn(placement.shape), torch.zeros(placement.shape[placement.dim])
        for rank in range(ranks):
            held = Placements({"x": placement}, frozenset(), rank, ranks)
            part = placement.cut(whole, rank)
            assert part.shape == placement.local_shape(rank)
            filled = torch.empty_like(part)
            held.take("x", filled, whole)
            assert torch.equal(filled, part) and torch.equal(held.cut("x", whole), part)
            count.index_add_(0, placement.index(rank), torch.ones(part.shape[placement.dim]))
        copies = placement.copies()
        assert torch.equal(count, torch.ones_like(count) if copies is None else copies.float())


def test_what_is_whole_everywhere_or_in_the_first_process():
    assert replicated((3, 2), 4).local_shape(3) == (3, 2)
    first = on_first((5,), 3)
    assert [first.local_shape(rank) for rank in range(3)] == [(5,), (0,), (0,)] and first.copies() is None
    held = Placements({"bias": first}, frozenset(), 1, 3)
    assert not held.holds("bias") and held.holds("other")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_tokens_are_divided_so_that_causal_work_is_equal(ranks):
    tokens = 4 * ranks * 2
    slots = [slots_of(rank, ranks, tokens) for rank in range(ranks)]
    assert torch.equal(torch.cat(slots).sort().values, torch.arange(tokens))
    work = [int((part + 1).sum()) for part in slots]  # keys that causal queries see
    assert len(set(work)) == 1
    batch = {
        "tokens": torch.arange(tokens)[None],
        "positions": torch.arange(2 * tokens).view(1, 2, tokens),
        "labels": torch.zeros(1),
        "document_starts": torch.zeros(1, 4),
    }
    for rank, part in enumerate(slots):
        mine = tokens_of(batch, rank, ranks)
        assert torch.equal(mine["tokens"][0], part) and mine["labels"].shape == (1,)
        assert torch.equal(mine["positions"][0, 1], part + tokens)
        assert ("document_starts" in mine) == (ranks == 1)


def test_stages_share_out_the_layers_of_all_stacks():
    for depths in ([5], [2, 2], [3, 4], [1, 6]):
        for stages in range(1, sum(depths) + 1):
            parts = stage_parts(depths, ParallelPlan(pipeline=stages, microbatches=1).stage_runs(sum(depths)))
            for k, depth in enumerate(depths):
                mine = [stage[k] for stage in parts]
                assert [layer for part in mine for layer in part.layers] == list(range(depth))
                assert sum(part.first for part in mine) == sum(part.last for part in mine) == 1
                last = next(i for i, part in enumerate(mine) if part.last)
                assert [part.finished for part in mine] == [i > last for i in range(stages)]
            sizes = [sum(len(part.layers) for part in stage) for stage in parts]
            assert max(sizes) - min(sizes) <= 1


def test_stages_of_unequal_depths():
    plan = ParallelPlan(pipeline=3, stage_layers=(1, 3, 2))
    parts = stage_parts([2, 4], plan.stage_runs(6))
    assert [[part.layers for part in stage] for stage in parts] == [[(0,), ()], [(1,), (0, 1)], [(), (2, 3)]]
    with pytest.raises(ConfigError, match="6 layers in all, and the model has 7"):
        plan.stage_runs(7)
    for layers in ((1, 2), (0, 3, 3)):
        with pytest.raises(ConfigError, match="each of the 3 stages"):
            ParallelPlan(pipeline=3, stage_layers=layers)


def test_places_of_processes_and_the_nearest_plans():
    plan = ParallelPlan(pipeline=2, replicate=2, shard=3, context=2, tensor=2, microbatches=2)
    assert plan.processes == 48 and plan.readers == 6 and plan.parts == 8
    places = [tuple(plan.place(rank).values()) for rank in range(48)]
    assert len(set(places)) == 48 and places[1] != places[0]
    assert plan.place(1) == {"tensor": 1, "context": 0, "shard": 0, "replicate": 0, "pipeline": 0}
    assert ParallelPlan(tensor=2).over(8) == ParallelPlan(tensor=2, replicate=4)
    with pytest.raises(ConfigError, match=r"plan.tensor 3 needs 3 processes, and there are 4.*--plan.tensor 4"):
        ParallelPlan(tensor=3).over(4)
    with pytest.raises(ConfigError, match=r"use --train.accumulate 4"):
        ParallelPlan(microbatches=4)
    with pytest.raises(ConfigError, match=r"2 micro-batches at a time, and there are 3: use --plan.microbatches 4"):
        ParallelPlan(pipeline=2, microbatches=3, schedule="interleaved").check_batch(6, 1)
    with pytest.raises(ConfigError, match=r"use a multiple of 4, such as --train.seq_len 8"):
        ParallelPlan(context=2).check_tokens(9)
