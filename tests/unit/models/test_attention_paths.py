"""Models on the fused kernel against the same models with masks written out, forward and gradients.

The kernel runs under Triton's interpreter, in a process of its own, since the switch is read at import.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from drawn import drawn
from interpreter import HERE, INTERPRETED, run_interpreted

from luban.core.errors import UnsupportedError
from luban.models.build import build_model
from luban.models.encoder import EncoderBody
from luban.models.spec import uniform
from luban.nn import linear, norm, row
from luban.nn.attention.backend import AttentionBackend
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.mixer.grouped import Grouped
from luban.nn.mixer.layout import GlobalRandom, Strided
from luban.nn.position.base import Position
from luban.nn.position.logn import LogN
from luban.nn.position.randomised import Randomised

pytest.importorskip("triton", reason="triton is Linux-only")
here = pytest.mark.skipif(not INTERPRETED, reason="run under TRITON_INTERPRET=1 by test_under_the_interpreter")
METHODS = [
    "none",
    "learned",
    "sinusoidal",
    "rope",
    "xpos",
    "rope_2d",
    "log_n",
    "alibi",
    "kerple_power",
    "kerple_log",
    "t5",
]
LUBAN = AttentionBackend("luban")
CASES = ["causal", "window", "documents", "prefix", "left padding", "right padding", "documents with prefixes"]


@pytest.mark.skipif(HERE, reason="runs directly; on a GPU tests/gpu stands for it")
@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_under_the_interpreter(chosen):
    run_interpreted(__file__, "-m", chosen)


@pytest.fixture(autouse=True)
def attention_alone(monkeypatch):
    """The other kernels have tests of their own, and the interpreter is slow."""
    monkeypatch.setattr(linear, "trains_fused", lambda x: False)
    for module in (linear, norm, row):
        monkeypatch.setattr(module, "infers_fused", lambda x: False)


def make(method="rope", window=None, layout=None, **fields):
    position = method if isinstance(method, Position) else Position.registry.get(method)()
    if isinstance(position, LogN):
        position = LogN(trained=4)
    spec = uniform(
        vocab_size=31,
        width=32,
        layers=1,
        context=40,
        position=position,
        mixer=Grouped(heads=2, kv_heads=1, window=window, layout=layout),
        feedforward=SwiGLU(width=16),
        **fields,
    )
    model = build_model(spec, seed=random.randrange(1000))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def case_of(name, B, T):
    """Arguments of the forward, and which outputs mean something."""
    at, real = torch.arange(T).expand(B, -1), torch.ones(B, T, dtype=torch.bool)
    documents = torch.sort(torch.randint(0, 4, (B, T)), 1).values
    inside = at - (documents[:, None, :] < documents[:, :, None]).sum(-1)  # place in the own document
    if name == "documents":
        return {"documents": documents}, real
    if name == "prefix":
        return {"segments": (at >= torch.randint(1, T, (B, 1))).long()}, real
    if name == "documents with prefixes":
        return {"documents": documents, "segments": (inside >= 3).long(), "positions": inside.int()}, real
    if name.endswith("padding"):
        count = torch.randint(2, T, (B, 1))
        real = at >= T - count if name.startswith("left") else at < count
        return {"mask": real}, real
    return {}, real


def compare(model, tokens, kwargs, real):
    results = []
    for path in ("torch", "luban"):
        out = model(tokens, attention=AttentionBackend(path), **kwargs)
        loss = (out.log_softmax(-1)[..., 7] * torch.linspace(-1, 1, out[..., 7].numel()).view_as(out[..., 7]))[
            real
        ].sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        results.append((out[real], [torch.zeros(()) if g is None else g for g in gradients]))
    (a, da), (b, db) = results
    torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
    for (name, _), x, y in zip(model.named_parameters(), da, db, strict=True):
        assert (x - y).norm() <= 1e-3 * x.norm() + 1e-5, name


@here
@pytest.mark.parametrize(("method", "case"), drawn([(m, c) for m in METHODS for c in CASES], 6))
def test_decoders_agree(method, case):
    model = make(method, window=random.randint(2, 20) if case == "window" else None)
    B, T = 2, random.randint(20, 40)
    kwargs, real = case_of(case, B, T)
    compare(model, torch.randint(0, 31, (B, T)), kwargs, real)


@here
@pytest.mark.parametrize("method", drawn(["learned", "alibi", "t5"], 1))
@pytest.mark.parametrize("case", drawn(["all", "documents", "right padding"], 1))
def test_encoders_agree(method, case):
    model = make(method, body=EncoderBody())
    kwargs, real = case_of(case, 2, 33)
    compare(model, torch.randint(0, 31, (2, 33)), kwargs, real)


@here
@pytest.mark.parametrize("case", drawn(["causal", "documents", "right padding"], 1))
@pytest.mark.parametrize(
    "layout", drawn([Strided(block=16, window=0, stride=2), GlobalRandom(block=16, window=0, random=1)], 1)
)
def test_block_sparse_models_agree(layout, case):
    B, T = 2, random.randint(34, 40)
    kwargs, real = case_of(case, B, T)
    compare(make("kerple_log", layout=layout), torch.randint(0, 31, (B, T)), kwargs, real)
    if case != "right padding":
        encoder = make("alibi", layout=layout, body=EncoderBody())
        compare(encoder, torch.randint(0, 31, (B, T)), {k: v for k, v in kwargs.items() if k == "documents"}, real)


@here
def test_layouts_made_in_generation_serve_training_and_left_padding_is_nan():
    model, tokens = make("rope", layout=Strided(block=16, window=0, stride=2)), torch.randint(0, 31, (2, 40))
    with torch.inference_mode():
        model(tokens, attention=LUBAN)
    model(tokens, attention=LUBAN).sum().backward()
    real = torch.ones(2, 40, dtype=torch.bool)
    real[1, 0] = False
    out = model(tokens, mask=real, attention=LUBAN)
    assert out[1].isnan().all() and not out[0].isnan().any()


@here
@pytest.mark.parametrize("case", drawn(["causal", "documents", "block-sparse"], 1))
def test_one_graph_holds_the_kernel(case):
    model = make("kerple_log", layout=GlobalRandom(block=16, window=0, random=1) if case == "block-sparse" else None)
    tokens, kwargs = torch.randint(0, 31, (2, 24)), case_of(case, 2, 24)[0]
    want = model(tokens, attention=LUBAN, **kwargs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = compiled(tokens, attention=LUBAN, **kwargs)
    parameters = [model.decoder.position.raw1, model.decoder.blocks["0"].mixer.qkv.q.weight]
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), parameters) for x in (want, got)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(want, got, rtol=1e-5, atol=1e-5)


@here
def test_what_intervals_cannot_say_is_nan_not_wrong():
    tokens = torch.randint(0, 31, (2, 12))
    holes = torch.ones(2, 12, dtype=torch.bool)
    holes[1, 5] = False
    out = make("rope")(tokens, mask=holes, attention=LUBAN)
    assert not out[0].isnan().any() and out[1].isnan().all()
    apart = torch.zeros(2, 12, dtype=torch.long)
    apart[0, 3:6] = 1
    out = make("rope")(tokens, segments=apart, attention=LUBAN)
    assert out[0].isnan().all() and not out[1].isnan().any()
    assert make("alibi")(tokens, positions=2 * torch.arange(12)[None], attention=LUBAN).isnan().all()


@here
def test_what_the_kernel_cannot_serve_is_refused_by_name():
    tokens = torch.randint(0, 31, (2, 12))
    with pytest.raises(UnsupportedError, match="of the distance between slots"):
        make(Randomised(inner=Position.registry.get("alibi")(), longest=50))(tokens, attention=LUBAN)
    with pytest.raises(UnsupportedError, match="one interval of keys"):
        make("rope", window=3)(tokens, segments=torch.arange(12).expand(2, -1).ge(4).long(), attention=LUBAN)


class Watched(AttentionBackend):
    """Notes the kernel of every attention."""

    def __init__(self, kernel):
        super().__init__(kernel)
        self.used = set()

    def attend(self, q, k, v, mask, cache, scale):
        self.used.add(mask.kernel)
        return super().attend(q, k, v, mask, cache, scale)


@here
def test_two_forwards_each_with_its_own_kernel():
    """Interleaved in one thread and at once in two: the kernel is the backend's, not the process's. (One thread for each
    kernel: Triton's interpreter can't run in two.)"""
    model, tokens = make("rope"), torch.randint(0, 31, (2, 12))
    backends = {kernel: Watched(kernel) for kernel in ("torch", "luban")}
    interleaved = [model(tokens, attention=backend) for backend in [*backends.values()] * 2]

    def four(backend):
        with torch.no_grad():
            return [model(tokens, attention=backend) for _ in range(4)]

    with ThreadPoolExecutor(2) as pool:
        at_once = [out for outs in pool.map(four, backends.values()) for out in outs]
    for other in (*interleaved[1:], *at_once):
        torch.testing.assert_close(interleaved[0], other, rtol=1e-4, atol=1e-4)
    assert {kernel: backend.used for kernel, backend in backends.items()} == {"torch": {"torch"}, "luban": {"luban"}}


class Interrupted(Watched):
    """Runs a whole forward of another backend inside of each attention of its own."""

    def __init__(self, kernel, other):
        super().__init__(kernel)
        self.other = other

    def attend(self, *args):
        self.other()
        return super().attend(*args)


@here
@pytest.mark.parametrize("kernel", ["torch", "luban"])
def test_a_forward_inside_of_another_keeps_its_own_kernel(kernel):
    """Values and gradients, the other forward running between the layers of the first."""
    model, tokens = make("alibi"), torch.randint(0, 31, (2, 12))
    inner = Watched({"torch": "luban", "luban": "torch"}[kernel])
    outer = Interrupted(kernel, lambda: model(tokens, attention=inner))
    found = []
    for backend in (AttentionBackend("torch"), outer):
        out = model(tokens, attention=backend)
        found.append([out, *torch.autograd.grad(out.square().mean(), list(model.parameters()))])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
    assert outer.used == {kernel} and inner.used == {inner.kernel}
