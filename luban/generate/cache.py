"""A contiguous cache: one growing block of keys and values a layer, rows padded on the left to one length.

B sequences, K key heads, S slots, S' source tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luban.core.errors import DataError
from luban.core.protocols import KeysValues
from luban.models.base import Model
from luban.nn.mixer.base import AttentionShape, TokenState

GROW = 64  # slots are added in steps of at least this many


class ContextError(DataError):
    """More tokens than the model's context holds."""


class PromptTooLong(ContextError):
    """A prompt that fills the context, so that no token can follow."""


class LayerMemory:
    """What one layer keeps: keys and values, those of an encoder's states where it attends to them, and the states of mixers that
    keep other numbers.

    Args:
        shape: of keys and values; None: it keeps none.
        states: the mixer's `state_spec`.
    """

    def __init__(
        self,
        cache: ContiguousCache,
        shape: AttentionShape | None,
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
        states: Sequence[TokenState] = (),
    ):
        self.cache, self.specs = cache, states
        heads, head_dim = (0, 0) if shape is None else (shape.key_heads, shape.head_dim)
        self.keys = torch.empty(batch, heads, 0, head_dim, device=device, dtype=dtype)
        self.values = torch.empty_like(self.keys)
        self.source: KeysValues | None = None  # (B, K, S', D) both
        self.states = [
            torch.zeros(batch, spec.width, spec.last or 0, device=device, dtype=torch.long if spec.integer else dtype)
            for spec in states
        ]
        self.constants: dict[str, Tensor] = {}  # what a mixer computed of its weights, for all sequences

    def update(self, keys: Tensor, values: Tensor) -> KeysValues:
        """Store (B, K, T, D) in the slots that the cache's `begin` made; return all (B, K, S, D)."""
        length = self.cache.length
        new = slice(length - keys.shape[2], length)
        self.keys[:, :, new], self.values[:, :, new] = keys, values
        return self.keys[:, :, :length], self.values[:, :, :length]

    def extend(self, number: int, new_BWT: Tensor) -> Tensor:
        """Store T new tokens' numbers of state `number`; return those of all tokens (B, W, S), or of the last ones that are kept
        and the new ones (B, W, last + T)."""
        if (last := self.specs[number].last) is not None:
            whole = torch.cat((self.states[number], new_BWT.to(self.states[number].dtype)), -1)
            self.states[number] = whole[:, :, whole.shape[2] - last :]
            return whole
        length = self.cache.length
        self.states[number][:, :, length - new_BWT.shape[2] : length] = new_BWT
        return self.states[number][:, :, :length]

    def cross(self, project: Callable[[Tensor], KeysValues], states: Tensor | None) -> KeysValues:
        """Keys and values of the encoder's states, projected in the first call."""
        if self.source is None:
            assert states is not None
            self.source = project(states)
        return self.source

    def grow(self, more: int) -> None:
        """Add slots."""
        self.keys, self.values = (F.pad(x, (0, 0, 0, more)) for x in (self.keys, self.values))
        pairs = zip(self.states, self.specs, strict=True)
        self.states = [x if spec.last is not None else F.pad(x, (0, more)) for x, spec in pairs]

    def select(self, index: Tensor, drop: int) -> None:
        """Keep these rows, without their first `drop` slots."""
        self.keys, self.values = (x[index][:, :, drop:] for x in (self.keys, self.values))
        pairs = zip(self.states, self.specs, strict=True)
        self.states = [x[index] if spec.last is not None else x[index][:, :, drop:] for x, spec in pairs]
        if self.source is not None:
            self.source = self.source[0][index], self.source[1][index]

    def join(self, other: LayerMemory, both: Callable[..., Tensor]) -> None:
        """Take up the rows of another; `both(a, b, axis, padding)` joins tensors with slots along an axis."""
        self.keys, self.values = both(self.keys, other.keys, 2), both(self.values, other.values, 2)
        triples = zip(self.states, other.states, self.specs, strict=True)
        self.states = [
            torch.cat((a, b)) if spec.last is not None else both(a, b, 2, spec.padding) for a, b, spec in triples
        ]


