"""Adapters by name over a model that is served: as many in memory as fit, the least recently used one evicted for another."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from luban.adapters.bank import Selection, add_to_banks, bankable, remove_banks, remove_from_banks, serves_adapters
from luban.checkpoint.weights import weights_hash
from luban.core.errors import DataError, LubanError, UnsupportedError, UsageError, nearest
from luban.core.log import warn
from luban.generate.cache import float_parameter
from luban.load.adapted import base_kept, find_adapter, in_our_names, require_base, spec_with
from luban.load.model import LoadedModel, load_model
from luban.models.build import state_of
from luban.nn.packed import KINDS, pack_frozen, packed_kind
from luban.serve.scheduler import Chunk

MOST = 16  # adapters in memory


class AdapterPool:
    """The adapters of an engine.

    Where all of them were trained over the model packed in the same way (`adapter.base`), it is packed so, once, in place.

    Args:
        model: which they are for, without one of its own.
        known: name → run of adapters or PEFT directory.
        most: adapters in memory at once; another one evicts the least recently used of those that no request uses.
        invariant: what a token gets doesn't depend on the others of its batch, bit for bit.
    """

    def __init__(
        self, model: LoadedModel, known: Mapping[str, str | Path], most: int = MOST, *, invariant: bool = False
    ):
        if model.spec.body.two_sided:
            raise UnsupportedError(f"{model.name} has an encoder, and adapters are served by name for decoders alone")
        if known and model.adapter is not None:
            raise UsageError(f"{model.name} has an adapter already: give it by name, too (--adapter NAME=DIR)")
        if most < 1:
            raise UsageError(f"at least one adapter must be in memory, {most} given")
        self.model, self.known, self.most, self.invariant = model, dict(known), most, invariant
        self.selection = Selection(most, 1, float_parameter(model.module).device, invariant=invariant)
        self._held: OrderedDict[str, str] = OrderedDict()  # name → identity, the least recently used first
        self._base = ""
        self._share_packed()

    def _share_packed(self) -> None:
        """Pack the model as all of its adapters had it in training; then requests without one meet it packed, too."""
        kept = {base_kept(Path(path)) for path in self.known.values()}
        if self.invariant or len(kept) != 1 or kept == {"float"} or packed_kind(self.model.module) is not None:
            return
        self._base_hash()  # of the floats
        (kind,) = kept
        pack_frozen(self.model.module.requires_grad_(False), KINDS[kind])
        warn(
            f"all adapters were trained over weights in {kind}, so {self.model.name} is kept in {kind} once for all of them, and "
            "answers so without an adapter, too"
        )

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
        slots, device = max(1, min(self.most, len(self.known))), float_parameter(self.model.module).device
        self.selection = Selection(slots, tokens, device, invariant=self.invariant)
        try:
            for name in list(self.known)[: self.most]:
                self.hold(name, ())
            for name in list(self.known)[self.most :]:
                find_adapter(Path(self.known[name]))
        except LubanError:
            remove_banks(self.model.module)
            raise

    def require(self, name: str) -> None:
        """Raise DataError for an unknown name."""
        if name not in self.known:
            raise DataError(f"there is no adapter '{name}'{nearest(name, self.known)}")

    def fits(self, name: str, in_use: Collection[str]) -> bool:
        """Whether this adapter ("": none) can be in memory now, beside those that are `in_use`."""
        return not name or name in self._held or len(self._held.keys() & in_use) < self.most

    def hold(self, name: str, in_use: Collection[str]) -> str:
        """Read the adapter, unless it is in memory, and return the identity that its keys and values have in the prefix cache.
        Called by the thread that runs the model.

        Args:
            in_use: names of the adapters of running requests, which aren't evicted.

        Raises:
            DataError, ArtifactError, LineageError, UnsupportedError: it can't be loaded over this model.
        """
        self.require(name)
        if name in self._held:
            self._held.move_to_end(name)
            return self._held[name]
        stored = find_adapter(Path(self.known[name]))
        if stored.base_weights:
            require_base(stored, self._base_hash(), self.model.name)
        if (head := spec_with(self.model, stored).head) != self.model.spec.head:
            raise UnsupportedError(
                f"the adapter {name} has a head of its own, {head.registry.name_of(type(head))}, which the requests of others have "
                "not: load it alone, by --adapter DIR"
            )
        config, tensors = in_our_names(self.model, stored)
        bankable(config, self.model.module, name, invariant=self.invariant)
        if config.base != "float" and packed_kind(self.model.module) != config.base:
            warn(
                f"the adapter {name} was trained over weights in {config.base}, and is served by name over those of {self.model.name} "
                f"as they are, so that its answers differ somewhat: alone, or beside others over weights in {config.base}, it has them "
                "packed"
            )
        while len(self._held) >= self.most:
            self.drop(next(held for held in self._held if held not in in_use))
        add_to_banks(self.model.module, self.selection, name, config, tensors)
        self._held[name] = f"adapter {weights_hash(tensors)} {config}"
        return self._held[name]

    def drop(self, name: str) -> None:
        """Take an adapter out of memory."""
        remove_from_banks(self.model.module, self.selection, name)
        self._held.pop(name)

    @property
    def held(self) -> Sequence[str]:
        """Those in memory, the least recently used first."""
        return list(self._held)

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
        """The weights_hash of the model in float32, the precision in which adapters record it; computed before any adapter is
        in memory."""
        if not self._base:
            module = self.model.module
            wide = packed_kind(module) is None and all(p.dtype == torch.float32 for p in module.parameters())
            self._base = weights_hash(state_of(module if wide else load_model(self.model.path).module))
        return self._base


def by_name(given: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """`--adapter` as given: one directory without a name, or any number of NAME=DIR. Raises UsageError for both."""
    named = dict(each.split("=", 1) for each in given if "=" in each and not Path(each).exists())
    alone = [each for each in given if each.partition("=")[0] not in named]
    if len(alone) > 1 or (alone and named):
        raise UsageError("several adapters need names to be asked for by: --adapter NAME=DIR --adapter OTHER=DIR")
    if len(named) + len(alone) < len(given):
        raise UsageError("two adapters have the same name: give each --adapter NAME=DIR another")
    return (alone[0] if alone else None), named
