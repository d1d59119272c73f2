"""What a forward of a model really does, recorded call by call from torch's dispatcher: the reference for `describe`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from luban.core.opgraph import Op, OpGraph
from luban.models.stack import TransformerStack
from luban.nn.context import LayerContext
from luban.nn.feedforward.gated import GatedFeedForward
from luban.nn.linear import JointLinear
from luban.nn.position.base import PositionEncoding, PositionMethod


@dataclass
class Call:
    """A call of the dispatcher that made a tensor, or wrote into one."""

    scope: str  # qualified name of the module whose forward made it
    name: str  # of the operator
    reads: list[int]  # the calls that wrote what it reads
    inputs: set[str]  # graph inputs that it reads
    parameters: set[int]  # ids of the storages of parameters that it reads
    flops: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class Returned:
    """A tensor as a module returned or read it."""

    call: int  # that wrote it
    shape: tuple[int, ...]
    dtype: torch.dtype


class TracedGraph(TorchDispatchMode):
    """`with TracedGraph(model, tokens=…) as trace: model(tokens)`.

    Tensors are told apart by their storages, so that views need no care; a layer that shares another's parameters is
    named after itself.
    """

    def __init__(self, model: nn.Module, **inputs: Tensor):
        super().__init__()
        self.model, self.calls = model, []
        self.returned: dict[str, Returned] = {}  # module → what it returned
        self.read: dict[str, Returned] = {}  # module → its first argument
        self._alive: list[Any] = []  # storages, so that no address is used twice
        self._writer: dict[int, int] = {}
        self._input_names = {self._key(tensor): name for name, tensor in inputs.items()}
        self.parameter_names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.parameter_names.setdefault(self._key(parameter), []).append(name)
        self._names: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self._names.setdefault(id(module), []).append(name)
        self._scopes = [("", "")]  # (qualified name, name of the layer that it stands for)
        self._runs: dict[str, int] = {}
        self._stack = ExitStack()

    def __enter__(self):
        for handle in (register_module_forward_pre_hook(self._enter), register_module_forward_hook(self._leave)):
            self._stack.callback(handle.remove)
        for name in ("attend", "cross_attend"):
            self._stack.enter_context(patch.object(LayerContext, name, self._named(getattr(LayerContext, name))))
        linear = GatedFeedForward._linear
        self._stack.enter_context(patch.object(GatedFeedForward, "_linear", self._named(linear, by_argument=True)))
        for name, stack in self.model.named_modules():
            if isinstance(stack, TransformerStack):
                self._stack.enter_context(patch.object(stack.position, "embed", self._embed(f"{name}.position", stack)))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        read = [self._key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if func._schema.name.endswith("_like") or "::new_" in func._schema.name:
            read = []  # of which only the shape matters
        written = [leaf for leaf in made if func._schema.is_mutable or self._key(leaf) not in read]
        if written:
            count = flop_registry.get(func._overloadpacket)
            self.calls.append(
                Call(
                    scope=self._scopes[-1][1],
                    name=func._schema.name,
                    reads=[self._writer[key] for key in read if key in self._writer],
                    inputs={self._input_names[key] for key in read if key in self._input_names},
                    parameters={key for key in read if key in self.parameter_names},
                    flops=count(*args, **kwargs, out_val=out) if count else 0,
                    shape=tuple(written[0].shape),
                    dtype=written[0].dtype,
                )
            )
            self._writer |= {self._key(leaf): len(self.calls) - 1 for leaf in written}
        return out

    def _key(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self._alive.append(storage)
        return storage._cdata

    def _note(self, where: dict[str, Returned], name: str, tensor: Any) -> None:
        if isinstance(tensor, Tensor) and self._key(tensor) in self._writer:
            where[name] = Returned(self._writer[self._key(tensor)], tuple(tensor.shape), tensor.dtype)

    def _enter(self, module: nn.Module, args: Any) -> None:
        if id(module) not in self._names:
            return
        inside, shown = self._scopes[-1]
        own = next(name for name in self._names[id(module)] if not inside or name.startswith(f"{inside}."))
        alias = shown + own[len(inside) :]
        stack, _, number = own.rpartition(".blocks.")
        if number.isdigit():
            run = self._runs[own] = self._runs.get(own, -1) + 1
            block_of = self.model.get_submodule(stack).block_of
            alias = f"{stack}.blocks.{[index for index, block in block_of.items() if block == number][run]}"
        self._scopes.append((own, alias))
        self._note(self.read, alias, args[0] if args else None)

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        if id(module) not in self._names:
            return
        _, name = self._scopes.pop()
        self._note(self.returned, name, out)
        if isinstance(module, JointLinear):
            for part, tensor in zip(module.sizes, out, strict=True):
                self._note(self.returned, f"{name}.{part}", tensor)
        if isinstance(out, PositionEncoding) and isinstance(module, PositionMethod):
            made = out.bias

            def bias() -> Tensor | None:
                tensor = made()
                self._note(self.returned, name, tensor)
                return tensor

            out.bias = bias  # type: ignore[method-assign]

    def _named(self, method: Callable, *, by_argument: bool = False) -> Callable:
        """The method, noting what it returns as "attention", or as its first argument, of the module that runs."""

        def noting(own, *args, **kwargs):
            out = method(own, *args, **kwargs)
            self._note(self.returned, f"{self._scopes[-1][1]}.{args[0] if by_argument else 'attention'}", out)
            return out

        return noting

    def _embed(self, name: str, stack: TransformerStack) -> Callable:
        method = stack.position.embed

        def noting(x: Tensor, positions: Tensor) -> Tensor:
            self._scopes.append((name, name))
            out = method(x, positions)
            self._scopes.pop()
            if out is not x:
                self._note(self.returned, name, out)
            return out

        return noting

    def match(self, graph: OpGraph) -> dict[str, Returned]:
        """Described operation → what it really returned. Raises KeyError, or StopIteration, where nothing matches."""
        found = {}
        sums = {scope: self._sums(scope) for scope in {_parent(op.name) for op in graph.ops if op.kind == "add"}}
        for op in graph.ops:
            if op.kind == "add":
                found[op.name] = next(sums[_parent(op.name)])
            elif op.kind == "activation":  # what the last matmul of the network reads
                found[op.name] = self._activation(_parent(op.name))
            elif op.kind == "concat":
                found[op.name] = self.read[graph.consumers(op.name)[0].name]
            else:
                found[op.name] = self.returned[op.name]
        assert not [scope for scope, left in sums.items() if next(left, None)], "sums that are not described"
        return found

    def _sums(self, scope: str) -> Iterator[Returned]:
        """The sums that a module's own forward makes, in order; a sum that only another of them reads is part of it."""
        mine = [
            i
            for i, call in enumerate(self.calls)
            if call.scope == scope
            and call.name == "aten::add"
            and call.dtype.is_floating_point
            and len(set(call.reads)) > 1
        ]
        for i in mine:
            readers = [j for j, call in enumerate(self.calls) if i in call.reads]
            if not (len(readers) == 1 and readers[0] in mine):
                yield Returned(i, self.calls[i].shape, self.calls[i].dtype)

    def _activation(self, network: str) -> Returned:
        for call in self.calls:
            names = [name for key in call.parameters for name in self.parameter_names[key]]
            if any(name.endswith("feedforward.down.weight") for name in names) and call.scope.startswith(network):
                i = call.reads[0]
                return Returned(i, self.calls[i].shape, self.calls[i].dtype)
        raise KeyError(f"{network} has no last matmul")

    def between(self, op: Op, matched: dict[str, Returned]) -> tuple[set[str], int]:
        """(described operations and graph inputs that this one reads, FLOPs on the way from them to its result)."""
        stops = {returned.call: name for name, returned in matched.items() if name != op.name}
        read, flops, seen = set(), 0, set()
        waiting = [matched[op.name].call]
        while waiting:
            at = waiting.pop()
            if at in seen:
                continue
            seen.add(at)
            call = self.calls[at]
            flops += call.flops
            read |= call.inputs
            for before in call.reads:
                if before in stops:
                    read.add(stops[before])
                else:
                    waiting.append(before)
        if op.kind == "recurrent":  # the last step's writes are computed as well, although nothing reads them
            flops = sum(call.flops for call in self.calls if f"{call.scope}.".startswith(f"{op.name}."))
        return read, flops


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