class ContiguousCache:
    """Keys and values of a batch of sequences; see `core.protocols.KVCache` for how a model uses it.

    Args:
        shapes: of every layer, None for one that keeps no keys and values.
        batch: sequences.
        context: tokens that a sequence may have.
        device, dtype: of keys and values.
        states: of every layer, what its mixer keeps beside them; None: nothing.
    """

    def __init__(
        self,
        shapes: Sequence[AttentionShape | None],
        *,
        batch: int,
        context: int,
        device: torch.device,
        dtype: torch.dtype,
        states: Sequence[Sequence[TokenState]] | None = None,
    ):
        self.context, self.length = context, 0
        self.layers = [
            None if shape is None and not kept else LayerMemory(self, shape, batch, device, dtype, kept)
            for shape, kept in zip(shapes, states or [()] * len(shapes), strict=True)
        ]
        self.counts = torch.zeros(batch, dtype=torch.long, device=device)  # real tokens of each sequence
        self.longest = 0  # an upper bound of the counts, known without asking the device
        self._positions = torch.zeros(batch, 0, dtype=torch.long, device=device)
        self._real = torch.zeros(batch, 0, dtype=torch.bool, device=device)
        self.padded = False
        self.source_mask: Tensor | None = None  # (B, S') bool, false: padding; None: nothing is padded

    @classmethod
    def of(cls, model: Model, batch: int) -> ContiguousCache:
        """For `batch` sequences of this model."""
        spec, weight = model.spec, float_parameter(model)
        return cls(
            [layer.mixer.attention(spec.width) for layer in spec.layers],
            batch=batch,
            context=spec.context,
            device=weight.device,
            dtype=weight.dtype,
            states=[layer.mixer.state_spec(spec.width) for layer in spec.layers],
        )

    @property
    def batch(self) -> int:
        """Sequences held."""
        return self.counts.shape[0]

    @property
    def positions(self) -> Tensor:
        """(B, S)."""
        return self._positions[:, : self.length]

    @property
    def valid(self) -> Tensor | None:
        """(B, S) bool, or None when nothing is padded."""
        return self._real[:, : self.length] if self.padded else None

    def layer(self, index: int) -> LayerMemory | None:
        """The part of one layer."""
        return self.layers[index]

    def begin(self, tokens: int, mask: Tensor | None, positions: Tensor | None = None) -> Tensor:
        """Add slots for `tokens` more in every row; returns their positions (B, T): those given, or counted."""
        if self.longest + tokens > self.context:
            raise ContextError(f"{self.longest + tokens} tokens are more than the model's context of {self.context}")
        if self.length + tokens > self._real.shape[1]:
            self._grow(self.length + tokens)
        new = slice(self.length, self.length + tokens)
        if mask is None:
            steps = torch.arange(tokens, device=self.counts.device)
            counted = self.counts[:, None] + steps
            self.counts = self.counts + tokens
        else:
            counted = (self.counts[:, None] + mask.long().cumsum(-1) - 1).clamp_min(0)
            self.counts = self.counts + mask.sum(-1)
        positions = counted if positions is None else positions.expand_as(counted)
        self.padded = self.padded or mask is not None
        self._positions[:, new] = positions
        self._real[:, new] = True if mask is None else mask
        self.length += tokens
        self.longest += tokens
        return positions

    def _grow(self, needed: int) -> None:
        more = max(needed, min(2 * self._real.shape[1], self._real.shape[1] + 1024), GROW) - self._real.shape[1]
        for layer in self._held():
            layer.grow(more)
        self._positions, self._real = F.pad(self._positions, (0, more)), F.pad(self._real, (0, more))

    def _held(self) -> list[LayerMemory]:
        return [layer for layer in self.layers if layer is not None]

    def select(self, rows: list[int]) -> None:
        """Keep these sequences, in this order; one may be named more than once. Shared padding is dropped."""
        index = torch.tensor(rows, dtype=torch.long, device=self.counts.device)
        self.counts = self.counts[index]
        self.longest = int(self.counts.max()) if rows else 0
        drop = self.length - self.longest if self.padded else 0  # padding is on the left of every row
        for layer in self._held():
            layer.select(index, drop)
        if self.source_mask is not None:
            self.source_mask = self.source_mask[index]
        self._positions, self._real = self._positions[index][:, drop:], self._real[index][:, drop:]
        self.length -= drop
        self.padded = self.padded and not bool((self.counts == self.length).all())

    def join(self, other: ContiguousCache) -> None:
        """Take up the sequences of `other` below these, the shorter side (and source) padded on the left."""
        length = max(self.length, other.length)
        mine, theirs = length - self.length, length - other.length

        def both(a: Tensor, b: Tensor, slot_axis: int, padding: float = 0.0) -> Tensor:
            a, b = a.narrow(slot_axis, 0, self.length), b.narrow(slot_axis, 0, other.length)
            return torch.cat((_pad_left(a, mine, slot_axis, padding), _pad_left(b, theirs, slot_axis, padding)))

        self._join_sources(other)
        for a, b in zip(self._held(), other._held(), strict=True):
            a.join(b, both)
        self._positions, self._real = both(self._positions, other._positions, 1), both(self._real, other._real, 1)
        self.padded = self.padded or other.padded or mine != theirs
        self.counts = torch.cat((self.counts, other.counts))
        self.length, self.longest = length, max(self.longest, other.longest)

    def _join_sources(self, other: ContiguousCache) -> None:
        held = zip(self._held(), other._held(), strict=True)
        pairs = [(mine, mine.source, theirs.source) for mine, theirs in held if mine.source and theirs.source]
        if not pairs:
            return
        sizes = [keys.shape[2] for keys in (pairs[0][1][0], pairs[0][2][0])]
        missing = [max(sizes) - size for size in sizes]
        for mine, a, b in pairs:
            keys, values = (
                torch.cat((_pad_left(x, missing[0], 2), _pad_left(y, missing[1], 2))) for x, y in zip(a, b, strict=True)
            )
            mine.source = keys, values
        if missing != [0, 0] or self.source_mask is not None or other.source_mask is not None:
            masks = [self._source_mask(sizes[0]), other._source_mask(sizes[1])]
            self.source_mask = torch.cat([_pad_left(mask, more, 1) for mask, more in zip(masks, missing, strict=True)])

    def _source_mask(self, size: int) -> Tensor:
        if self.source_mask is not None:
            return self.source_mask
        return torch.ones(self.batch, size, dtype=torch.bool, device=self.counts.device)


def _pad_left(x: Tensor, more: int, axis: int, value: float = 0.0) -> Tensor:
    """`more` times a value before the entries of one axis."""
    return F.pad(x, (*(0, 0) * (x.dim() - 1 - axis), more, 0), value=value) if more else x


def float_parameter(model: nn.Module) -> Tensor:
    """A parameter that isn't packed into 8 bits: its device and dtype are those of what the model computes."""
    return next(parameter for parameter in model.parameters() if parameter.is_floating_point())
