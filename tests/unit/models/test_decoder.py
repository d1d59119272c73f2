"""The decoder against a plain computation, and against itself in other forms."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from luban import build_model
from luban.core.errors import DataError
from luban.generate.cache import ContextError, ContiguousCache
from luban.models.arrangement.chatglm import NormedResidual
from luban.models.arrangement.deepnorm import DeepNorm
from luban.models.arrangement.parallel import Parallel
from luban.models.arrangement.post import PostNorm
from luban.models.arrangement.sandwich import SandwichNorm
from luban.models.build import state_of
from luban.models.layer import LayerSpec
from luban.models.spec import uniform
from luban.models.stack import count_positions
from luban.nn.attention.backend import AttentionBackend
from luban.nn.attention.prepared_mask import PreparedMask
from luban.nn.context import LayerContext
from luban.nn.feedforward.gated import GEGLU, SwiGLU
from luban.nn.feedforward.plain import GELU, ReLU, TanhGELU
from luban.nn.init import NormalInit, XavierInit
from luban.nn.mixer.grouped import Grouped
from luban.nn.norm import LayerNorm, RMSNorm
from luban.nn.position.alibi import Alibi
from luban.nn.position.kerple import KerpleLog, KerplePower
from luban.nn.position.learned import Learned
from luban.nn.position.logn import LogN
from luban.nn.position.none import NoPosition
from luban.nn.position.rope import Rope
from luban.nn.position.scaling import YaRN
from luban.nn.position.sinusoidal import Sinusoidal
from luban.nn.position.t5 import RelativeBias
from luban.nn.position.two_dimensional import Rope2D
from luban.nn.position.xpos import XPos

ALTERNATING = (
    LayerSpec(mixer=Grouped(heads=3), feedforward=SwiGLU(width=20)),
    LayerSpec(mixer=Grouped(heads=3, window=4), feedforward=GEGLU(width=12)),
)
PARTS = {
    "kerple-power": {"position": KerplePower()},
    "kerple-log": {"position": KerpleLog(), "mixer": Grouped(heads=6, kv_heads=2)},
    "t5": {"position": RelativeBias(buckets=8, max_distance=20)},
    "xpos": {"position": XPos(span=30.0)},
    "log-n": {"position": LogN(inner=Alibi(), trained=4)},
    "yarn": {"position": Rope(scaling=YaRN(factor=3.0, original=12), base=100.0)},
    "post": {"arrangement": PostNorm(), "embedding_norm": LayerNorm()},
    "parallel": {"arrangement": Parallel(norms=2)},
    "sandwich": {"arrangement": SandwichNorm()},
    "deepnorm": {"arrangement": DeepNorm(), "norm": LayerNorm()},
    "chatglm": {"arrangement": NormedResidual(), "norm": LayerNorm()},
    "alternating": {"layers": ALTERNATING},
    "parallel-shared": {"arrangement": Parallel(norms=1), "position": Rope2D()},
    "llama": {},
    "window": {"mixer": Grouped(heads=4, kv_heads=1, window=3)},
    "qk-norm": {"mixer": Grouped(heads=2, kv_heads=2, qk_norm=RMSNorm(), qkv_bias=True, output_bias=True)},
    "learned": {"position": Learned(), "norm": LayerNorm(), "feedforward": TanhGELU(width=20, bias=True)},
    "sinusoidal": {"position": Sinusoidal(), "norm": LayerNorm(bias=False), "feedforward": ReLU(width=20)},
    "alibi": {"position": Alibi(), "mixer": Grouped(heads=6, kv_heads=3)},
    "none": {"position": NoPosition(), "feedforward": GEGLU(width=12), "tied_head": True},
    "partial-rope": {"position": Rope(width=4, pairing="interleaved", base=50.0), "feedforward": GELU(width=9)},
}


def make(**changes) -> torch.nn.Module:
    base = {
        "vocab_size": 53,
        "width": 24,
        "layers": 2,
        "context": 40,
        "mixer": Grouped(heads=3, kv_heads=1),
        "feedforward": SwiGLU(width=20),
        "init": NormalInit(std=0.3),
    }
    layers = changes.pop("layers", 2)
    spec = uniform(**{**base, **changes, "layers": layers if isinstance(layers, int) else len(layers)})
    spec = spec if isinstance(layers, int) else replace(spec, layers=layers)
    return build_model(spec, dtype="float64", seed=int(torch.randint(0, 1000, ())))


@pytest.fixture(params=PARTS, ids=PARTS)
def model(request):
    return make(**PARTS[request.param])


def by_hand(model, tokens, groups):
    """One row (T,) in plain loops over heads and places: `groups` names each token's document."""
    spec, (heads, keys) = model.spec, (model.spec.layers[0].mixer.heads, model.spec.layers[0].mixer.key_heads())
    size = spec.layers[0].mixer.head_width(spec.width)
    x = model.decoder.embedding.tokens.weight[tokens]
    place, places = {}, []
    for group in groups:
        places.append(place.setdefault(group, 0))
        place[group] += 1

    def rms(v, weight):
        return v / torch.sqrt((v * v).mean(-1, keepdim=True) + spec.last.norm.eps) * weight

    def turn(v, p):
        out = v.clone()
        for i in range(size // 2):
            angle = p * spec.position.base ** (-2 * i / size)
            a, b = v[i], v[i + size // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + size // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    for block in model.decoder.blocks.values():
        h = rms(x, block.mixer_norm.weight)
        q, k, v = (h @ p.weight.T for p in (block.mixer.qkv.q, block.mixer.qkv.k, block.mixer.qkv.v))
        mixed = torch.zeros_like(q)
        for head in range(heads):
            mine, theirs = slice(head * size, (head + 1) * size), head // (heads // keys)
            other = slice(theirs * size, (theirs + 1) * size)
            for t in range(len(tokens)):
                seen = [s for s in range(t + 1) if groups[s] == groups[t]]
                scores = torch.stack([turn(q[t, mine], places[t]) @ turn(k[s, other], places[s]) for s in seen])
                weights = torch.softmax(scores / math.sqrt(size), 0)
                mixed[t, mine] = sum(w * v[s, other] for w, s in zip(weights, seen, strict=True))
        x = x + mixed @ block.mixer.output.weight.T
        h = rms(x, block.feedforward_norm.weight)
        f = block.feedforward
        gate = h @ f.gate.weight.T
        x = x + (gate * torch.sigmoid(gate) * (h @ f.up.weight.T)) @ f.down.weight.T
    return rms(x, model.decoder.norm.weight) @ model.head.weight.T


def test_packed_documents_equal_a_plain_computation():
    model = make()
    tokens, documents = torch.randint(0, 53, (2, 13)), torch.tensor([[0] * 5 + [1] * 7 + [2], [0] * 13])
    got = model(tokens, documents=documents)
    for row in range(2):
        expected = by_hand(model, tokens[row], documents[row].tolist())
        torch.testing.assert_close(got[row], expected, atol=1e-5, rtol=0)  # angles are float32


def test_each_packed_document_equals_itself_alone(model):
    tokens = torch.randint(0, 53, (1, 20))
    bounds = [0, 4, 5, 16, 20]
    documents = torch.tensor([[0] * 4 + [1] + [2] * 11 + [3] * 4])
    packed = model(tokens, documents=documents)
    for a, b in pairwise(bounds):
        torch.testing.assert_close(packed[:, a:b], model(tokens[:, a:b]), atol=1e-9, rtol=0)


def test_windows_hold_for_the_layers_that_have_them():
    """One layer dense, one banded: a token 4 back reaches the second layer only through the first."""
    tokens = torch.randint(0, 53, (1, 12))
    changed = tokens.clone()
    changed[0, 0] = (tokens[0, 0] + 1) % 53
    dense, banded = (LayerSpec(mixer=Grouped(heads=3, window=w), feedforward=SwiGLU(width=20)) for w in (None, 4))
    for layers, reach in (((banded, banded), 7), ((dense, banded), 12), ((banded, dense), 12)):
        model = make(layers=layers)
        moved = (model(tokens) != model(changed)).any(-1)[0]
        assert moved[:reach].all() and not moved[reach:].any()


ARRANGEMENTS = {  # what one layer does to its input, from the papers' formulas
    PostNorm(): lambda b, x, a, n: b.feedforward_norm((y := b.mixer_norm(x + a(x))) + b.feedforward(y)),
    DeepNorm(): lambda b, x, a, n: b.feedforward_norm(
        (2 * n) ** 0.25 * (y := b.mixer_norm((2 * n) ** 0.25 * x + a(x))) + b.feedforward(y)
    ),
    SandwichNorm(): lambda b, x, a, n: (
        (y := x + b.mixer_output_norm(a(b.mixer_norm(x))))
        + b.feedforward_output_norm(b.feedforward(b.feedforward_norm(y)))
    ),
    NormedResidual(): lambda b, x, a, n: (
        (2 * n) ** 0.5 * (y := b.feedforward_norm((2 * n) ** 0.5 * b.mixer_norm(x) + a(b.mixer_norm(x))))
        + b.feedforward(y)
    ),
    Parallel(norms=1): lambda b, x, a, n: x + a(b.mixer_norm(x)) + b.feedforward(b.mixer_norm(x)),
    Parallel(norms=2): lambda b, x, a, n: x + a(b.mixer_norm(x)) + b.feedforward(b.feedforward_norm(x)),
}


@pytest.mark.parametrize("block", ARRANGEMENTS, ids=repr)
def test_arrangements_follow_their_formulas(block):
    model = make(arrangement=block, layers=3, position=NoPosition())
    for p in model.decoder.blocks["1"].parameters():
        torch.nn.init.normal_(p, std=0.5)
    x, part = torch.randn(2, 6, 24, dtype=torch.float64), model.decoder.blocks["1"]
    ctx = LayerContext(AttentionBackend(), PreparedMask(causal=True), None, None, None)

    def attention(y):
        return part.mixer(y, ctx)

    torch.testing.assert_close(part(x, ctx), ARRANGEMENTS[block](part, x, attention, 3))


def test_deepnorm_begins_smaller_by_its_gain():
    block = make(
        arrangement=DeepNorm(),
        layers=2,
        init=XavierInit(scale_residual=False),
        width=192,
        mixer=Grouped(heads=4),
        feedforward=SwiGLU(width=192),
    ).decoder.blocks["0"]
    xavier = (2 / (192 + 192)) ** 0.5
    assert block.mixer.qkv.q.weight.std().item() == pytest.approx(xavier, rel=0.03)
    for layer in (block.mixer.qkv.v, block.mixer.output, block.feedforward.up, block.feedforward.down):
        assert layer.weight.std().item() == pytest.approx(xavier * 16**-0.25, rel=0.03)


def test_a_change_in_one_document_moves_no_other(model):
    tokens = torch.randint(0, 53, (1, 20))
    documents = torch.tensor([[0] * 11 + [1] * 9])
    before = model(tokens, documents=documents)
    tokens[0, 3] = (tokens[0, 3] + 1) % 53
    after = model(tokens, documents=documents)
    assert torch.equal(before[:, 11:], after[:, 11:])
    assert not torch.equal(before[:, 3:11], after[:, 3:11])
    assert torch.equal(before[:, :3], after[:, :3])  # nor the past


def new_cache(model, batch):
    return ContiguousCache.of(model, batch)


def test_incremental_equals_the_full_pass(model):
    tokens = torch.randint(0, 53, (3, 21))
    cache, pieces = new_cache(model, 3), []
    for piece in tokens.split([1, 7, 1, 1, 11], dim=1):
        pieces.append(model(piece, cache=cache))
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), atol=1e-9, rtol=0)


