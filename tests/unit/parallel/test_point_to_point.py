"""Collectives over point-to-point sends: torch's results, and the bytes of the formulas."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import warm

from luban.parallel.bench import COLLECTIVES, measure
from luban.parallel.point_to_point import PointToPoint

PROCESSES = 4


def uneven(rank: int, size: int, groups: list[dist.ProcessGroup], generator: np.random.Generator) -> None:
    """Tensors of any length, of which chunks and pieces may be empty: all numbers are sums, no byte is sent twice."""
    for _ in range(4):
        length, pieces, lanes, root = (int(n) for n in generator.integers([0, 1, 1, 0], [70, 6, 4, size]))
        tensors = [torch.from_numpy(generator.integers(-99, 99, length)).double() for _ in range(size)]
        group, *more = groups[:lanes]
        ring = PointToPoint(group, pieces, more)
        assert torch.equal(ring.all_reduce(tensors[rank].clone()), sum(tensors))
        sent = torch.tensor(ring.sent)
        dist.all_reduce(sent, group=group)
        assert sent == 2 * (size - 1) * 8 * length
        assert torch.equal(ring.reduce_scatter(tensors[rank]), sum(tensors).tensor_split(size)[rank])
        assert torch.equal(ring.broadcast(tensors[rank].clone(), root), tensors[root])
        summed = ring.reduce(tensors[rank].clone(), root)
        assert rank != root or torch.equal(summed, sum(tensors))
        assert torch.equal(ring.shift(tensors[rank])(), tensors[(rank - 1) % size])
        gathered = ring.gather(tensors[rank], root)
        assert (gathered is None) == (rank != root)
        assert gathered is None or torch.equal(gathered, torch.stack(tensors))
        whole = torch.stack(tensors)
        assert torch.equal(ring.scatter(whole if rank == root else None, tensors[rank], root), tensors[rank])


def worker(rank: int, folder: str, seed: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    for size in range(2, PROCESSES + 1):
        groups = [dist.new_group(list(range(size))) for _ in range(3)]
        if rank < size:
            uneven(rank, size, groups, np.random.default_rng(seed))
    rows = measure(list(COLLECTIVES), [PROCESSES * 2**10], torch.device("cpu"), repeats=1)
    Path(folder, f"{rank}.json").write_text(json.dumps([vars(row) for row in rows]))
    dist.destroy_process_group()


def test_results_and_bytes(tmp_path):
    warm.processes(worker, PROCESSES, str(tmp_path), int(np.random.default_rng().integers(2**31)))
    for rank in range(PROCESSES):
        rows = json.loads((tmp_path / f"{rank}.json").read_text())
        assert [row["collective"] for row in rows] == list(COLLECTIVES)
        for row in rows:  # `measure` has compared the results with torch's
            assert row["sent"] == row["formula"], row
            assert row["sent_by_all"] == row["formula_of_all"], row
