"""Clipping against one long vector."""

from __future__ import annotations

import torch

from luban.optim.clip import clip_factor, global_norm


def gradients() -> list[torch.Tensor]:
    return [torch.randn(5, 3), torch.randn(7), torch.randn(2, 2)]


def test_global_norm_is_the_norm_of_one_vector_and_sees_nan():
    made = gradients()
    torch.testing.assert_close(global_norm(made), torch.cat([g.flatten() for g in made]).norm())
    made[1][3] = float("nan")
    assert global_norm(made).isnan()


def test_norms_of_half_precision_are_summed_in_fp32():
    made = [torch.full((300, 300), 2.0, dtype=torch.bfloat16), torch.ones(5, dtype=torch.bfloat16)]
    torch.testing.assert_close(global_norm(made), torch.tensor(360_005.0).sqrt())


def test_clipping_bounds_the_norm_after_removing_the_loss_scale_and_keeps_the_direction():
    made = gradients()
    scaled = [g * 1024 for g in made]
    flat = torch.cat([g.flatten() for g in made])
    factor = clip_factor(global_norm(scaled), 0.5, divide_by=1024)
    after = torch.cat([(g * factor).flatten() for g in scaled])
    torch.testing.assert_close(after, flat * 0.5 / flat.norm())


def test_small_gradients_and_unbounded_norms_are_left_alone():
    norm = global_norm(gradients())
    for bound in (1e6, 0.0):
        assert clip_factor(norm, bound) == 1
        assert clip_factor(norm, bound, divide_by=8) == 1 / 8
