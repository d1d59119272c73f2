"""Half-precision weights of layers that lie in host memory or on a disk, and come to the device while the layer computes (Rajbhandari et
al. 2021, ZeRO-Infinity, sections 5.1 and 6.2).

A layer's weights come before its forward pass and before its backward pass, those of the next layer in the same direction beside it;
the device holds three layers at most. A weight's storage on the device is emptied in between and filled again, so that what autograd
saved of it stays valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from luban.parallel.offload.direct import Buffer, DirectFile, done, rounded_up
from luban.parallel.offload.pools import DiskPool
from luban.parallel.remat.host import Streams


class Source(Protocol):
    """Where layers' weights come from."""

    def begin(self, layer: int) -> None:
        """Begin to read a layer's weights, where that takes time."""
        ...

    def arrived(self, layer: int) -> Sequence[Tensor]:
        """The weights in the host's memory; they stay valid until the next layer is asked for."""
        ...

    def forget(self) -> None:
        """Drop what was read, because weights have changed."""
        ...


class FromHost:
    """Weights that are in the host's memory (or mapped there)."""

    def __init__(self, layers: Sequence[Sequence[Tensor]]):
        self.layers = layers

    def begin(self, layer: int) -> None:
        """Nothing takes time."""

    def arrived(self, layer: int) -> Sequence[Tensor]:
        """As they are."""
        return self.layers[layer]

    def forget(self) -> None:
        """They are the weights themselves."""


class FromDisk:
    """Weights in a file, read past the operating system's cache into memory for two layers.

    Args:
        layers: tensors of the pool.
    """

    def __init__(self, layers: Sequence[Sequence[Tensor]], pool: DiskPool, file: DirectFile):
        self.layers, self.pool, self.file = layers, pool, file
        size = max((sum(rounded_up(t.numel() * t.itemsize) for t in layer) for layer in layers), default=0)
        self.free = [Buffer(size), Buffer(size)]
        self.reading: dict[int, tuple[Buffer, list[Future[None]]]] = {}

    def begin(self, layer: int) -> None:
        """Begin to read; of what was read earlier and isn't used the first is dropped."""
        if layer in self.reading:
            return
        if not self.free:
            self._drop(next(iter(self.reading)))
        buffer, requests, place = self.free.pop(), [], 0
        for tensor in self.layers[layer]:
            size = tensor.numel() * tensor.itemsize
            requests += self.file.read(buffer, place, self.pool.offsets[tensor.data_ptr()], size)
            place += rounded_up(size)
        self.reading[layer] = buffer, requests

    def arrived(self, layer: int) -> Sequence[Tensor]:
        """Wait for a layer."""
        self.begin(layer)
        buffer, requests = self.reading[layer]
        done(requests)
        found, place = [], 0
        for tensor in self.layers[layer]:
            found.append(buffer.tensor(place, tensor.numel(), tensor.dtype))
            place += rounded_up(tensor.numel() * tensor.itemsize)
        return found

    def forget(self) -> None:
        """Drop everything."""
        for layer in list(self.reading):
            self._drop(layer)

    def _drop(self, layer: int) -> None:
        buffer, requests = self.reading.pop(layer)
        done(requests)
        self.free.append(buffer)


class LayerWeights:
    """The layers whose weights are on the device.

    Args:
        blocks: in the order in which they run.
        weights: their parameters on the device that come and go, of each block, whose storages are emptied.
        source: of the same, in the same order.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        weights: Sequence[Sequence[nn.Parameter]],
        source: Source,
        streams: Streams,
    ):
        self.index = {id(block): layer for layer, block in enumerate(blocks)}
        self.weights, self.source, self.streams = weights, source, streams
        # layer → when its weights have arrived
        self.here: dict[int, torch.cuda.Event | None] = {}
        self.step = 1  # from a layer to the next one
        self.last = 0
        for layer in range(len(blocks)):
            self._empty(layer)

    def fetch(self, block: nn.Module) -> None:
        """Before a block runs, forward or backward."""
        self._fetch(self.index[id(block)])

    def watch(self, block: nn.Module, output: Tensor) -> None:
        """After a block's forward pass: fetch its weights again before its backward pass."""
        if output.requires_grad:
            output.register_hook(partial(self._again, self.index[id(block)]))

    def _again(self, layer: int, _gradient: Tensor) -> None:
        self._fetch(layer)

    @torch.no_grad()
    def _fetch(self, layer: int) -> None:
        if layer != self.last:
            self.step = 1 if layer > self.last else -1
        before, self.last, following = self.last, layer, layer + self.step
        for other in [n for n in self.here if n not in (before, layer, following)]:
            self._empty(other)
        self._come(layer)
        self.streams.wait(self.here[layer])
        if 0 <= following < len(self.weights):
            self.source.begin(following)
            if self.streams.cuda and isinstance(self.source, FromHost):
                self._come(following)

    def _come(self, layer: int) -> None:
        if layer in self.here:
            return
        arrived = self.source.arrived(layer)
        for weight, host in zip(self.weights[layer], arrived, strict=True):
            weight.untyped_storage().resize_(host.numel() * host.itemsize)
        with self.streams.copying("in"):
            for weight, host in zip(self.weights[layer], arrived, strict=True):
                # through another tensor of the storage: autograd must not take it for a change of what it saved
                there = torch.empty(0, dtype=weight.dtype, device=weight.device)
                there.set_(weight.untyped_storage(), 0, (weight.numel(),), (1,)).copy_(host.view(-1), non_blocking=True)
            self.here[layer] = self.streams.event()

    def _empty(self, layer: int) -> None:
        """Free a layer's memory on the device, behind the work that was given to it."""
        self.streams.wait(self.here.pop(layer, None))
        for weight in self.weights[layer]:
            weight.untyped_storage().resize_(0)

    def forget(self) -> None:
        """Weights have changed: what is on the device, or on its way, is old."""
        for layer in list(self.here):
            self._empty(layer)
        self.source.forget()
