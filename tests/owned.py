"""Parameters that may be read only where their owner computes with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from luban.nn.linear import MatmulOwner
from luban.nn.moe.experts import Experts

# What says something of a parameter without reading its values.
FACTS = {
    "shape",
    "dtype",
    "device",
    "layout",
    "requires_grad",
    "grad",
    "is_leaf",
    "grad_fn",
    "ndim",
    "is_cuda",
    "is_meta",
    "is_sparse",
    "is_quantized",
    "is_mkldnn",
    "is_nested",
    "names",
    "_version",
}
QUESTIONS = {
    "size",
    "dim",
    "numel",
    "stride",
    "element_size",
    "is_floating_point",
    "is_complex",
    "is_contiguous",
    "get_device",
    "is_inference",
    "__len__",
    "__hash__",
    "requires_grad_",
    "untyped_storage",
}


class OwnershipError(AssertionError):
    """A weight was read outside of its owner's forward."""


class Owned(nn.Parameter):
    """A parameter that raises where it is read while none of its `owners` is in its forward."""

    owners: frozenset[int]  # ids of modules
    path: str  # its qualified name

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if not (_describes(func) or _scopes.optimizer or torch._C._current_graph_task_id() != -1):
            for parameter in _parameters((args, kwargs)):
                if not parameter.owners & set(_scopes.modules):
                    raise OwnershipError(f"{parameter.path} is read by {func} outside of its owner's forward")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class _Scopes:
    def __init__(self):
        self.modules: list[int] = []  # ids of the modules whose forwards are running, outermost first
        self.optimizer = 0  # how many optimizer calls are running


_scopes = _Scopes()


def _describes(func: Any) -> bool:
    name = func.__name__
    if name in ("__get__", "__set__", "__delete__"):
        return func.__self__.__name__ in FACTS
    return name in QUESTIONS


def _parameters(value: Any) -> Iterator[Owned]:
    if isinstance(value, Owned):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _parameters(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _parameters(item)


def own(module: nn.Module) -> int:
    """Turn every parameter of `module` into an `Owned` one, in place; returns how many there are."""
    owners: dict[int, set[int]] = {}
    for part in module.modules():
        held = [*part.parameters(recurse=False)]
        if isinstance(part, MatmulOwner):
            held += [p for projection in part.projections().values() for p in projection.parameters(recurse=False)]
        elif isinstance(part, Experts):
            held += part.parameters()
        elif type(part).forward is nn.Module.forward or not held:
            continue  # no forward of its own: the owner above it reads them
        for parameter in held:
            owners.setdefault(id(parameter), set()).add(id(part))
    names = {id(parameter): (name, parameter) for name, parameter in module.named_parameters()}
    for key, (name, parameter) in names.items():
        parameter.__class__ = Owned
        parameter.owners, parameter.path = frozenset(owners[key]), name
    return len(names)


@contextmanager
def ownership_enforced(engine: Any = None) -> Iterator[None]:
    """Keep track of the forwards that are running, and of the optimizer of a `TrainEngine`."""

    def enter(module: nn.Module, _args: Any) -> None:
        _scopes.modules.append(id(module))

    def leave(module: nn.Module, _args: Any, _out: Any) -> None:
        assert _scopes.modules.pop() == id(module)

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    if engine is not None:
        engine.optimizer.step, engine.params.copies = map(_as_optimizer, (engine.optimizer.step, engine.params.copies))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        _scopes.modules.clear()


def _as_optimizer(function):
    def run(*args, **kwargs):
        _scopes.optimizer += 1
        try:
            return function(*args, **kwargs)
        finally:
            _scopes.optimizer -= 1

    return run
