"""Optimizers against hand computation and torch.optim, on fresh random parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from luban.core.errors import ArtifactError, ConfigError
from luban.optim.adamw import AdamW
from luban.optim.base import OptimizerConfig, Update, hidden_matrices
from luban.optim.muon import Muon, orthogonalise


def parameters() -> dict[str, nn.Parameter]:
    shapes = {
        "decoder.embedding.tokens.weight": (11, 6),
        "decoder.blocks.0.q.weight": (6, 6),
        "decoder.blocks.1.q.weight": (6, 6),
        "decoder.blocks.0.up.weight": (10, 6),
        "decoder.blocks.0.norm.weight": (6,),
        "head.weight": (11, 6),
    }
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


ROLES = {
    "decoder.embedding.tokens.weight": "embedding",
    "decoder.blocks.0.q.weight": "q",
    "decoder.blocks.1.q.weight": "q",
    "decoder.blocks.0.up.weight": "up",
    "decoder.blocks.0.norm.weight": "norm",
    "head.weight": "lm_head",
}


def copies(named: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(p.detach().clone()) for name, p in named.items()}


def with_gradients(*sets: dict[str, nn.Parameter]) -> None:
    for name, parameter in sets[0].items():
        gradient = torch.randn_like(parameter)
        for each in sets:
            each[name].grad = gradient.clone()


def test_adamw_is_the_papers_update_and_decays_matrices_only():
    named = parameters()
    expected = {name: p.detach().double() for name, p in named.items()}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in expected.items()}
    config = AdamW(lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    optimizer = config.build(named, ROLES)
    for step, factor in enumerate((0.5, 1.0, 0.2), start=1):
        with_gradients(named)
        optimizer.step(factor)
        lr = 0.01 * factor
        for name, p in named.items():
            first, second = moments[name]
            g = p.grad.double()
            first.mul_(0.8).add_(g, alpha=0.2)
            second.mul_(0.9).add_(g * g, alpha=0.1)
            decay = 0.3 if p.ndim == 2 else 0.0
            update = (first / (1 - 0.8**step)) / ((second / (1 - 0.9**step)).sqrt() + 1e-6)
            expected[name] = expected[name] * (1 - lr * decay) - lr * update
    for name, p in named.items():
        torch.testing.assert_close(p.detach().double(), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", [AdamW(lr=0.01), AdamW(lr=0.01, moments="bf16"), Muon()])
def test_a_bad_step_changes_nothing_and_the_next_goes_on(config):
    named = parameters()
    optimizer, clean = config.build(named, ROLES), config.build(twin := copies(named), ROLES)
    with_gradients(named, twin)
    optimizer.step(1.0)
    clean.step(1.0)
    poisoned = {p: torch.full_like(p, float("nan")) for p in named.values()}
    optimizer.step(1.0, Update(poisoned, torch.tensor(float("nan")), torch.tensor(False)))
    with_gradients(named, twin)
    optimizer.step(1.0)
    clean.step(1.0)
    for name, p in named.items():
        assert torch.equal(p, twin[name]), name


@pytest.mark.parametrize("config", [AdamW(lr=0.01), AdamW(lr=0.01, moments="bf16"), Muon()])
def test_gradients_are_scaled_and_half_precision_copies_refreshed(config):
    named = parameters()
    scaled, plain = config.build(named, ROLES), config.build(twin := copies(named), ROLES)
    with_gradients(named, twin)
    half = {p: torch.zeros_like(p, dtype=torch.bfloat16) for p in named.values()}
    eighth = {p: p.grad * 8 for p in named.values()}
    scaled.step(1.0, Update(eighth, torch.tensor(1 / 8), torch.tensor(True), half))
    plain.step(1.0)
    for name, p in named.items():
        assert torch.equal(p, twin[name]) and torch.equal(half[p], p.bfloat16()), name


def test_muon_matches_torchs_own_on_hidden_matrices_and_adamw_on_the_rest():
    named = parameters()
    twin = copies(named)
    optimizer = Muon(lr=0.02, adamw_lr=0.003, weight_decay=0.1).build(named, ROLES)
    hidden = {name: twin[name] for name in hidden_matrices(ROLES)}
    reference = torch.optim.Muon(
        hidden.values(), lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    rest = {name: p for name, p in twin.items() if name not in hidden}
    adamw = AdamW(lr=0.003, weight_decay=0.1).build(rest, {name: ROLES[name] for name in rest})
    for _ in range(4):
        with_gradients(named, twin)
        optimizer.step(1.0)
        reference.step()
        adamw.step(1.0)
    assert set(hidden) == {"decoder.blocks.0.q.weight", "decoder.blocks.1.q.weight", "decoder.blocks.0.up.weight"}
    for name, p in named.items():
        # bf16 products round differently batched: 2⁻⁸ of an update of RMS 0.2 · lr, a few rounds, four steps
        torch.testing.assert_close(p, twin[name], rtol=0, atol=1e-3 if name in hidden else 1e-6)


def test_newton_schulz_drives_singular_values_to_one_and_keeps_directions():
    matrices = torch.randn(3, 24, 10)
    made = orthogonalise(matrices, dtype=torch.float32)
    singular = torch.linalg.svdvals(made)
    assert singular.min() > 0.6 and singular.max() < 1.3
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    inside = u.mT @ made @ vt.mT  # diagonal where the singular vectors were kept
    off = inside - torch.diag_embed(torch.diagonal(inside, dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-3
    torch.testing.assert_close(orthogonalise(matrices.mT, dtype=torch.float32), made.mT, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [AdamW(lr=0.01), AdamW(lr=0.01, moments="bf16"), Muon()])
def test_state_survives_as_named_tensors(config):
    named = parameters()
    optimizer = config.build(named, ROLES)
    with_gradients(named)
    optimizer.step(1.0)
    twin = copies(named)
    again = config.build(dict(reversed(twin.items())), ROLES)  # names decide, not order
    again.load_state_dict({name: tensor.clone() for name, tensor in optimizer.state_dict().items()})
    for _ in range(2):
        with_gradients(named, twin)
        optimizer.step(0.7)
        again.step(0.7)
    for name, p in named.items():
        assert torch.equal(p, twin[name]), name
    kept = sum(tensor.nbytes for tensor in optimizer.state_dict().values())
    assert config.state_bytes({name: p.shape for name, p in named.items()}, ROLES) == kept
    with pytest.raises(ArtifactError, match="does not have"):
        again.load_state_dict({"decoder.blocks.9.q.weight/exp_avg": torch.zeros(1)})


def test_optimizers_refuse_nonsense():
    from luban.core.config import from_dict

    assert from_dict(OptimizerConfig, {"type": "muon", "lr": "0.5"}).lr == 0.5
    for wrong in (
        {"type": "adamw", "lr": 0},
        {"type": "adamw", "betas": [0.9, 1.0]},
        {"type": "muon", "momentum": 1},
        {"type": "adamw", "weight_decay": -1},
        {"type": "adamw", "momentum": 0.9},
    ):
        with pytest.raises(ConfigError):
            from_dict(OptimizerConfig, wrong)
