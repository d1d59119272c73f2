"""Several adapters over one model at once, each for its own tokens of a packed row.

Those that add a low-rank product (lora, pissa) lie in stacks (`luban.adapters.stack`), of which two kernels a matmul serve all;
other kinds are called one after another.

N tokens of a row, I inputs, O outputs of a projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luban.adapters.base import Adapter, AdapterConfig, adapters_of, weight_reader
from luban.adapters.lora import LoRA, LowRank
from luban.adapters.stack import Chosen, LowRankStack
from luban.core.errors import UnsupportedError
from luban.kernels.row_groups import RowGroupBuffers
from luban.models.base import Model
from luban.models.build import build_model, materialise, state_of
from luban.nn.invariant import InvariantMatmul
from luban.nn.linear import MatmulOwner, Projection, adapted_output, matmul_owners, reads_output


class Selection(Chosen):
    """Which adapter each token of the next forward uses.

    Args:
        slots: adapters in stacks at most.
        tokens: of a forward at most, padding included.
        device: of the model.
        invariant: what a token gets doesn't depend on the others, bit for bit.
    """

    def __init__(self, slots: int, tokens: int, device: torch.device, *, invariant: bool = False):
        super().__init__(InvariantMatmul().linear if invariant else F.linear)
        self.count, self.device, self.invariant = slots, device, invariant
        self.rows: dict[str, Tensor] = {}  # adapter that is in no stack → indices (N',) of its tokens in the row
        self.slots: dict[str, int] = {}  # adapter → its slot in the stacks
        self.changed = 0  # counts when a forward with adapters came to consist of other work, or at other addresses
        self._free = list(range(slots))
        self._buffers = RowGroupBuffers(slots, tokens, device, fixed=invariant)
        self._spans: list[tuple[int | None, int]] = []

    def choose(self, spans: Sequence[tuple[str, int]]) -> None:
        """Set it from (adapter or "", tokens) of every sequence, in the order of the row; `place` follows."""
        found: dict[str, list[int]] = {}
        start = 0
        for name, count in spans:
            if name and name not in self.slots:
                found.setdefault(name, []).extend(range(start, start + count))
            start += count
        self.rows = {name: torch.tensor(rows, device=self.device) for name, rows in found.items()}
        self._spans = [(self.slots.get(name), count) for name, count in spans]
        self.groups = None

    @property
    def stacked(self) -> bool:
        """Whether a token uses a slot."""
        return any(slot is not None for slot, _ in self._spans)

    def place(self, size: int | None = None) -> None:
        """Copy to the device which rows use which slot.

        Args:
            size: see `luban.kernels.row_groups.RowGroupBuffers.write`.
        """
        self.groups = self._buffers.write(self._spans, size)

    def slot(self, name: str) -> int:
        """An adapter's slot, the next free one where it has none yet."""
        if name not in self.slots:
            self.slots[name] = self._free.pop(0)
        return self.slots[name]

    def release(self, name: str) -> int | None:
        """Free an adapter's slot; None: it has none."""
        slot = self.slots.pop(name, None)
        if slot is not None:
            self._free.insert(0, slot)
        return slot


class Bank(nn.Module):
    """The adapters at one projection that are in no stack, by name: each changes the outputs of its own tokens. They are none of
    its modules, so that they are no part of the model's weights, as stacks aren't."""

    reads_output = True

    def __init__(self, selection: Selection):
        super().__init__()
        self.selection, self.held = selection, dict[str, Adapter]()

    def forward(self, x_1NI: Tensor, y_1NO: Tensor, projection: Projection) -> Tensor:
        """(1, N, I) and (1, N, O) → (1, N, O)."""
        for name, rows in self.selection.rows.items():
            if name not in self.held:
                continue
            adapter = self.held[name]
            x, y = x_1NI.index_select(-2, rows), y_1NO.index_select(-2, rows)
            y_1NO = y_1NO.index_copy(-2, rows, adapted_output(adapter, x, y, projection))
        return y_1NO


