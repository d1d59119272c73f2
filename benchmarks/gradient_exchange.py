"""Ways to give every process its rows of the summed gradients of a layer, as ZeRO 2 does: milliseconds a layer, and what each needs.

    python benchmarks/gradient_exchange.py --gpus 2
    python benchmarks/gradient_exchange.py --tiny    # two processes of a CPU over Gloo: that all give the same sums

Gradients of a layer of the LLaMA shape of `multi_gpu.py` in bf16, 44M numbers. `rows` sends every gradient's rows from where they lie,
a message each; `packed` copies them into one message a process; `all_to_all` is the same by the collective; `reduce-scatter`
sums in NCCL, in fp32 (after a copy to fp32) and in bf16, whose rounding at every step the others don't have. Counted
bound: (N - 1) / N of the bytes over the GPU's NVLink.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

LAYER = [
    (2048, 2048),
    (256, 2048),
    (256, 2048),
    (2048, 2048),
    (5632, 2048),
    (5632, 2048),
    (2048, 5632),
    (2048,),
    (2048,),
]
TINY = [(8, 4), (2, 4), (16, 4), (4,)]
Way = Callable[[list[Tensor]], Tensor]


def parts_of(gradients: list[Tensor], rank: int, size: int) -> list[Tensor]:
    """The rows of one process, flat; all divide evenly here."""
    return [gradient.chunk(size)[rank].reshape(-1) for gradient in gradients]


def own(gradients: list[Tensor]) -> Tensor:
    """(N, numbers of a process) with its own rows where they belong."""
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = parts_of(gradients, rank, size)
    arrived = mine[0].new_empty(size, sum(map(len, mine)))
    torch.cat(mine, out=arrived[rank])
    return arrived


def by_rows(gradients: list[Tensor]) -> Tensor:
    """See the top."""
    rank, size, arrived = dist.get_rank(), dist.get_world_size(), own(gradients)
    operations = []
    for distance in range(1, size):
        to, source = (rank + distance) % size, (rank - distance) % size
        theirs = parts_of(gradients, to, size)
        for tag, (part, row) in enumerate(zip(theirs, arrived[source].split([len(p) for p in theirs]), strict=True)):
            operations += [dist.P2POp(dist.isend, part, to, tag=tag), dist.P2POp(dist.irecv, row, source, tag=tag)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return arrived.sum(0, dtype=torch.float32)


def packed(gradients: list[Tensor]) -> Tensor:
    """See the top."""
    rank, size, arrived = dist.get_rank(), dist.get_world_size(), own(gradients)
    operations = []
    for distance in range(1, size):
        to, source = (rank + distance) % size, (rank - distance) % size
        operations += [
            dist.P2POp(dist.isend, torch.cat(parts_of(gradients, to, size)), to),
            dist.P2POp(dist.irecv, arrived[source], source),
        ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return arrived.sum(0, dtype=torch.float32)


def all_to_all(gradients: list[Tensor]) -> Tensor:
    """See the top."""
    size = dist.get_world_size()
    sent = torch.cat([part for rank in range(size) for part in parts_of(gradients, rank, size)])
    arrived = torch.empty_like(sent)
    dist.all_to_all_single(arrived, sent)
    return arrived.view(size, -1).sum(0, dtype=torch.float32)


def reduce_scatter(dtype: torch.dtype) -> Way:
    """See the top."""

    def way(gradients: list[Tensor]) -> Tensor:
        size = dist.get_world_size()
        sent = torch.cat([part for rank in range(size) for part in parts_of(gradients, rank, size)]).to(dtype)
        summed = sent.new_empty(len(sent) // size)
        dist.reduce_scatter_tensor(summed, sent)
        return summed.float()

    return way


WAYS: dict[str, Way] = {
    "rows": by_rows,
    "packed": packed,
    "all_to_all": all_to_all,
    "reduce-scatter fp32": reduce_scatter(torch.float32),
    "reduce-scatter bf16": reduce_scatter(torch.bfloat16),
}


def worker(rank: int, size: int, call: argparse.Namespace) -> None:
    """One process: check, time, print."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(call.port),
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
    }
    device = torch.device("cpu") if call.tiny else torch.device("cuda", rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if call.tiny else "nccl")
    torch.manual_seed(rank)
    gradients = [torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in (TINY if call.tiny else LAYER)]
    whole = torch.cat([p.float() for r in range(size) for p in parts_of(gradients, r, size)])
    dist.all_reduce(whole)
    expected = whole.view(size, -1)[rank]
    for name, way in WAYS.items():
        if call.tiny and name.startswith("reduce-scatter"):
            continue  # Gloo has none for every dtype
        worst = float((way(gradients) - expected).abs().max())
        assert worst < (0.1 if name.endswith("bf16") else 1e-5), (name, worst)
        seconds = []
        for _ in range(call.repeats):
            if device.type == "cuda":
                torch.cuda.synchronize()
            dist.barrier()
            begun = time.perf_counter()
            for _ in range(call.layers):
                way(gradients)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append((time.perf_counter() - begun) / call.layers)
        if rank == 0:
            taken, sent = statistics.median(seconds), sum(g.numel() * 2 for g in gradients) * (size - 1) / size
            print(
                f"{name:20s} {1e3 * taken:7.3f} ms a layer, {sent / taken / 1e9:6.1f} GB/s of bf16, off by {worst:.1e}",
                flush=True,
            )
    dist.destroy_process_group()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--layers", type=int, default=22, help="one after another")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--channels", default="", help="NCCL_NCHANNELS_PER_PEER")
    parser.add_argument("--port", type=int, default=29611)
    parser.add_argument("--tiny", action="store_true")
    call = parser.parse_args()
    if call.channels:
        os.environ["NCCL_NCHANNELS_PER_PEER"] = call.channels
    mp.spawn(worker, (call.gpus, call), nprocs=call.gpus)


if __name__ == "__main__":
    main()
