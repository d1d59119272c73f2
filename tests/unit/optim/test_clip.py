"""Clipping against one long vector."""

from __future__ import annotations

import torch

from luban.optim.clip import global_norm, scale_


def gradients() -> list[torch.Tensor]:
    return [torch.randn(5, 3), torch.randn(7), torch.randn(2, 2)]


def test_global_norm_is_the_norm_of_one_vector_and_sees_nan():
    made = gradients()
    torch.testing.assert_close(global_norm(made), torch.cat([g.flatten() for g in made]).norm())
    made[1][3] = float("nan")
    assert global_norm(made).isnan()


def test_clipping_bounds_the_norm_after_removing_the_loss_scale_and_keeps_the_direction():
    made = gradients()
    scaled = [g * 1024 for g in made]
    flat = torch.cat([g.flatten() for g in made])
    logged = scale_(scaled, float(global_norm(scaled)), 0.5, divide_by=1024)
    after = torch.cat([g.flatten() for g in scaled])
    torch.testing.assert_close(torch.tensor(logged), flat.norm())
    torch.testing.assert_close(after, flat * 0.5 / flat.norm())


def test_small_gradients_and_unbounded_norms_are_left_alone():
    for bound in (1e6, 0.0):
        made = gradients()
        before = [g.clone() for g in made]
        scale_(made, float(global_norm(made)), bound)
        assert all(torch.equal(a, b) for a, b in zip(made, before, strict=True))