def bankable(config: AdapterConfig, model: Model, name: str, *, invariant: bool = False) -> None:
    """Raise UnsupportedError for an adapter that can't share a batch with others.

    Args:
        invariant: what a token gets must not depend on the others, bit for bit.
    """
    kind = config.registry.name_of(type(config))
    if config.modules_to_save:
        what = f"it replaces whole modules ({', '.join(config.modules_to_save)})"
    elif not config.pages:
        what = f"a {kind} adapter puts keys and values before every text"
    else:
        twin = build_model(model.spec, device="meta")
        config.adapt(twin)
        held = adapters_of(twin)
        outside = [name for name, _ in held if ".adapters." not in name or name.startswith("head.")]
        if outside:
            what = f"a {kind} adapter changes more than the layers' projections ({outside[0]})"
        elif (reader := weight_reader(twin)) and any(owner.packed is not None for _, owner in matmul_owners(model)):
            raise UnsupportedError(
                f"the adapter {name} at {reader} reads the weight that it adapts, and those of the model are packed: leave --dtype int8 out"
            )
        elif invariant and any(low_rank(adapter) is None for _, adapter in held):
            raise UnsupportedError(
                f"the adapter {name} is of kind {kind}, whose outputs depend in their last bits on what shares the batch: "
                "with --batch-invariant adapters of the kinds lora and pissa are served"
            )
        else:
            return
    raise UnsupportedError(
        f"the adapter {name} can't share a batch with others: {what}; serve it alone, by --adapter DIR"
    )


@torch.no_grad()
def add_to_banks(
    model: Model, selection: Selection, name: str, config: AdapterConfig, tensors: Mapping[str, Tensor]
) -> None:
    """Put an adapter into the stacks and banks of a model. `tensors` are named as in a model that it alone adapts."""
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
        if (low := low_rank(adapter)) is not None:
            a_RI, b_OR = low.factors()
            stack = stack_at(owners[owner], projection, selection, len(a_RI), like)
            selection.changed += stack.put(selection.slot(name), projection, a_RI, b_OR, low.scale)
        else:
            adapter.requires_grad_(False)
            bank_at(owners[owner], projection, selection).held[name] = adapter.eval()


def reserve_stacks(model: Model, selection: Selection) -> None:
    """Make the stacks of all projections that LoRA adapts by default, of the smallest rank that is stored, before memory is divided
    among what a server needs. Nothing is computed with them until an adapter is there."""
    twin = build_model(model.spec, device="meta")
    LoRA(rank=1).adapt(twin)
    like, owners = next(p for p in model.parameters() if p.is_floating_point()), dict(matmul_owners(model))
    for place, _ in adapters_of(twin):
        owner, _, projection = place.rpartition(".adapters.")
        stack_at(owners[owner], projection, selection, 1, like)


def low_rank(adapter: Adapter) -> LowRank | None:
    """The adapter as one that does no more than add a product of its factors to an output, else None."""
    return adapter if isinstance(adapter, LowRank) and not reads_output(adapter) else None


def stack_at(owner: MatmulOwner, projection: str, selection: Selection, rank: int, like: Tensor) -> LowRankStack:
    """The stack of a projection and those that are multiplied with it, made where there is none yet."""
    if projection not in owner.stacks:
        held = owner.projections()
        joint = {
            name: p.out_features for name, p in held.items() if any(p is other for other in owner.joint_projections())
        }
        sizes = joint if projection in joint else {projection: held[projection].out_features}
        inputs, slots = held[projection].in_features, selection.count
        made = LowRankStack(inputs, sizes, slots, rank, like.detach(), selection)
        owner.stacks.update(dict.fromkeys(sizes, made))
    return owner.stacks[projection]  # type: ignore[return-value]


def bank_at(owner: MatmulOwner, projection: str, selection: Selection) -> Bank:
    """The bank at a projection, made where there is none yet."""
    held = None if owner.adapters is None or projection not in owner.adapters else owner.adapters[projection]
    if not isinstance(held, Bank):
        held = Bank(selection)
        owner.add_adapter(projection, held)
    return held


def serves_adapters(model: Model) -> bool:
    """Whether there are stacks or banks in the model, such as those of another engine."""
    return any(
        owner.stacks or any(isinstance(each, Bank) for each in (owner.adapters or {}).values())
        for _, owner in matmul_owners(model)
    )


def remove_banks(model: Model) -> None:
    """Take all adapters out, with the stacks."""
    for _, owner in matmul_owners(model):
        owner.stacks, owner.adapters = {}, None


def remove_from_banks(model: Model, selection: Selection, name: str) -> None:
    """Take an adapter out; banks that become empty go too, so that fused kernels run where they did. Stacks stay where they
    are, since recorded forwards read them."""
    slot = selection.release(name)
    for _, owner in matmul_owners(model):
        if slot is not None:
            for stack in dict.fromkeys(owner.stacks.values()):
                stack.clear(slot)
        for projection, bank in list((owner.adapters or {}).items()):
            if isinstance(bank, Bank) and name in bank.held:
                del bank.held[name]
                if not len(bank.held):
                    assert owner.adapters is not None
                    del owner.adapters[projection]
        if owner.adapters is not None and not len(owner.adapters):
            owner.adapters = None
