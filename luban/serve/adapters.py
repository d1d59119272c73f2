"""Adapters by name over a model that is served: as many in memory as fit, the least recently used one evicted for another.

A name is the clients'; the engine knows an adapter by its key, which no other has that was ever there under the same name, so that
requests end with the adapter that they began with.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from luban.adapters.bank import (
    Selection,
    add_to_banks,
    bankable,
    remove_banks,
    remove_from_banks,
    reserve_stacks,
    serves_adapters,
)
from luban.adapters.base import AdapterConfig
from luban.checkpoint.weights import weights_hash
from luban.core.errors import ArtifactError, DataError, LubanError, UnsupportedError, UsageError, nearest
from luban.core.log import warn
from luban.generate.cache import float_parameter
from luban.load.adapted import base_kept, find_adapter, in_our_names, require_base, spec_with
from luban.load.model import LoadedModel, load_model
from luban.models.build import state_of
from luban.nn.packed import KINDS, pack_frozen, packed_kind
from luban.serve.scheduler import Chunk

MOST = 16  # adapters in memory


class ReadAdapter(NamedTuple):
    """An adapter that can be served, not yet in the model."""

    config: AdapterConfig
    tensors: Mapping[str, Tensor]  # named as in a model that it alone adapts


class AdapterPool:
    """The adapters of an engine. All but `require` is called by the thread that runs the model.

    Where all of them were trained over the model packed in the same way (`adapter.base`), it is packed so, once, in place.

    Args:
        model: which they are for, without one of its own.
        known: name → run of adapters or PEFT directory.
        most: adapters in memory at once; another one evicts the least recently used of those that no request uses.
        invariant: what a token gets doesn't depend on the others of its batch, bit for bit.
        grows: whether `add` may be called, for which places in memory are kept.
    """

    def __init__(
        self,
        model: LoadedModel,
        known: Mapping[str, str | Path],
        most: int = MOST,
        *,
        invariant: bool = False,
        grows: bool = False,
    ):
        if model.spec.body.two_sided:
            raise UnsupportedError(f"{model.name} has an encoder, and adapters are served by name for decoders alone")
        if model.adapter is not None:
            raise UsageError(f"{model.name} has an adapter already: give it by name, too (--adapter NAME=DIR)")
        if most < 1:
            raise UsageError(f"at least one adapter must be in memory, {most} given")
        self.model, self.most, self.invariant, self.grows = model, most, invariant, grows
        self.selection = Selection(most, 1, float_parameter(model.module).device, invariant=invariant)
        self._keys = {
            name: name for name in known
        }  # of the adapters that requests may ask for, by name; never changed in place
        self._paths = {name: Path(path) for name, path in known.items()}  # by key, of those too that were removed
        self._held: OrderedDict[str, str] = OrderedDict()  # key → identity, the least recently used first
        self._base = ""
        self._share_packed()

    def _share_packed(self) -> None:
        """Pack the model as all of its adapters had it in training; then requests without one meet it packed, too."""
        kept = {base_kept(path) for path in self._paths.values()}
        if self.invariant or len(kept) != 1 or kept == {"float"} or packed_kind(self.model.module) is not None:
            return
        self._base_hash()  # of the floats
        (kind,) = kept
        pack_frozen(self.model.module.requires_grad_(False), KINDS[kind])
        warn(
            f"all adapters were trained over weights in {kind}, so {self.model.name} is kept in {kind} once for all of them, and "
            "answers so without an adapter, too"
        )

    @property
    def names(self) -> tuple[str, ...]:
        """That requests may ask for; from any thread."""
        return tuple(self._keys)

    @property
    def held(self) -> Sequence[str]:
        """Keys of those in memory, the least recently used first."""
        return list(self._held)

    def start(self, tokens: int) -> None:
        """Read as many adapters as may be in memory, so that the memory for them is taken before the rest is divided.

        Args:
            tokens: of a forward at most, padding included.

        Raises:
            DataError, ArtifactError, LineageError, UnsupportedError: as `hold` does, for one that can't be served; of those
                beyond `most`, which are read when they are asked for, where there is none at its path. The model is then as it was.
            UsageError: the model has adapters of another engine.
        """
        if serves_adapters(self.model.module):
            raise UsageError(
                f"{self.model.name} serves the adapters of another engine: load the model again for this one"
            )
        slots = self.most if self.grows else max(1, min(self.most, len(self._keys)))
        device = float_parameter(self.model.module).device
        self.selection = Selection(slots, tokens, device, invariant=self.invariant)
        try:
            for name in list(self._keys)[: self.most]:
                self.hold(name, ())
            for name in list(self._keys)[self.most :]:
                find_adapter(self._paths[name])
        except LubanError:
            remove_banks(self.model.module)
            raise
        if self.grows:
            self._base_hash()  # now, since it may read the model again
            if device.type == "cuda":  # where the cache takes what is left
                reserve_stacks(self.model.module, self.selection)

    def require(self, name: str) -> str:
        """The key of the adapter that has this name now; from any thread. Raises DataError for an unknown name."""
        keys = self._keys
        if name not in keys:
            raise DataError(f"there is no adapter '{name}'{nearest(name, keys)}")
        return keys[name]

    def add(self, name: str, path: str | Path, *, replace: bool = False) -> None:
        """Let requests ask for another adapter. It is read and checked now, and stays in memory where a place is free.

        Args:
            path: a run of adapters or a PEFT directory.
            replace: an adapter may have the name, whose requests end with it.

        Raises:
            DataError: a name that is taken, or none.
            DataError, ArtifactError, LineageError, UnsupportedError: as `hold` does; the adapters are as before then.
        """
        if not self.grows:
            raise UsageError("no adapters can be added: the engine was made without more_adapters")
        if not name or name == self.model.name:
            raise DataError(f"an adapter needs a name of its own, {name!r} given")
        if name in self._keys and not replace:
            raise DataError(f"there is an adapter '{name}' already: remove it first, or give load_inplace as true")
        numbered = chain([name], (f"{name} ({number})" for number in count(2)))
        key = next(each for each in numbered if each not in self._paths)
        found = self._read(key, Path(path))
        if len(self._held) < self.most:
            self._put(key, found)
        self._paths[key] = Path(path)
        self._keys = {**self._keys, name: key}

    def remove(self, name: str) -> None:
        """Let no request ask for an adapter any more; those that have it keep it, and `sweep` takes it out of memory behind them.
        Raises DataError for an unknown name."""
        key = self.require(name)
        self._keys = {other: each for other, each in self._keys.items() if each != key}

    @property
    def sweepable(self) -> bool:
        """Whether one in memory has no name any more."""
        return self.grows and not self._held.keys() <= set(self._keys.values())

    def sweep(self, in_use: Collection[str]) -> None:
        """Take those out of memory that have no name any more and that no request uses.

        Args:
            in_use: keys of the adapters of requests that run or wait.
        """
        for key in self._held.keys() - set(self._keys.values()) - set(in_use):
            self.drop(key)

    def fits(self, key: str, in_use: Collection[str]) -> bool:
        """Whether this adapter ("": none) can be in memory now, beside those that are `in_use`."""
        return not key or key in self._held or len(self._held.keys() & in_use) < self.most

    def hold(self, key: str, in_use: Collection[str]) -> str:
        """Read the adapter, unless it is in memory, and return the identity that its keys and values have in the prefix cache.

        Args:
            in_use: keys of the adapters of running requests, which aren't evicted.

        Raises:
            DataError, ArtifactError, LineageError, UnsupportedError: it can't be loaded over this model.
        """
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        found = self._read(key, self._paths[key])
        while len(self._held) >= self.most:
            self.drop(next(held for held in self._held if held not in in_use))
        self._put(key, found)
        return self._held[key]

    def _read(self, key: str, path: Path) -> ReadAdapter:
        """Read an adapter and check that it can be served over this model."""
        try:
            stored = find_adapter(path)
        except OSError as error:
            raise ArtifactError(f"the adapter at {path} can't be read: {error.strerror or error}") from None
        if stored.base_weights:
            require_base(stored, self._base_hash(), self.model.name)
        if (head := spec_with(self.model, stored).head) != self.model.spec.head:
            raise UnsupportedError(
                f"the adapter {key} has a head of its own, {head.registry.name_of(type(head))}, which the requests of others have "
                "not: load it alone, by --adapter DIR"
            )
        config, tensors = in_our_names(self.model, stored)
        bankable(config, self.model.module, key, invariant=self.invariant)
        if config.base != "float" and packed_kind(self.model.module) != config.base:
            warn(
                f"the adapter {key} was trained over weights in {config.base}, and is served by name over those of {self.model.name} "
                f"as they are, so that its answers differ somewhat: alone, or beside others over weights in {config.base}, it has them "
                "packed"
            )
        return ReadAdapter(config, tensors)

    def _put(self, key: str, found: ReadAdapter) -> None:
        """Put an adapter into the model. Raises UnsupportedError where the device has no memory for it."""
        try:
            add_to_banks(self.model.module, self.selection, key, *found)
        except BaseException as error:
            remove_from_banks(self.model.module, self.selection, key)
            if isinstance(error, torch.OutOfMemoryError):
                raise UnsupportedError(
                    f"there is no memory left for the adapter {key}: start with a smaller --cache-gb or --max-adapters"
                ) from None
            raise
        self._held[key] = f"adapter {weights_hash(found.tensors)} {found.config}"

    def drop(self, key: str) -> None:
        """Take an adapter out of memory."""
        remove_from_banks(self.model.module, self.selection, key)
        self._held.pop(key)

    @contextmanager
    def selected(self, chunks: Sequence[Chunk]) -> Iterator[bool]:
        """Inside of it forwards use each sequence's adapter; outside the model runs alone, as for embeddings. Yields whether
        they can be recorded: adapters that are in no stack can't."""
        self.choose(chunks)
        try:
            yield not self.selection.rows
        finally:
            self.choose(())

    def choose(self, chunks: Sequence[Chunk]) -> None:
        """Let the next forward, over these chunks, use their sequences' adapters."""
        self.selection.choose([(chunk.state.adapter, chunk.count) for chunk in chunks])

    def _base_hash(self) -> str:
        """The weights_hash of the model in float32, the precision in which adapters record it."""
        if not self._base:
            module = self.model.module
            wide = packed_kind(module) is None and all(p.dtype == torch.float32 for p in module.parameters())
            self._base = weights_hash(state_of(module if wide else load_model(self.model.path).module))
        return self._base
