"""Faults of the stack and its seams that readers of the code found, each with the right value."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import FAMILIES, engine_of
from torch import nn

from luban.core.errors import ArtifactError, ConfigError
from luban.core.plan import ParallelPlan
from luban.generate.cache import ContiguousCache
from luban.models.build import build_model, materialise
from luban.models.config import resolve_spec
from luban.models.spec import uniform
from luban.nn.init import InitialValues, initialise
from luban.nn.linear import matmul_owners
from luban.nn.mixer.grouped import Grouped
from luban.nn.position.alibi import Alibi
from luban.nn.position.kerple import KerpleLog
from luban.nn.position.rope import Rope
from luban.optim.adamw import AdamW
from luban.parallel.apply import apply

SPEC = uniform(vocab_size=31, width=32, layers=2, context=64, mixer=Grouped(heads=4))


@pytest.mark.parametrize("position", [Rope(base=500.0), Alibi(), KerpleLog()])
def test_layers_of_one_position_method_and_different_heads_have_a_module_each(position):
    """A layer alone equals the same layer in a stack whose other layer has other heads."""
    first, second = (replace(SPEC.layers[0], mixer=Grouped(heads=n), position=position) for n in (4, 2))
    both = build_model(replace(SPEC, layers=(first, second)), dtype="float64").eval()
    for index, layer in enumerate((first, second)):
        alone = build_model(replace(SPEC, layers=(layer,)), dtype="float64").eval()
        same = build_model(replace(SPEC, layers=(layer, layer)), dtype="float64").eval()
        kept = {name: value for name, value in both.state_dict().items() if "layer_positions" not in name}
        assert kept.keys() == {name for name in same.state_dict() if "layer_positions" not in name}
        x = torch.randn(2, 9, 32, dtype=torch.float64)
        alone.decoder.blocks["0"].load_state_dict(both.decoder.blocks[str(index)].state_dict())
        torch.testing.assert_close(output(both, str(index), x), output(alone, "0", x), rtol=1e-12, atol=1e-12)


def output(model: nn.Module, block: str, x: torch.Tensor) -> torch.Tensor:
    """What a block of the model makes of x in a forward of the whole."""
    found: list[torch.Tensor] = []
    hooks = [
        model.decoder.blocks[block].register_forward_pre_hook(lambda _, args: (x, *args[1:])),
        model.decoder.blocks[block].register_forward_hook(lambda _, __, out: found.append(out)),
    ]
    model(torch.zeros(x.shape[:2], dtype=torch.long))
    for hook in hooks:
        hook.remove()
    return found[0]


@pytest.mark.parametrize("position", [Rope(), Alibi(), KerpleLog()])
def test_positions_that_are_given_hold_for_cached_keys_too(position):
    model = build_model(replace(SPEC, position=position), dtype="float64").eval()
    tokens = torch.randint(0, 31, (2, 8))
    positions = torch.tensor([[0, 1, 2, 3, 20, 21, 22, 23]])
    whole = model(tokens, positions=positions)
    cache = ContiguousCache.of(model, 2)
    parts = [model(tokens[:, at : at + 3], positions=positions[:, at : at + 3], cache=cache) for at in (0, 3, 6)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)


def test_cross_is_refused_where_nothing_is_read():
    with pytest.raises(ConfigError, match="only layers of an encoder–decoder's decoder"):
        resolve_spec({"layer": {"cross": True}}, 31)


class LowRank(nn.Module):
    """x·Aᵀ·Bᵀ, B zero at first."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.empty(2, inputs)), nn.Parameter(torch.empty(outputs, 2))
        self.parameter_roles = {"a": "adapter", "b": "adapter"}

    def draw_parameters(self, draw: InitialValues) -> None:
        self.a.copy_(draw.normal("a", self.a, 0.1))
        self.b.zero_()

    def forward(self, x):
        return x @ self.a.t() @ self.b.t()


def adapt(model: nn.Module) -> None:
    for _, owner in list(matmul_owners(model)):
        for name, projection in owner.projections().items():
            with torch.device("meta"):
                owner.add_adapter(name, LowRank(projection.in_features, projection.out_features))


def test_a_trained_model_is_adapted_and_what_is_added_is_drawn():
    family = FAMILIES["decoder"]
    base = engine_of(family, seed=3)
    weights = base.state_dict()["model"]
    with torch.device("meta"):
        adapted = family.spec.body.build(family.spec)
    engine = apply(family.objective.loss(adapted), ParallelPlan(), AdamW(), init=weights, adapt=adapt)
    state = engine.state_dict()["model"]
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    added = {name: value for name, value in state.items() if name not in weights}
    assert added and all(bool(value.any()) == name.endswith(".a") for name, value in added.items())
    with torch.device("meta"):
        again = family.spec.body.build(family.spec)
    missing = {name: value for name, value in weights.items() if not name.endswith("norm.weight")}
    with pytest.raises(ArtifactError, match="lack"):
        apply(family.objective.loss(again), ParallelPlan(), AdamW(), init=missing)


class Counted(nn.Module):
    """A part with a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.full((3,), 3.0))


class Set(Counted):
    def draw_parameters(self, draw: InitialValues) -> None:
        self.seen.fill_(3.0)


def test_buffers_have_first_values_or_are_refused():
    for kind in (Counted, Set):
        with torch.device("meta"):
            module = nn.Sequential(kind())
        materialise(module, "cpu")
        if kind is Set:
            initialise(module, SPEC.init, layers=1, seed=0)
            assert module[0].seen.tolist() == [3.0] * 3
        else:
            with pytest.raises(TypeError, match=r"0\.seen is a buffer"):
                initialise(module, SPEC.init, layers=1, seed=0)
