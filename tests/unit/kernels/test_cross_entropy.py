"""Linear layer and cross-entropy in one, against the definition: loss and gradients on fresh random input.

On a CPU this runs under Triton's interpreter.
"""

import pytest
import torch
from drawn import drawn
from interpreter import DEVICE, HERE, ON_GPU, here, run_interpreted

triton = pytest.importorskip("triton", reason="triton is Linux-only")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]


@pytest.mark.skipif(HERE, reason="runs directly")
@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_under_the_interpreter(chosen):
    run_interpreted(__file__, "-m", chosen)


def both(rows, table, targets, bias, **options):
    """(loss, gradients) of the kernels, of the definition in float64, and of the definition in the inputs' precision."""
    from luban.kernels import cross_entropy
    from luban.kernels.reference import cross_entropy as reference

    results = []
    for function, dtype in ((cross_entropy, rows.dtype), (reference, torch.float64), (reference, rows.dtype)):
        inputs = [x.to(dtype).detach().requires_grad_() for x in (rows, table, *([] if bias is None else [bias]))]
        loss = function.linear_cross_entropy(
            *inputs[:2], targets, bias_V=inputs[2] if bias is not None else None, **options
        )
        (loss * 0.37).backward()
        results.append((loss.detach().double(), [x.grad.double() for x in inputs]))
    return results


@here
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("smoothing", "z_loss"), drawn([(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.2, 1e-3)], 2))
@pytest.mark.parametrize("biased", [False, True])
def test_loss_and_gradients(dtype, smoothing, z_loss, biased, monkeypatch):
    from luban.kernels import cross_entropy

    N, E, V = 37, 24, 4096 + 77  # over one block of the vocabulary
    monkeypatch.setattr(cross_entropy, "LOGIT_BYTES", V * 4 * 10)  # several chunks
    rows, table = torch.randn(N, E, device=DEVICE, dtype=dtype), torch.randn(V, E, device=DEVICE, dtype=dtype) / 3
    bias = torch.randn(V, device=DEVICE, dtype=dtype) if biased else None
    targets = torch.randint(0, V, (N,), device=DEVICE)
    targets[::5] = -100
    targets[1], targets[2] = V - 1, 0
    (loss, got), (wanted_loss, wanted), (_, naive) = both(
        rows, table, targets, bias, smoothing=smoothing, z_loss=z_loss
    )
    assert torch.allclose(loss, wanted_loss, rtol=1e-5 if dtype is torch.float32 else 5e-3)
    for ours, right, plain in zip(got, wanted, naive, strict=True):
        error = (ours - right).norm() / right.norm()
        limit = 1e-5 if dtype is torch.float32 else 2 * (plain - right).norm() / right.norm()
        assert error <= limit
    assert not got[0][::5].any()  # ignored rows have no gradient


@here
def test_nothing_but_ignored_rows():
    from luban.kernels.cross_entropy import linear_cross_entropy

    rows = torch.randn(3, 8, device=DEVICE, requires_grad=True)
    loss = linear_cross_entropy(rows, torch.randn(50, 8, device=DEVICE), torch.full((3,), -100, device=DEVICE))
    loss.backward()
    assert loss == 0
    assert not rows.grad.any()


@here
def test_extreme_logits_stay_finite():
    from luban.kernels.cross_entropy import linear_cross_entropy

    rows = torch.full((2, 4), 300.0, device=DEVICE, requires_grad=True)
    table = torch.tensor([[1.0] * 4, [-1.0] * 4, [0.0] * 4], device=DEVICE)
    loss = linear_cross_entropy(rows, table, torch.tensor([0, 1], device=DEVICE))
    loss.backward()
    assert loss.item() == pytest.approx(2400.0)
    assert rows.grad.isfinite().all()


@here
def test_slices_of_the_vocabulary_combine_to_the_whole():
    """What ranks that share the vocabulary would do: combine the statistics, then each its own gradient."""
    from luban.kernels.cross_entropy import row_statistics, to_gradient_

    logits, targets = torch.randn(9, 500, device=DEVICE) * 4, torch.randint(0, 500, (9,), device=DEVICE)
    wide = logits.double().requires_grad_()
    torch.nn.functional.cross_entropy(wide, targets, reduction="sum").backward()
    shards = [logits[:, :300].clone(), logits[:, 300:].clone()]
    found = [row_statistics(shard, targets, first) for shard, first in zip(shards, (0, 300), strict=True)]
    lse = torch.stack([lse for lse, _, _ in found]).logsumexp(0)
    picked = sum(picked for _, picked, _ in found)
    assert torch.allclose(picked, logits.gather(1, targets[:, None])[:, 0])
    for shard, first in zip(shards, (0, 300), strict=True):
        to_gradient_(shard, targets, lse, smoothing=0.0, z_loss=0.0, whole=500, first=first)
    assert torch.allclose(torch.cat(shards, 1).double(), wide.grad, atol=1e-5)


@here
def test_a_bias_alone_can_learn():
    from luban.kernels.cross_entropy import linear_cross_entropy

    rows, table = torch.randn(5, 8, device=DEVICE), torch.randn(50, 8, device=DEVICE)
    bias, targets = torch.zeros(50, device=DEVICE, requires_grad=True), torch.randint(0, 50, (5,), device=DEVICE)
    linear_cross_entropy(rows, table, targets, bias_V=bias).backward()
    wanted = (rows @ table.t()).softmax(-1).sum(0) - torch.bincount(targets, minlength=50)
    torch.testing.assert_close(bias.grad, wanted, atol=1e-4, rtol=1e-4)


@here
def test_what_is_no_word_or_does_not_fit():
    from luban.core.errors import UnsupportedError
    from luban.kernels.cross_entropy import linear_cross_entropy

    rows, table = torch.randn(3, 8, device=DEVICE), torch.randn(50, 8, device=DEVICE)
    for word in (50, -1):
        assert linear_cross_entropy(rows, table, torch.tensor([1, -100, word], device=DEVICE)).isnan()
    right = torch.tensor([1, 2, 3], device=DEVICE)
    for changed in (
        {"rows_NE": rows[:, :7]},
        {"targets_N": right[:2]},
        {"bias_V": torch.zeros(49)},
        {"smoothing": 2.0},
    ):
        with pytest.raises(UnsupportedError, match="linear_cross_entropy"):
            linear_cross_entropy(**({"rows_NE": rows, "weight_VE": table, "targets_N": right} | changed))
