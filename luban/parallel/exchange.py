"""Gradients that leave for other processes while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

IN_FLIGHT = 2  # groups whose gradients may be on their way while a third begins

Found = list[tuple[str, Tensor]]  # gradients by parameter


@dataclass
class Group:
    """Parameters whose gradients go together."""

    names: list[str]
    missing: int = 0  # gradients of this micro-batch that the backward pass has still to compute
    sent: bool = False  # they are on their way


class GradientExchange:
    """Exchanges the gradients of a group of parameters as soon as all are there, on a GPU on a stream of its own.

    Args:
        working: the model's parameters by name.
        groups: their names; processes must have the same.
        exchange: gradients → what this process has of their sums over the processes.
        kept: of earlier micro-batches, by name, added to those of the one that is exchanged.
    """

    def __init__(
        self,
        working: Mapping[str, nn.Parameter],
        groups: Iterable[Sequence[str]],
        exchange: Callable[[Found], Mapping[str, Tensor]],
        kept: dict[str, Tensor] | None = None,
    ):
        self.working, self.exchange, self.kept = working, exchange, {} if kept is None else kept
        self.groups = [Group(list(names)) for names in groups if names]
        self.sums: dict[str, Tensor] = {}  # over the micro-batches that were exchanged
        cuda = next(iter(working.values())).is_cuda
        self._stream = torch.cuda.Stream() if cuda else None
        self._in_flight: list[tuple[Any, Found]] = []  # gradients, and when they have been sent
        self._active = True
        for group in self.groups:
            for name in group.names:
                working[name].register_post_accumulate_grad_hook(self._hook(group))

    def begin(self, *, active: bool) -> None:
        """Before the backward pass of a micro-batch, whose gradients are exchanged if `active`."""
        self._active = active
        for group in self.groups:
            group.missing, group.sent = len(group.names), False

    def _hook(self, group: Group) -> Callable[[nn.Parameter], None]:
        def arrived(_parameter: nn.Parameter) -> None:
            group.missing -= 1
            if group.missing == 0 and self._active:
                self._send(group)

        return arrived

    @torch.no_grad()
    def finish(self) -> None:
        """After a backward pass: what is left of it, as where it has not reached every parameter of a group; or what it has
        computed is kept for the next."""
        for group in self.groups:
            if self._active and not group.sent:
                self._send(group)
            elif not self._active:
                for name, gradient in self._taken(group):
                    self.kept[name] = self.kept[name].add_(gradient) if name in self.kept else wide(gradient)

    def wait(self) -> dict[str, Tensor]:
        """The sums, of every parameter that was reached."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
            self._in_flight.clear()
        return self.sums

    def clear(self) -> None:
        """Forget the sums, and what was kept."""
        self.sums = {}
        self.kept.clear()

    def _taken(self, group: Group) -> Found:
        """The gradients, off the model."""
        found: Found = []
        for name in group.names:
            gradient, self.working[name].grad = self.working[name].grad, None
            if gradient is not None:
                found.append((name, gradient))
        return found

    @torch.no_grad()
    def _send(self, group: Group) -> None:
        group.sent = True
        fresh = dict(self._taken(group))
        found: Found = []
        for name in group.names:
            gradient, before = fresh.get(name), self.kept.pop(name, None)
            if before is not None:
                gradient = before if gradient is None else before.add_(gradient)
            if gradient is not None:
                found.append((name, gradient.contiguous()))
        if not found:
            return
        if self._stream is None:
            self._add(self.exchange(found))
            return
        computing = torch.cuda.current_stream()
        self._stream.wait_stream(computing)
        with torch.cuda.stream(self._stream):
            self._add(self.exchange(found))
            self._in_flight.append((self._stream.record_event(), found))
        while len(self._in_flight) > IN_FLIGHT:  # their memory is used again after they have been sent
            sent, _ = self._in_flight.pop(0)
            computing.wait_event(sent)

    def _add(self, summed: Mapping[str, Tensor]) -> None:
        for name, part in summed.items():
            self.sums[name] = self.sums[name].add_(part) if name in self.sums else part


def grouped(model: nn.Module, blocks: Iterable[nn.Module], names: Iterable[str]) -> list[list[str]]:
    """Of some of a model's parameters those outside of its blocks, each by itself, then those of each block."""
    wanted = set(names)
    left = {id(p): name for name, p in model.named_parameters() if name in wanted}
    inside = [[left.pop(id(p)) for p in block.parameters() if id(p) in left] for block in blocks]
    return [*([name] for name in left.values()), *inside]


def wide(gradient: Tensor) -> Tensor:
    """In the dtype that gradients are summed in: fp32, or fp64."""
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))
