"""Adafactor, LAMB, Lion, SOAP and schedule-free AdamW against their authors' updates written out, in float64 on fresh random parameters."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from test_optimizers import ROLES, copies, parameters, with_gradients

from luban.core.config import from_dict
from luban.core.errors import ConfigError
from luban.optim.adafactor import Adafactor
from luban.optim.base import OptimizerConfig, Update
from luban.optim.lamb import Lamb
from luban.optim.lion import Lion
from luban.optim.schedule_free import ScheduleFree
from luban.optim.soap import Soap

CONFIGS = {
    "adafactor": Adafactor(),
    "lamb": Lamb(),
    "lion": Lion(),
    "soap": Soap(every=2, largest=8),
    "schedule_free": ScheduleFree(weight_decay=0.3, betas=(0.8, 0.95)),
}  # 8: longer sides than a gradient has ranks have no bases of their own


def doubles():
    return {name: torch.nn.Parameter(p.detach().double()) for name, p in parameters().items()}


class Adam:
    """Both moments of one array, and their corrected ratio."""

    def __init__(self, shape, betas):
        self.first, self.second, self.betas, self.steps = np.zeros(shape), np.zeros(shape), betas, 0

    def __call__(self, g, eps):
        self.steps += 1
        self.first = self.betas[0] * self.first + (1 - self.betas[0]) * g
        self.second = self.betas[1] * self.second + (1 - self.betas[1]) * g * g
        first, second = self.first / (1 - self.betas[0] ** self.steps), self.second / (1 - self.betas[1] ** self.steps)
        return first / (np.sqrt(second) + eps)


def lion(config, decay):
    momentum = 0.0

    def step(w, g, lr):
        nonlocal momentum
        b1, b2 = config.betas
        update = np.sign(b1 * momentum + (1 - b1) * g)
        momentum = b2 * momentum + (1 - b2) * g
        return w - lr * (update + decay * w)

    return step


def lamb(config, decay):
    adam = None

    def step(w, g, lr):
        nonlocal adam
        adam = adam or Adam(w.shape, config.betas)
        r = adam(g, config.eps) + decay * w
        sizes = np.linalg.norm(w), np.linalg.norm(r)
        return w - lr * (sizes[0] / sizes[1] if min(sizes) > 0 else 1.0) * r

    return step


def adafactor(config, decay):
    t, kept = 0, {}

    def step(w, g, lr):
        nonlocal t
        t += 1
        beta, squares = 1 - t**-0.8, g**2 + 1e-30
        if w.ndim == 1:
            kept["v"] = beta * kept.get("v", 0.0) + (1 - beta) * squares
            v = kept["v"]
        else:  # sums over rows and columns, as in algorithm 2
            kept["r"] = beta * kept.get("r", 0.0) + (1 - beta) * squares.sum(1)
            kept["c"] = beta * kept.get("c", 0.0) + (1 - beta) * squares.sum(0)
            v = np.outer(kept["r"], kept["c"]) / kept["r"].sum()
        u = g / np.sqrt(v)
        u = u / max(1.0, math.sqrt((u**2).mean()) / 1.0)
        return w - lr * max(1e-3, math.sqrt((w**2).mean())) * u - lr * decay * w

    return step


def soap(config, decay):
    kept = {}

    def turned(x, back=False):
        left, right = kept.get("L_basis"), kept.get("R_basis")
        x = x if left is None else (left if back else left.T) @ x
        return x if right is None else x @ (right.T if back else right)

    def squares(g):
        sides = {"L": g @ g.T, "R": g.T @ g}
        return {side: square for side, square in sides.items() if len(square) <= config.largest}

    def step(w, g, lr):
        b1, b2 = config.betas
        if w.ndim == 1:
            adam = kept.setdefault("adam", Adam(w.shape, config.betas))
            return w - lr * adam_direction(adam, g, config)
        if "t" not in kept:  # the authors' first step only makes the bases
            kept.update(m=np.zeros_like(w), v=np.zeros_like(w), t=0)
            for side, square in squares(g).items():
                kept[side] = (1 - b2) * square
                kept[f"{side}_basis"] = eigenvectors(kept[side])
            return w
        kept["t"] += 1
        kept["m"] = b1 * kept["m"] + (1 - b1) * g
        kept["v"] = b2 * kept["v"] + (1 - b2) * turned(g) ** 2
        size = lr * math.sqrt(1 - b2 ** kept["t"]) / (1 - b1 ** kept["t"])
        w = w - size * turned(turned(kept["m"]) / (np.sqrt(kept["v"]) + config.eps), back=True)
        w = w - lr * decay * w
        for axis, (side, square) in enumerate(squares(g).items(), start=2 - len(squares(g))):
            kept[side] = b2 * kept[side] + (1 - b2) * square
            if kept["t"] % config.every == 0:
                basis = kept[f"{side}_basis"]
                order = np.argsort(-np.diag(basis.T @ kept[side] @ basis))
                kept["v"] = np.take(kept["v"], order, axis)
                kept[f"{side}_basis"] = np.linalg.qr(kept[side] @ basis[:, order])[0]
        return w

    return step


def eigenvectors(square):
    """By torch, since those of equal eigenvalues (0, of a long side) are anybody's choice."""
    return torch.linalg.eigh(torch.from_numpy(square)).eigenvectors.flip(-1).numpy()


