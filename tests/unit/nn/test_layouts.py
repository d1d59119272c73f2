"""Block-sparse layouts against their definitions, and models that have them: who sees whom is read off gradients."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from drawn import drawn

from luban import build_model, describe
from luban.core.errors import ConfigError, DataError, UnsupportedError
from luban.generate.cache import ContiguousCache
from luban.generate.sampling import Sampling
from luban.generate.session import Sequence, Session
from luban.kernels import layout as blocks
from luban.models.config import resolve_spec
from luban.models.convert.base import format_for
from luban.models.encoder import EncoderBody
from luban.models.spec import uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.mixer.grouped import Grouped
from luban.nn.mixer.layout import Blockwise, GlobalRandom, Local, Strided

LAYOUTS = {
    "local": Local(block=16, window=16),
    "strided": Strided(block=16, window=0, stride=2),
    "global_random": GlobalRandom(block=16, window=10, first=1, random=1, seed=3),
    "blockwise": Blockwise(block=16, span=32),
}


def seen(layout, table, i, j, causal):
    """The definition, token by token; of random blocks what was drawn."""
    m, n = i // layout.block, j // layout.block
    if causal and j > i:
        return False
    if abs(m - n) * layout.block < layout.window + layout.block:  # the window ends inside that block
        return True
    if isinstance(layout, Strided):
        return n % layout.stride == layout.stride - 1
    if isinstance(layout, Blockwise):
        return abs(i // layout.span - j // layout.span) <= 1
    if isinstance(layout, GlobalRandom):
        return n < layout.first or (m < layout.first and not causal) or bool(table[m, n])
    return False


def make(layout, layers=1, **changes):
    base = {
        "vocab_size": 53,
        "width": 24,
        "layers": layers,
        "context": 120,
        "feedforward": SwiGLU(width=20),
        "mixer": Grouped(heads=2, kv_heads=1, layout=layout),
    }
    return build_model(uniform(**{**base, **changes}), dtype="float64", seed=random.randrange(1000))


def stack_of(model):
    return model.decoder if hasattr(model, "decoder") else model.encoder


def new_cache(model, batch=2):
    return ContiguousCache.of(model, batch)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", LAYOUTS)
def test_tables_and_lists_are_the_definition(name, causal):
    layout, T = LAYOUTS[name], random.randint(60, 130)
    made = layout.build(T, 2, causal, torch.device("cpu"))
    dense = made.dense(T, T)
    at = torch.arange(T)
    for head, table in enumerate(made.table):
        for i in random.sample(range(T), 20):
            for j in range(i + 1 if causal else T):
                assert bool(dense[head, i, j]) == seen(layout, table, i, j, causal), (i, j)
    assert torch.equal(made.dense(3, T), dense[:, -3:])
    for lists, counts, table in (
        (made.query_list, made.query_count, made.table),
        (made.key_list, made.key_count, made.table.transpose(1, 2)),
    ):
        for head in range(len(table)):
            for row, count in enumerate(counts[head].tolist()):
                assert lists[head, row, :count].tolist() == table[head, row].nonzero().flatten().tolist()
    pairs = (dense & (at[:, None] >= at)).sum() - T * len(dense) / 2 if causal else dense.sum()
    if T % layout.block == 0:
        assert layout.density(T, 2, causal) == pytest.approx(float(pairs) / len(dense) / T**2)


def test_random_blocks_are_new_ones_of_every_row_and_head_and_stay_when_the_row_grows():
    made = [blocks.global_random(T, 64, first=1, random=2, seed=5, heads=3) for T in (640, 2048)]
    sure = blocks.global_random(2048, 64, first=1, random=0, seed=5).table
    more = made[1].table & ~sure
    assert (more.sum(-1) == torch.arange(32).sub(2).clamp(0, 2)).all()  # block m has m − 2 others to draw from
    assert not torch.equal(more[0], more[1])
    assert torch.equal(made[0].table, made[1].table[:, :10, :10])
    both = [blocks.global_random(T, 64, first=1, random=2, seed=5, heads=3, causal=False).table for T in (640, 2048)]
    assert torch.equal(both[1], made[1].table | made[1].table.transpose(1, 2)), "and those that drew it, in encoders"
    assert torch.equal(both[0], both[1][:, :10, :10])
    assert not torch.equal(blocks.global_random(2048, 64, first=1, random=2, seed=6, heads=3).table, made[1].table)


@pytest.mark.parametrize("body", ["decoder", "encoder"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_model_sees_what_its_layout_and_its_mask_say(name, body):
    layout, T, causal = LAYOUTS[name], 83, body == "decoder"
    model = make(layout, **({} if causal else {"body": EncoderBody()}))
    tables = layout.build(T, 2, causal, torch.device("cpu")).table
    tables = tables.any(0)  # what any head sees
    documents = torch.sort(torch.randint(0, 3, (1, T)), 1).values
    real = torch.arange(T)[None] < 75
    kept = []
    stack_of(model).embedding.register_forward_hook(lambda *call: kept.append(call[2]))
    for arguments in ({}, {"documents": documents}, {"mask": real}):
        kept.clear()
        out = model(torch.randint(0, 53, (1, T)), **arguments)
        for i in random.sample(range(70), 6):
            (gradient,) = torch.autograd.grad(out[0, i].square().sum(), kept[0], retain_graph=True)
            for j in range(T):
                wanted = (
                    seen(layout, tables, i, j, causal)
                    and ("documents" not in arguments or bool(documents[0, i] == documents[0, j]))
                    and ("mask" not in arguments or bool(real[0, j]))
                )
                assert bool(gradient[0, j].abs().max() > 1e-12) == wanted, (arguments.keys(), i, j)


@pytest.mark.parametrize("name", LAYOUTS)
def test_tokens_one_by_one_with_a_cache_are_the_whole_row(name):
    model = make(LAYOUTS[name], layers=2)
    tokens = torch.randint(0, 53, (2, 70))
    cache = new_cache(model)
    with torch.no_grad():
        parts = [model(tokens[:, :40], cache=cache), *(model(tokens[:, i : i + 1], cache=cache) for i in range(40, 70))]
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens), atol=1e-9, rtol=0)


def test_layouts_hold_for_the_layers_that_are_named():
    spec = make(None, layers=2, mixer=Grouped(heads=2)).spec
    banded = replace(spec.layers[1], mixer=Grouped(heads=2, layout=Local(block=16, window=0)))
    both = build_model(replace(spec, layers=(spec.layers[0], banded)), dtype="float64")
    kept, tokens = [], torch.randint(0, 53, (1, 60))
    both.decoder.embedding.register_forward_hook(lambda *call: kept.append(call[2]))
    (gradient,) = torch.autograd.grad(both(tokens)[0, 50].square().sum(), kept[0])
    assert (gradient[0, :51].abs().amax(-1) > 1e-12).all()
    graph = [op.mask_density for op in describe(both.spec, seq=64).ops if op.kind == "attention"]
    assert graph == [0.5, pytest.approx(0.5 * 16 / 64)]


def test_spans_of_half_a_training_row_change_nothing_in_training():
    """And behind it a token sees what lies in its span and the one before."""
    model, tokens = make(Blockwise(block=16, span=32)), torch.randint(0, 53, (2, 96))
    dense = build_model(replace(model.spec, layers=plain_layers(model.spec)), dtype="float64")
    dense.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(tokens[:, :64]), dense(tokens[:, :64]))
    beyond = model(tokens)[:, 64:]
    assert not torch.allclose(beyond, dense(tokens)[:, 64:])
    changed = torch.cat([torch.randint(0, 53, (2, 32)), tokens[:, 32:]], 1)
    torch.testing.assert_close(model(changed)[:, 64:], beyond)


def plain_layers(spec):
    return tuple(replace(layer, mixer=replace(layer.mixer, layout=None)) for layer in spec.layers)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="block must be one of 16, 32, 64, 128, 48 given"):
        Local(block=48)
    with pytest.raises(ConfigError, match="stride must be at least 1, 0 given"):
        Strided(stride=0)
    with pytest.raises(ConfigError, match="span must be a multiple of its block of 64, 100 given: use 128"):
        Blockwise(span=100)
    with pytest.raises(ConfigError, match="a layout has a window of its own"):
        Grouped(heads=2, window=5, layout=Local())
    with pytest.raises(UnsupportedError, match=r"block-sparse attention \(a mixer's layout\)"):
        format_for(make(Local()).spec)
    with pytest.raises(DataError, match="block-sparse layouts don't support prefix"):
        make(Local())(torch.randint(0, 53, (1, 30)), segments=torch.ones(1, 30, dtype=torch.long))


@pytest.mark.parametrize("body", ["decoder", "encoder"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_padding_and_company_change_nothing(name, body):
    """Rows of different lengths, alone and together: padded on either side, and joined while they grow."""
    model = make(LAYOUTS[name], layers=2, **({"body": EncoderBody()} if body == "encoder" else {}))
    rows = [torch.randint(0, 53, (n,)).tolist() for n in (61, 40, 24)]
    with torch.no_grad():
        alone = [model(torch.tensor([row]))[0] for row in rows]
        for left in (True, False):
            tokens = torch.tensor([[0] * (61 - len(r)) + r if left else r + [0] * (61 - len(r)) for r in rows])
            real = torch.tensor([[(t >= 61 - len(r)) if left else (t < len(r)) for t in range(61)] for r in rows])
            out = model(tokens, mask=real)
            for row, want in enumerate(alone):
                torch.testing.assert_close(out[row][real[row]], want, atol=1e-9, rtol=0)
    if body == "encoder":
        return
    session, late = Session(model), [Sequence([*row], Sampling(temperature=0), 0) for row in rows]
    session.add(late[:2])
    for _ in range(5):
        session.choose()
        session.advance(session.sequences)
    session.add(late[2:])
    for _ in range(4):
        session.choose()
        session.advance(session.sequences)
    for sequence in late:
        whole = model(torch.tensor([sequence.prompt + sequence.tokens]))[0]
        assert whole[len(sequence.prompt) - 1 : -1].argmax(-1).tolist() == sequence.tokens


@pytest.mark.parametrize("name", drawn(LAYOUTS, 1))
def test_a_compiled_model_is_the_uncompiled_one(name):
    torch._dynamo.reset()
    model = make(LAYOUTS[name])
    tokens = torch.randint(0, 53, (2, 50))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    for arguments in ({}, {"documents": torch.sort(torch.randint(0, 3, (2, 50)), 1).values}):
        torch.testing.assert_close(compiled(tokens, **arguments), model(tokens, **arguments), atol=1e-9, rtol=0)


def test_a_recipe_says_it_in_a_table():
    text = {"layer": {"mixer": {"heads": 4, "layout": {"type": "strided", "window": 64, "stride": 4}}}}
    assert {layer.mixer.layout for layer in resolve_spec(text, 50).layers} == {Strided(window=64, stride=4)}


@pytest.mark.parametrize("name", drawn(LAYOUTS, 1))
def test_a_model_with_a_layout_is_one_graph(name):
    model, tokens = make(LAYOUTS[name], layers=2), torch.randint(0, 16, (2, 83))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), model(tokens))


@pytest.mark.parametrize("name", drawn([None, *LAYOUTS], 1))
def test_a_model_compiled_for_one_length_takes_another(name):
    """Without dynamic=False the second length is traced for any: what picks a kernel must still be a constant."""
    model = make(LAYOUTS[name] if name else None, layers=1)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for length in (83, 29, 96, 5):
        tokens = torch.randint(0, 16, (2, length))
        torch.testing.assert_close(compiled(tokens), model(tokens))
