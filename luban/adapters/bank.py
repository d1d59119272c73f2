"""Several adapters over one model at once, each for its own tokens of a packed row.

N tokens of a row, I inputs, O outputs of a projection.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from luban.adapters.base import AdapterConfig, adapters_of
from luban.core.errors import UnsupportedError
from luban.models.base import Model
from luban.models.build import build_model, materialise, state_of
from luban.nn.linear import MatmulOwner, Projection, adapted_output, matmul_owners


class Selection:
    """Which adapter each token of the next forward uses; tokens that aren't listed use none."""

    def __init__(self) -> None:
        self.rows: dict[str, Tensor] = {}  # adapter → indices (N',) of its tokens in the row

    def choose(self, spans: list[tuple[str, int]], device: torch.device) -> None:
        """Set it from (adapter or "", tokens) of every sequence, in the order of the row."""
        found: dict[str, list[int]] = {}
        start = 0
        for name, count in spans:
            if name:
                found.setdefault(name, []).extend(range(start, start + count))
            start += count
        self.rows = {name: torch.tensor(rows, device=device) for name, rows in found.items()}


class Bank(nn.Module):
    """The adapters at one projection, by name: each changes the outputs of its own tokens."""

    reads_output = True

    def __init__(self, selection: Selection):
        super().__init__()
        self.selection, self.held = selection, nn.ModuleDict()

    def forward(self, x_1NI: Tensor, y_1NO: Tensor, projection: Projection) -> Tensor:
        """(1, N, I) and (1, N, O) → (1, N, O)."""
        for name, rows in self.selection.rows.items():
            if name not in self.held:
                continue
            adapter = self.held[name]
            x, y = x_1NI.index_select(-2, rows), y_1NO.index_select(-2, rows)
            y_1NO = y_1NO.index_copy(-2, rows, adapted_output(adapter, x, y, projection))
        return y_1NO


def bankable(config: AdapterConfig, model: Model, name: str) -> None:
    """Raise UnsupportedError for an adapter that can't share a batch with others."""
    kind = config.registry.name_of(type(config))
    if config.modules_to_save:
        what = f"it replaces whole modules ({', '.join(config.modules_to_save)})"
    elif not config.pages:
        what = f"a {kind} adapter puts keys and values before every text"
    else:
        twin = build_model(model.spec, device="meta")
        config.adapt(twin)
        outside = [name for name, _ in adapters_of(twin) if ".adapters." not in name or name.startswith("head.")]
        if not outside:
            return
        what = f"a {kind} adapter changes more than the layers' projections ({outside[0]})"
    raise UnsupportedError(
        f"the adapter {name} can't share a batch with others: {what}; serve it alone, by --adapter DIR"
    )


@torch.no_grad()
def add_to_banks(
    model: Model, selection: Selection, name: str, config: AdapterConfig, tensors: Mapping[str, Tensor]
) -> None:
    """Put an adapter into the banks of a model. `tensors` are named as in a model that it alone adapts."""
    twin = build_model(model.spec, device="meta")
    config.adapt(twin)
    like = next(p for p in model.parameters() if p.is_floating_point())
    owners = dict(matmul_owners(model))
    for place, adapter in adapters_of(twin):
        materialise(adapter, like.device)
        adapter.to(like.dtype)
        for own, tensor in state_of(adapter).items():
            tensor.copy_(tensors[f"{place}.{own}"])
        owner, _, projection = place.rpartition(".adapters.")
        adapter.requires_grad_(False)
        bank_at(owners[owner], projection, selection).held[name] = adapter.eval()


def bank_at(owner: MatmulOwner, projection: str, selection: Selection) -> Bank:
    """The bank at a projection, made where there is none yet."""
    held = None if owner.adapters is None or projection not in owner.adapters else owner.adapters[projection]
    if not isinstance(held, Bank):
        held = Bank(selection)
        owner.add_adapter(projection, held)
    return held


def remove_from_banks(model: Model, name: str) -> None:
    """Take an adapter out; banks that become empty go too, so that fused kernels run where they did."""
    for _, owner in matmul_owners(model):
        for projection, bank in list((owner.adapters or {}).items()):
            if isinstance(bank, Bank) and name in bank.held:
                del bank.held[name]
                if not len(bank.held):
                    assert owner.adapters is not None
                    del owner.adapters[projection]
        if owner.adapters is not None and not len(owner.adapters):
            owner.adapters = None
