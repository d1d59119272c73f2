"""FlashAttention against the definition: forward and gradients, every mask, bias and layout, on fresh random input.

On a CPU this runs under Triton's interpreter.
"""

import math
import random

import pytest
import torch
from drawn import drawn
from interpreter import DEVICE, HERE, here, run_interpreted

triton = pytest.importorskip("triton", reason="triton is Linux-only")


@pytest.mark.skipif(HERE, reason="runs directly")
@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_under_the_interpreter(chosen):
    run_interpreted(__file__, "-m", chosen)


def draw(B, H, K, T, S, D, dtype=torch.float32, spread=True):
    """q, k, v, dO with odd strides: heads and time transposed in memory for some."""

    def make(heads, length):
        if spread:
            return torch.randn(B, length, heads, D, device=DEVICE).transpose(1, 2)
        return torch.randn(B, heads, length, D, device=DEVICE)

    q, k, v, do = make(H, T), make(K, S), make(K, S), torch.randn(B, H, T, D, device=DEVICE)
    return [x.to(dtype).detach().requires_grad_() for x in (q, k, v)] + [do.to(dtype)]


def compare(inputs, mask, bias=None, layout=None, tolerance=None, parameters=(), scale=None):
    """Both ways, outputs and gradients; the reference in float64."""
    from luban.kernels.distance import dense
    from luban.kernels.flash.attention import flash_attention
    from luban.kernels.reference.attention import attention

    q, k, v, do = inputs
    T, S, dtype = q.shape[2], k.shape[2], q.dtype
    made = bias(S) if bias else None
    out = flash_attention(q, k, v, mask=mask, bias=made, layout=layout, scale=scale)
    got = torch.autograd.grad(out, [q, k, v, *parameters], do)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    again = [p.detach().double().requires_grad_() for p in parameters]
    table = None
    if bias:
        table = reference_bias(made, again, bias, T, S)
        assert torch.allclose(dense(made, T, S).double(), table, rtol=1e-4, atol=1e-4)
    seen = layout.dense(T, S) if layout else None
    want_out = attention(*wide, mask, bias_HTS=table, seen_HTS=seen, scale=scale)
    want = torch.autograd.grad(want_out, [*wide, *again], do.double())
    tolerance = tolerance or {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for name, a, b in zip(["out", "dq", "dk", "dv", "d1", "d2"], [out, *got], [want_out, *want], strict=False):
        error = (a.double() - b).norm() / (b.norm() + 1e-2 * do.double().norm())  # a lone key's gradient is exactly 0
        assert error < tolerance and not a.isnan().any(), f"{name}: {error:.2e}"


def reference_bias(made, again, bias, T, S):
    """(H, T, S) in float64 from the formula, differentiable in the parameters."""
    delta = (torch.arange(S - T, S, device=DEVICE)[:, None] - torch.arange(S, device=DEVICE)[None]).double()
    return bias.formula(delta, *again)


class Alibi:
    def __init__(self, H):
        from luban.kernels.distance import alibi_slopes

        self.slopes = alibi_slopes(H).to(DEVICE)

    def __call__(self, S):
        from luban.kernels.distance import alibi

        return alibi(self.slopes, S)

    def formula(self, delta):
        return -self.slopes.double()[:, None, None] * delta.abs()


class Kerple:
    def __init__(self, H, D, kind):
        self.kind, self.scale = kind, 1 / math.sqrt(D)
        self.parameters = [torch.rand(H, device=DEVICE).add(0.2).requires_grad_() for _ in range(2)]

    def __call__(self, S):
        from luban.kernels import distance

        return getattr(distance, f"kerple_{self.kind}")(*self.parameters, S, self.scale)

    def formula(self, delta, r1, r2):
        r1, r2, away = r1[:, None, None], r2[:, None, None], delta.abs()
        if self.kind == "log":
            return -self.scale * r1 * torch.log(1 + r2 * away)
        return -self.scale * r1 * torch.where(away == 0, 0.0, away.clamp(min=1e-300) ** r2)


class T5:
    def __init__(self, H, causal):
        self.causal = causal
        self.parameters = [torch.randn(H, 8, device=DEVICE).requires_grad_()]

    def __call__(self, S):
        from luban.kernels.distance import t5

        return t5(self.parameters[0], S, max_distance=20, causal=self.causal)

    def formula(self, delta, weight):
        from luban.kernels.distance import t5_buckets

        return weight[:, t5_buckets(delta, 8, 20, self.causal).long()]


def ends(B, T, least):
    """(B, T) bool, true up to a random place of each row."""
    return torch.arange(T, device=DEVICE)[None] < torch.randint(least, T + 1, (B, 1), device=DEVICE)


def shape():
    """Sizes of a case: at most four heads in all rows together, since the interpreter takes a second for some."""
    B, H, K = random.choice([(1, 1, 1), (1, 2, 1), (1, 2, 2), (1, 3, 3), (1, 4, 2), (2, 1, 1), (2, 2, 1), (2, 2, 2)])
    return {"B": B, "H": H, "K": K, "T": random.randint(2, 90), "D": random.choice([16, 24, 32])}


@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_causal(dtype):
    from luban.kernels.intervals import intervals

    s = shape()
    compare(draw(**s, S=s["T"], dtype=dtype), intervals(s["T"], s["T"], device=DEVICE))
    more = s["T"] + random.randint(1, 40)
    compare(draw(**s, S=more, dtype=dtype), intervals(s["T"], more, device=DEVICE))


@here
@pytest.mark.parametrize("case", drawn(["full", "window", "documents", "prefix", "padding", "both"], 2))
def test_masks(case):
    from luban.kernels.intervals import intervals

    s = shape() | {"T": random.randint(8, 90)}
    B, T = s["B"], s["T"]
    docs = torch.sort(torch.randint(0, 5, (B, T)), 1).values.to(DEVICE)
    options = {
        "full": {"causal": False},
        "window": {"window": random.randint(1, 30)},
        "documents": {"documents": docs},
        "prefix": {"prefix": ends(B, T, 0)},
        "padding": {"causal": random.random() < 0.5, "token_mask": ends(B, T, 1).flip(random.choice([(), (1,)]))},
        "both": {"documents": docs, "window": random.randint(1, 30)},
    }[case]
    mask = intervals(T, T, device=DEVICE, **options)
    assert (mask.start.diff(dim=1) >= 0).all() and (mask.stop.diff(dim=1) >= 0).all()
    compare(draw(**s, S=T), mask)


@here
@pytest.mark.parametrize("T", drawn(range(1, 8), 1))
@pytest.mark.parametrize("alone", ["window", "documents"])
def test_a_lone_key_gives_its_value_and_no_gradient_to_scores(alone, T):
    """Rows of every short length. What cancels in dQ and dK are terms of size |dO|·|V|·|K|/√D, of which a few roundings stay."""
    from luban.kernels.flash.attention import flash_attention
    from luban.kernels.intervals import intervals

    s = shape() | {"T": T}
    own = torch.arange(T, device=DEVICE).expand(s["B"], T)
    mask = intervals(T, T, device=DEVICE, **({"window": 1} if alone == "window" else {"documents": own}))
    q, k, v, do = draw(**s, S=T)
    group = s["H"] // s["K"]
    out = flash_attention(q, k, v, mask=mask)
    dq, dk, dv = torch.autograd.grad(out, [q, k, v], do)
    wide_k, wide_v = (x.detach().repeat_interleave(group, 1) for x in (k, v))
    torch.testing.assert_close(out, wide_v, rtol=1e-6, atol=0)
    torch.testing.assert_close(dv, do.unflatten(1, (s["K"], group)).sum(2), rtol=1e-6, atol=1e-6)
    score = 4 * 2.0**-23 * do.norm(dim=-1) * wide_v.norm(dim=-1) / math.sqrt(s["D"])
    assert (dq.norm(dim=-1) <= score * wide_k.norm(dim=-1)).all()
    assert (dk.norm(dim=-1) <= (score * q.norm(dim=-1)).unflatten(1, (s["K"], group)).sum(2)).all()


@here
@pytest.mark.parametrize("kind", drawn(["alibi", "power", "log", "t5"], 1))
@pytest.mark.parametrize("masked", drawn([False, True], 1))
def test_distance_biases_and_their_gradients(kind, masked):
    from luban.kernels.intervals import intervals

    s = shape() | {"T": random.randint(100, 140)}  # far distances are computed in another way from 72 on
    causal = random.random() < 0.5 if masked else True
    docs = torch.sort(torch.randint(0, 3, (s["B"], s["T"])), 1).values.to(DEVICE) if masked else None
    mask = intervals(s["T"], s["T"], causal=causal, documents=docs, device=DEVICE)
    bias = {"alibi": lambda: Alibi(s["H"]), "t5": lambda: T5(s["H"], causal)}.get(
        kind, lambda: Kerple(s["H"], s["D"], kind)
    )()
    compare(draw(**s, S=s["T"]), mask, bias, parameters=getattr(bias, "parameters", ()), tolerance=1e-4)


@here
@pytest.mark.parametrize("kind", drawn(["power", "log", "t5"], 1))
def test_learned_biases_get_no_rounding_of_outputs_into_their_gradients(kind):
    """Σ O·dO of outputs rounded to bf16 is off; with values that all have a large part in common, by much."""
    from luban.kernels.flash.attention import flash_attention
    from luban.kernels.intervals import intervals

    errors = {"kernel": [], "plain": []}
    for _ in range(4):
        T, H, D = random.randint(60, 90), 2, 16
        q, k, v, do = draw(1, H, H, T, T, D, dtype=torch.bfloat16)
        v = (v.detach() + 8).requires_grad_()
        bias = T5(H, True) if kind == "t5" else Kerple(H, D, kind)
        mask = intervals(T, T, window=30, device=DEVICE)
        delta = (torch.arange(T)[:, None] - torch.arange(T)).double().to(DEVICE)

        def by_formula(dtype, bias=bias, q=q, k=k, v=v, do=do, delta=delta, mask=mask, T=T, D=D):
            again = [p.detach().double().requires_grad_() for p in bias.parameters]
            s = (q.to(dtype) @ k.to(dtype).mT) * D**-0.5 + bias.formula(delta, *again).to(dtype)
            weights = (
                s.masked_fill(~mask.dense(T), float("-inf")).float().softmax(-1)
                if dtype == torch.bfloat16
                else (s.masked_fill(~mask.dense(T), float("-inf")).softmax(-1))
            )
            return torch.cat(
                [g.flatten() for g in torch.autograd.grad(weights.to(dtype) @ v.to(dtype), again, do.to(dtype))]
            )

        want = by_formula(torch.float64)
        out = flash_attention(q, k, v, mask=mask, bias=bias(T))
        got = torch.cat([g.flatten() for g in torch.autograd.grad(out, bias.parameters, do)]).double()
        errors["kernel"].append(((got - want).norm() / want.norm()).item())
        errors["plain"].append(((by_formula(torch.bfloat16) - want).norm() / want.norm()).item())
    assert sum(errors["kernel"]) <= 2 * sum(errors["plain"]), errors


@here
@pytest.mark.parametrize("kind", drawn(["local", "strided", "global_random"], 1))
def test_block_sparse(kind):
    from luban.kernels import layout
    from luban.kernels.intervals import intervals

    s = shape() | {"T": random.randint(40, 90)}
    made = {
        "local": lambda: layout.local(s["T"], 20, block=16, device=DEVICE),
        "strided": lambda: layout.strided(s["T"], 16, 3, block=16, device=DEVICE),
        "global_random": lambda: layout.global_random(
            s["T"], 16, first=1, random=1, seed=random.randrange(99), heads=s["H"], block=16, device=DEVICE
        ),
    }[kind]()
    compare(draw(**s, S=s["T"]), intervals(s["T"], s["T"], device=DEVICE), layout=made)


@here
def test_hardware_that_fetches_no_tiles_by_itself(monkeypatch):
    """Pointers instead of descriptions: the same numbers, for masks, a bias, a layout and a padded width."""
    from luban.kernels import layout
    from luban.kernels.flash import launch
    from luban.kernels.intervals import intervals

    monkeypatch.setattr(launch, "fetches_tiles", lambda device: False)
    s = shape() | {"T": random.randint(40, 90), "D": random.choice([12, 16, 40])}
    inputs = draw(**s, S=s["T"])
    documents = torch.sort(torch.randint(0, 4, (s["B"], s["T"]), device=DEVICE), 1).values
    plain, packed = (
        intervals(s["T"], s["T"], device=DEVICE),
        intervals(s["T"], s["T"], documents=documents, device=DEVICE),
    )
    bias = Kerple(s["H"], s["D"], "log")
    compare(inputs, plain, bias=bias, parameters=bias.parameters)
    compare(inputs, packed)
    compare(inputs, plain, layout=layout.strided(s["T"], 16, 3, block=16, device=DEVICE))


@here
@pytest.mark.parametrize("dtype", drawn([torch.float32, torch.bfloat16], 1))
def test_tensors_that_hardware_could_not_fetch_tiles_of(dtype):
    """Rows that begin off 16 bytes, an expanded gradient, widths of an odd number of bytes, one head, one row."""
    from luban.kernels.flash.attention import flash_attention
    from luban.kernels.intervals import intervals
    from luban.kernels.reference.attention import attention

    off = torch.frombuffer(bytearray(4 * 8 * 16 * 3 + 4), dtype=torch.float32, offset=4).to(dtype)
    q = off.view(1, 8, 3, 16).transpose(1, 2).to(DEVICE)
    assert not flash_attention(q, q, q).any()
    for B, H, D in ((2, 3, 20), (1, 1, 16), (2, 1, 7), (1, 2, 9)):
        T = random.randint(20, 50)
        held = torch.randn(B, T, H, 3 * D + 1, device=DEVICE, dtype=dtype).transpose(1, 2)[..., 1:]
        q, k, v = (x.detach().requires_grad_() for x in held.split(D, -1))
        mask = intervals(T, T, window=9, device=DEVICE)
        out = flash_attention(q, k, v, mask=mask)
        got = [out, *torch.autograd.grad(out.sum(), [q, k, v])]
        wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
        want = attention(*wide, mask)
        for a, b in zip(got, [want, *torch.autograd.grad(want.sum(), wide)], strict=True):
            assert (a.double() - b).norm() < (1e-5 if dtype == torch.float32 else 2e-2) * (b.norm() + 1)


@here
def test_a_layout_that_does_not_fit_is_refused():
    from luban.core.errors import UnsupportedError
    from luban.kernels import layout
    from luban.kernels.flash.attention import flash_attention

    q, k, v, _ = draw(B=1, H=2, K=2, T=64, S=64, D=16)
    for made in (
        layout.strided(128, 16, 2, block=16, device=DEVICE),
        layout.strided(48, 16, 2, block=16, device=DEVICE),
        layout.global_random(64, 0, first=1, random=1, seed=0, heads=3, block=16, device=DEVICE),
    ):
        with pytest.raises(UnsupportedError, match="doesn't fit 2 heads, 64 queries and 64 keys"):
            flash_attention(q, k, v, layout=made)


@here
def test_kerple_power_with_exponent_one_is_alibi():
    from luban.kernels.distance import alibi, alibi_slopes, dense, kerple_power

    slopes = alibi_slopes(6)
    power = kerple_power(slopes * math.sqrt(32), torch.ones(6), 9, 1 / math.sqrt(32))
    assert torch.allclose(dense(power, 9, 9), dense(alibi(slopes, 9), 9, 9), atol=1e-6)


@here
def test_unfit_shapes_are_refused_with_the_reason():
    from luban.core.errors import UnsupportedError
    from luban.kernels.flash.attention import flash_attention

    q = torch.randn(1, 4, 8, 16)
    for k, words in (
        (torch.randn(1, 3, 8, 16), "don't divide"),
        (torch.randn(1, 2, 4, 16), "more queries"),
        (torch.randn(1, 2, 8, 32), "don't fit"),
        (torch.randn(1, 2, 8, 16).half(), "dtypes"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            flash_attention(q, k, k)


@here
def test_masks_biases_and_layouts_of_other_shapes_are_refused():
    from luban.core.errors import ConfigError, UnsupportedError
    from luban.kernels import layout
    from luban.kernels.distance import alibi, alibi_slopes, t5
    from luban.kernels.flash.attention import flash_attention
    from luban.kernels.intervals import intervals

    q = torch.randn(2, 4, 40, 16, device=DEVICE)
    three = torch.zeros(3, 40, dtype=torch.int32, device=DEVICE)
    for options, words in (
        ({"mask": intervals(10, 10, window=4, device=DEVICE)}, "2 rows of 40 queries"),
        ({"mask": intervals(40, 40, documents=three, device=DEVICE)}, "2 rows of 40 queries"),
        ({"bias": alibi(alibi_slopes(2, DEVICE), 40)}, "a bias of 2 heads"),
        ({"bias": t5(torch.randn(4, 8, device=DEVICE), 10)}, "a bias for 10 keys"),
        ({"layout": layout.local(40, 20, block=48, device=DEVICE)}, "this one of 48"),
        ({"layout": layout.local(40, 20, block=256, device=DEVICE)}, "this one of 256"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            flash_attention(q, q, q, **options)
    with pytest.raises(UnsupportedError, match="don't fit"):
        flash_attention(q, q[0], q[0])
    with pytest.raises(ConfigError, match="at least one token"):
        layout.local(40, 20, block=0)


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 40])
def test_alibi_slopes(heads):
    from luban.kernels.distance import alibi_slopes

    slopes = alibi_slopes(heads)
    assert len(slopes) == heads == len(set(slopes.tolist()))
    if heads == 8:
        assert slopes.tolist() == [2.0**-i for i in range(1, 9)]


@pytest.mark.parametrize("width", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("curved", [False, True])
def test_tiles_that_a_program_keeps_have_the_side_that_work_is_listed_for(width, curved):
    from luban.kernels.flash.launch import SIDE, tiles

    kept = [tiles(width, which, intervals=True, curved=curved) for which in ("forward", "keys", "queries")]
    assert [kept[0].rows, kept[1].cols, kept[2].rows] == [SIDE] * 3


@here
@pytest.mark.parametrize(("B", "T", "S", "window"), [(0, 7, 7, None), (0, 7, 7, 3), (2, 0, 0, None), (2, 0, 5, None)])
def test_nothing_to_attend_from(B, T, S, window):
    from luban.kernels.flash.attention import flash_attention
    from luban.kernels.intervals import intervals

    q, k, v, _ = draw(B, 2, 2, T, S, 16)
    mask = intervals(T, S, window=window, device=DEVICE) if window else None
    out = flash_attention(q, k, v, mask=mask)
    assert out.shape == (B, 2, T, 16)
    assert not any(g.any() for g in torch.autograd.grad(out.sum(), [q, k, v]))
