"""Two processes give the loss and the gradients of one: FSDP over the blocks, and columns and rows placed by roles.

The real plans are `luban.parallel`'s; this shows that models need to know nothing of them. float64 over Gloo.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import warm
from families import FAMILIES
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from training_data import tensors

from luban.models.build import build_model, materialise
from luban.models.stack import blocks_of
from luban.nn.init import Region, initialise
from luban.nn.linear import MatmulOwner, matmul_owners
from luban.nn.roles import roles_of
from luban.objectives.base import LossModule
from luban.parallel.shard import local_region

RANKS, ROWS, SEED = 2, 4, 5
SHARDED = ["decoder", "decoder-kerple", "classifier", "encoder", "albert", "encoder-decoder", "t5", "recurrent", "elmo"]
PLACED = ["decoder", "encoder", "albert", "encoder-decoder"]  # the others have no such roles, or a bias of each head
COLUMNS, BY_ROWS = {"q", "k", "v", "gate", "up"}, {"o", "down"}


def loss_module(name: str, device: str = "cpu") -> LossModule:
    family = FAMILIES[name]
    return family.objective.loss(build_model(family.spec, device=device, dtype="float64", seed=SEED))


def batch_of(name: str) -> tuple[dict[str, Tensor], int]:
    batch = FAMILIES[name].batch(ROWS, np.random.default_rng(SEED))
    return tensors(batch), batch.target_count


def run(loss: LossModule, batch: dict[str, Tensor], divisor: float) -> Tensor:
    """The mean loss, and its gradients in the parameters."""
    total = loss(batch).sum / divisor
    total.backward()
    return total.detach()


def shard(loss: LossModule, mesh: DeviceMesh) -> None:
    """FSDP: each block a group, and one group of the root, with the embedding and the head that may share its weight."""
    model = loss.model
    cells = [cell for name in ("layers", "forwards", "backwards") for cell in getattr(model, name, [])]
    for block in [*blocks_of(model), *cells]:
        fully_shard(block, mesh=mesh)
    fully_shard(loss, mesh=mesh)


def shard_region(_: str, tensor: Tensor) -> Region:
    return Region(tensor.shape, [local_region(tensor)])


def sharded_loss(name: str, mesh: DeviceMesh) -> tuple[LossModule, Tensor]:
    """Every rank draws its shard of the weights, and reads its rows of the batch."""
    loss = loss_module(name, "meta")
    shard(loss, mesh)
    materialise(loss.model, "cpu")
    spec = loss.model.spec
    initialise(loss.model, spec.init, layers=max(len(spec.layers), 1), seed=SEED, region=shard_region)
    batch, targets = batch_of(name)
    mine = {key: tensor.chunk(RANKS)[mesh.get_rank()] for key, tensor in batch.items()}
    total = run(loss, mine, targets / RANKS) / RANKS  # FSDP takes the mean of the ranks' gradients
    dist.all_reduce(total)
    return loss, total


def place(owner: MatmulOwner, roles: dict[str, str], mesh: DeviceMesh) -> None:
    """Split the weights of an owner: outputs over ranks, or inputs, whose partial sums are added up behind it."""
    for name, projection in owner.projections().items():
        by_columns = roles[name] in COLUMNS
        placements = {"weight": Shard(0 if by_columns else 1), "bias": Shard(0) if by_columns else Replicate()}
        for own, parameter in list(projection.named_parameters(recurse=False)):
            split = distribute_tensor(parameter.detach(), mesh, [placements[own]])
            projection.register_parameter(own, nn.Parameter(split))
    split_input = set(roles.values()) <= BY_ROWS
    summed = not set(roles.values()) <= COLUMNS

    def enter(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        x = DTensor.from_local(args[0], mesh, [Shard(args[0].dim() - 1) if split_input else Replicate()])
        return (x, *args[1:]), kwargs

    def leave(_: nn.Module, _args: tuple, out: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        if not isinstance(out, tuple):
            return (out.redistribute(placements=[Replicate()]) if summed else out).to_local()
        return tuple(part.to_local() for part in out)

    owner.register_forward_pre_hook(enter, with_kwargs=True)
    owner.register_forward_hook(leave)


def placed_loss(name: str, mesh: DeviceMesh) -> tuple[LossModule, Tensor]:
    """Every rank reads the whole batch."""
    loss = loss_module(name)
    roles = roles_of(loss)
    for path, owner in list(matmul_owners(loss)):
        prefixes = {own: f"{path}.{own}.weight" for own in owner.projections()}
        found = {own: roles.get(full, roles.get(f"{path}.weight")) for own, full in prefixes.items()}
        if set(found.values()) <= COLUMNS | BY_ROWS:
            place(owner, found, mesh)
    batch, targets = batch_of(name)
    return loss, run(loss, batch, targets)


def compare(make: Callable, name: str, mesh: DeviceMesh) -> dict[str, float]:
    """Relative errors of loss and gradients, and the share of the parameters that this rank holds."""
    single = loss_module(name)
    right = run(single, *batch_of(name))
    loss, total = make(name, mesh)
    found = {"loss": float((total - right).abs() / right.abs())}
    whole, held = 0, 0
    theirs = dict(loss.named_parameters())
    assert list(theirs) == [path for path, _ in single.named_parameters()]
    for path, parameter in single.named_parameters():
        gradient, local = theirs[path].grad, theirs[path]
        if isinstance(gradient, DTensor):
            gradient, local = gradient.full_tensor(), local.to_local()
        whole, held = whole + parameter.numel(), held + local.numel()
        found[path] = float((gradient - parameter.grad).norm() / parameter.grad.norm().clamp_min(1e-3))
    return found | {"share": held / whole}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    mesh, results = init_device_mesh("cpu", (RANKS,)), {}
    for kind, make, names in (("sharded", sharded_loss, SHARDED), ("placed", placed_loss, PLACED)):
        for name in names:
            results[f"{kind} {name}"] = compare(make, name, mesh)
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Iterator[list[dict]]:
    folder = tmp_path_factory.mktemp("ranks")
    warm.processes(worker, RANKS, str(folder))
    yield [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("case", [*(f"sharded {name}" for name in SHARDED), *(f"placed {name}" for name in PLACED)])
def test_two_processes_equal_one(ranks, case):
    for results in ranks:
        found = dict(results[case])
        assert 0.4 < found.pop("share") < (0.6 if case.startswith("sharded") else 0.8)
        assert max(found.values()) < 1e-9, max(found, key=found.get)