def test_incremental_with_left_padding_equals_each_row_alone(model):
    rows = [torch.randint(0, 53, (n + 6,)) for n in (1, 4, 9)]
    prompts = torch.stack([torch.cat((torch.zeros(9 - (len(r) - 6), dtype=torch.long), r[:-6])) for r in rows])
    mask = torch.arange(9) >= torch.tensor([[9 - (len(r) - 6)] for r in rows])
    cache = new_cache(model, 3)
    logits = [model(prompts, mask, cache=cache)[:, -1:]]
    for step in range(6):
        logits.append(model(torch.stack([r[len(r) - 6 + step, None] for r in rows]), cache=cache))
    for i, row in enumerate(rows):
        alone = model(row[None])[0, -7:]
        torch.testing.assert_close(torch.cat(logits, 1)[i], alone, atol=1e-9, rtol=0)


def test_cache_rows_selected_and_joined_go_on_as_before(model):
    a, b = torch.randint(0, 53, (2, 9)), torch.randint(0, 53, (1, 4))
    first, second = new_cache(model, 2), new_cache(model, 1)
    model(a[:, :8], cache=first)
    model(b[:, :3], cache=second)
    first.join(second)
    got = model(torch.cat((a[:, 8:], b[:, 3:])), cache=first)
    first.select([2, 0])
    again = model(torch.tensor([[5], [6]]), cache=first)
    torch.testing.assert_close(got[:2], model(a)[:, -1:], atol=1e-9, rtol=0)
    torch.testing.assert_close(got[2:], model(b)[:, -1:], atol=1e-9, rtol=0)
    torch.testing.assert_close(again[0], model(torch.cat((b, torch.tensor([[5]])), 1))[0, -1:], atol=1e-9, rtol=0)
    torch.testing.assert_close(again[1], model(torch.cat((a[:1], torch.tensor([[6]])), 1))[0, -1:], atol=1e-9, rtol=0)
    first.select([0])  # the longer row left: its padding goes too
    assert first.length == 5 and not first.padded