def adam_direction(adam, g, config):
    """Adam as the authors' code writes it: √(1 − β₂ᵗ) / (1 − β₁ᵗ) · m / (√v + ε)."""
    adam(g, config.eps)
    size = math.sqrt(1 - config.betas[1] ** adam.steps) / (1 - config.betas[0] ** adam.steps)
    return size * adam.first / (np.sqrt(adam.second) + config.eps)


def schedule_free(config, decay):
    """Algorithm 1 with the three sequences kept; x is checked beside y."""
    kept = {"t": 0, "v": 0.0, "highest": 0.0, "sum": 0.0}

    def step(w, g, lr):
        b1, b2 = config.betas
        if not kept["t"]:
            kept.update(x=w, z=w)
        kept["t"] += 1
        kept["v"] = b2 * kept["v"] + (1 - b2) * g * g
        u = g / (np.sqrt(kept["v"] / (1 - b2 ** kept["t"])) + config.eps) + decay * w
        kept["highest"] = max(kept["highest"], lr)
        kept["sum"] += kept["highest"] ** 2
        c = kept["highest"] ** 2 / kept["sum"]
        kept["z"] = kept["z"] - lr * u
        kept["x"] = (1 - c) * kept["x"] + c * kept["z"]
        return (1 - b1) * kept["z"] + b1 * kept["x"]

    step.kept = kept
    return step


REFERENCES = {"adafactor": adafactor, "lamb": lamb, "lion": lion, "soap": soap, "schedule_free": schedule_free}


@pytest.mark.parametrize("name", CONFIGS)
def test_updates_are_the_authors(name):
    config, named = CONFIGS[name], doubles()
    optimizer = config.build(named, ROLES)
    expected = {key: p.detach().numpy().copy() for key, p in named.items()}
    steps = {key: REFERENCES[name](config, config.weight_decay if p.ndim == 2 else 0.0) for key, p in named.items()}
    for _ in range(7):
        with_gradients(named)
        factor = random.uniform(0.2, 1.0)
        optimizer.step(factor)
        for key, p in named.items():
            expected[key] = steps[key](expected[key], p.grad.numpy(), config.lr * factor)
    for key, p in named.items():
        np.testing.assert_allclose(p.detach().numpy(), expected[key], rtol=1e-7, atol=1e-9, err_msg=key)
    averages = optimizer.averages()
    assert bool(averages) == (name == "schedule_free")
    for key, x in averages.items():
        np.testing.assert_allclose(x.numpy(), steps[key].kept["x"], rtol=1e-7, atol=1e-9, err_msg=key)