def test_cache_refuses_more_than_the_context():
    model = make(context=8)
    cache = new_cache(model, 1)
    model(torch.zeros(1, 8, dtype=torch.long), cache=cache)
    with pytest.raises(ContextError, match="9 tokens are more than the model's context of 8"):
        model(torch.zeros(1, 1, dtype=torch.long), cache=cache)


@pytest.mark.parametrize("parts", [name for name in PARTS if name not in ("window", "alternating")])
def test_a_prefix_continued_with_a_cache_equals_the_full_pass(parts):
    model = make(**PARTS[parts])
    tokens, segments = torch.randint(0, 53, (2, 9)), torch.tensor([[0] * 3 + [1] * 6, [0] * 5 + [1] * 4])
    cache = new_cache(model, 2)
    parts = [model(tokens[:, :6], segments=segments[:, :6], cache=cache)]
    parts += [model(tokens[:, step : step + 1], cache=cache) for step in range(6, 9)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens, segments=segments), atol=1e-9, rtol=0)


def test_what_a_cache_cannot_follow_is_refused():
    model, windowed = make(), make(**PARTS["alternating"])
    tokens, rows = torch.randint(0, 53, (1, 5)), torch.tensor([[0, 0, 1, 1, 1]])
    with pytest.raises(DataError, match="a cache holds one document a row"):
        model(tokens, documents=rows, cache=new_cache(model, 1))
    with pytest.raises(DataError, match="windows can't continue a prefix with a cache"):
        windowed(tokens, segments=rows, cache=new_cache(windowed, 1))
    cache = new_cache(model, 1)
    model(tokens, segments=rows, cache=cache)
    with pytest.raises(DataError, match="pass segments only on a cache's first forward"):
        model(tokens, segments=rows, cache=cache)


def test_positions_restart_and_skip_padding():
    documents = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, -1]])
    assert count_positions(documents, None, documents).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 0]]
    mask = torch.tensor([[False, False, True, True], [True, True, True, False]])
    assert count_positions(mask.long(), mask, None).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    model = make().float()
    compiled = torch.compile(model, fullgraph=True)
    tokens, documents = torch.randint(0, 53, (2, 16)), torch.tensor([[0] * 9 + [1] * 7, [0] * 16])
    torch.testing.assert_close(
        compiled(tokens, documents=documents), model(tokens, documents=documents), atol=1e-4, rtol=1e-4
    )


def test_parameters_are_the_only_state(model):
    assert not list(model.buffers())
    names = {name for name, _ in model.named_parameters()}
    assert set(state_of(model)) == names
    shared = {"head.weight"} if model.spec.tied_head else set()
    assert set(model.state_dict()) == names | shared