def test_averages_take_the_place_of_the_parameters_for_a_while_and_leave_no_trace():
    named, config = parameters(), CONFIGS["schedule_free"]
    optimizer = config.build(named, ROLES)
    for _ in range(3):
        with_gradients(named)
        optimizer.step(1.0)
    before, averages = copies(named), optimizer.averages()
    half = {p: p.detach().bfloat16() for p in named.values()}
    with optimizer.averaged(half):
        for key, p in named.items():
            assert torch.equal(p, averages[key]) and not torch.equal(p, before[key])
            assert torch.equal(half[p], averages[key].bfloat16())
    assert all(torch.equal(p, before[key]) and torch.equal(half[p], p.bfloat16()) for key, p in named.items())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_reads_nothing_from_the_device(name):
    """Tensors of the meta device have no values, so that reading one on the host raises."""
    config, named = CONFIGS[name], parameters()
    optimizer = config.build(named, ROLES)
    for _ in range(2):  # SOAP must know when its first good step was
        with_gradients(named)
        optimizer.step(1.0)
    meta = {key: torch.nn.Parameter(p.detach().to("meta")) for key, p in named.items()}
    again = config.build(meta, ROLES)
    again.load_state_dict(optimizer.state_dict())
    gradients = {p: torch.empty_like(p) for p in meta.values()}
    for _ in range(3):
        again.step(1.0, Update(gradients, torch.empty((), device="meta"), torch.empty((), device="meta").bool()))


def test_soap_takes_its_bases_from_the_first_good_gradient_and_changes_them_in_time():
    """Steps that were skipped before it change nothing; the host's count is the device's."""
    config, named = CONFIGS["soap"], doubles()
    twin = copies(named)
    optimizer, again = config.build(named, ROLES), config.build(twin, ROLES)
    for _ in range(3):
        poisoned = {p: torch.full_like(p, float("inf")) for p in named.values()}
        optimizer.step(1.0, Update(poisoned, torch.tensor(1.0), torch.tensor(False)))
    for _ in range(6):
        with_gradients(named, twin)
        optimizer.step(1.0)
        again.step(1.0)
    for key, p in named.items():
        assert torch.equal(p, twin[key]), key
    ours, theirs = optimizer.state_dict(), again.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_adafactor_is_torchs():
    named = doubles()
    twin = copies(named)
    optimizer = Adafactor(lr=0.01, weight_decay=0.0).build(named, ROLES)
    reference = torch.optim.Adafactor(twin.values(), lr=0.01, eps=(1e-30, 1e-3), weight_decay=0.0)
    for _ in range(4):
        with_gradients(named, twin)
        optimizer.step(1.0)
        reference.step()
    for name, p in named.items():
        torch.testing.assert_close(p, twin[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_bad_steps_change_nothing_and_state_survives_as_named_tensors(name):
    config, named = CONFIGS[name], parameters()
    optimizer = config.build(named, ROLES)
    with_gradients(named)
    optimizer.step(1.0)
    twin = copies(named)
    again = config.build(twin, ROLES)
    again.load_state_dict({key: tensor.clone() for key, tensor in optimizer.state_dict().items()})
    kept = sum(tensor.nbytes for key, tensor in optimizer.state_dict().items() if not key.endswith("/trained"))
    assert config.state_bytes({key: p.shape for key, p in named.items()}, ROLES) == kept
    poisoned = {p: torch.full_like(p, float("nan")) for p in named.values()}
    optimizer.step(1.0, Update(poisoned, torch.tensor(float("nan")), torch.tensor(False)))
    for _ in range(3):
        with_gradients(named, twin)
        half = {p: torch.zeros_like(p, dtype=torch.bfloat16) for p in named.values()}
        eighth = {p: p.grad * 8 for p in named.values()}
        optimizer.step(0.7, Update(eighth, torch.tensor(1 / 8), torch.tensor(True), half))
        again.step(0.7)
    for key, p in named.items():
        assert torch.equal(p, twin[key]) and torch.equal(half[p], p.bfloat16()), key


@pytest.mark.parametrize(
    "wrong",
    [
        {"type": "lion", "betas": [0.9, 1.0]},
        {"type": "lamb", "eps": 0},
        {"type": "adafactor", "clip": 0},
        {"type": "adafactor", "decay_power": 2},
        {"type": "soap", "every": 0},
        {"type": "schedule_free", "betas": [0.0, 0.9]},
    ],
)
def test_nonsense_is_refused(wrong):
    with pytest.raises(ConfigError):
        from_dict(OptimizerConfig, wrong)


def test_divided_matrices_are_refused_by_what_needs_whole_ones():
    named = parameters()
    for name in ("adafactor", "lamb", "soap"):
        with pytest.raises(ConfigError, match=f"{name} needs whole matrices.*use adamw or muon"):
            CONFIGS[name].build(named, ROLES, divided=object())
    CONFIGS["lion"].build(named, ROLES, divided=object())
