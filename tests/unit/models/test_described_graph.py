"""The described graph against what a forward really does: shapes, dtypes, data flow, FLOPs, parameters, roles."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from traced_graph import TracedGraph

from luban import build_model, describe
from luban.core.errors import ConfigError
from luban.models.arrangement.deepnorm import DeepNorm
from luban.models.arrangement.parallel import Parallel
from luban.models.arrangement.post import PostNorm
from luban.models.arrangement.reversible import Reversible
from luban.models.arrangement.sandwich import SandwichNorm
from luban.models.elmo import ElmoBody
from luban.models.encoder import EncoderBody
from luban.models.head.hidden import Hidden
from luban.models.head.masked_lm import MaskedLM
from luban.models.head.rows import Classes, Value
from luban.models.head.tokens import Span, TokenClasses
from luban.models.layer import LayerSpec
from luban.models.presets import PRESETS
from luban.models.recurrent import RecurrentBody
from luban.models.spec import ModelSpec, changed, uniform
from luban.nn.character import CharacterCNN
from luban.nn.feedforward.gated import GEGLU, SwiGLU
from luban.nn.feedforward.plain import GELU, ReLU
from luban.nn.mixer.dilated import Dilated
from luban.nn.mixer.grouped import Grouped
from luban.nn.mixer.hyena import Hyena
from luban.nn.mixer.layout import Strided
from luban.nn.mixer.lsh import LSH
from luban.nn.mixer.routing import Routing
from luban.nn.norm import LayerNorm, RMSNorm
from luban.nn.position.alibi import Alibi
from luban.nn.position.base import Position
from luban.nn.position.kerple import KerpleLog, KerplePower
from luban.nn.position.learned import Learned
from luban.nn.position.logn import LogN
from luban.nn.position.none import NoPosition
from luban.nn.position.randomised import Randomised
from luban.nn.position.rope import Rope
from luban.nn.position.sinusoidal import Sinusoidal
from luban.nn.position.t5 import RelativeBias
from luban.nn.position.two_dimensional import Learned2D, Rope2D
from luban.nn.position.xpos import XPos
from luban.nn.recurrent.plain import LSTM, RNN
from luban.nn.recurrent.stack import StackRNN
from luban.nn.recurrent.tape import TapeRNN
from luban.nn.roles import roles_of

SMALL = {"vocab_size": 61, "width": 32, "layers": 2, "context": 40}


def tiny(spec: ModelSpec) -> ModelSpec:
    """The preset with its parts, small."""
    if isinstance(spec.body, ElmoBody):
        words = None if spec.body.words is None else CharacterCNN(filters=(3, 4, 5))
        body = replace(spec.body, cell=LSTM(cells=48), words=words)
        return replace(spec, vocab_size=61, width=32, body=body)
    if not spec.body.stacked:
        return replace(spec, vocab_size=61, width=32)
    mixer = spec.last.mixer
    assert isinstance(mixer, Grouped)
    own = replace(
        mixer,
        heads=4,
        kv_heads={None: None, 1: 1}.get(mixer.kv_heads, 2),
        head_dim=None if mixer.head_dim is None else 12,
        window=None if mixer.window is None else 8,
    )
    if isinstance(spec.body, EncoderBody) and spec.body.embeddings is not None:
        spec = replace(spec, body=replace(spec.body, embeddings=20))
    position = spec.position
    if isinstance(position, Rope) and position.width is not None:
        position = replace(position, width=4)
    return changed(spec, **SMALL, mixer=own, feedforward=replace(spec.last.feedforward, width=50), position=position)


MIXED = replace(
    uniform(**SMALL, mixer=Grouped(heads=4, kv_heads=2, qk_norm=RMSNorm())),
    layers=(
        LayerSpec(mixer=Grouped(heads=4, window=8), feedforward=GELU(width=20)),
        LayerSpec(mixer=Grouped(heads=4), arrangement=Parallel(norms=2), position=KerpleLog(), norm=LayerNorm()),
        LayerSpec(mixer=Grouped(heads=8, kv_heads=1), arrangement=SandwichNorm(), position=RelativeBias()),
        LayerSpec(mixer=Grouped(heads=4, window=8), feedforward=GELU(width=20), share=0),
        LayerSpec(mixer=Grouped(heads=4), arrangement=PostNorm(), position=KerpleLog(), feedforward=GEGLU(width=7)),
    ),
)


def positioned(position: Position) -> ModelSpec:
    """A decoder with these positions."""
    return uniform(**SMALL, mixer=Grouped(heads=4), position=position)


PARTS = {
    "mixed": MIXED,
    "deepnorm": uniform(**SMALL, mixer=Grouped(heads=4), arrangement=DeepNorm(), feedforward=ReLU(width=9, bias=True)),
    "biases": uniform(**SMALL, mixer=Grouped(heads=4, qkv_bias=True, output_bias=True), feedforward=SwiGLU(bias=True)),
    "layout": uniform(**SMALL, mixer=Grouped(heads=4, layout=Strided(block=16, window=16))),
    "hyena": uniform(**SMALL, mixer=Hyena(order=3, filter_width=9, bands=3)),
    "hyena and attention": replace(
        MIXED, layers=(MIXED.layers[0], LayerSpec(mixer=Hyena(short=2)), LayerSpec(mixer=Hyena(short=2), share=1))
    ),
    "dilated": uniform(**SMALL, mixer=Dilated(heads=4, window=3, dilations=(1, 2))),
    "lsh": uniform(**SMALL, mixer=LSH(heads=4, buckets=6, span=4, rounds=2)),
    "lsh, one bucket": uniform(**SMALL, mixer=LSH(heads=4, buckets=1, span=40), position=Learned()),
    "lsh encoder": uniform(**SMALL, mixer=LSH(heads=4, buckets=6, span=4), body=EncoderBody(), head=Hidden()),
    "routing": uniform(**SMALL, mixer=Routing(heads=4, local_heads=2, window=3, clusters=5, size=3)),
    "routing, top": uniform(**SMALL, mixer=Routing(heads=4, local_heads=0, clusters=5, size=3, members="top")),
    "reversible": uniform(**SMALL, mixer=Grouped(heads=4), arrangement=Reversible()),
    "reversible among others": replace(
        MIXED,
        layers=(
            MIXED.layers[0],
            LayerSpec(mixer=Grouped(heads=4), arrangement=Reversible()),
            LayerSpec(mixer=Grouped(heads=4), arrangement=Reversible()),
            MIXED.layers[2],
            LayerSpec(mixer=LSH(heads=4, buckets=2), arrangement=Reversible(), norm=LayerNorm()),
        ),
    ),
    "pooler": changed(tiny(PRESETS["bert-base"]), head=Hidden(pool=True), tied_head=False),
    "pairs": changed(tiny(PRESETS["bert-base"]), head=MaskedLM(pair=True)),
    "classes": changed(tiny(PRESETS["gpt1"]), head=Classes(count=3)),
    "value": changed(tiny(PRESETS["llama-7b"]), head=Value(), tied_head=False),
    "token classes": changed(tiny(PRESETS["bert-base"]), head=TokenClasses(count=5), tied_head=False),
    "span": changed(tiny(PRESETS["roberta-base"]), head=Span(), tied_head=False),
    "characters": uniform(
        vocab_size=31, width=24, body=ElmoBody(words=CharacterCNN(filters=(4, 5, 6)), layers=3, cell=LSTM(cells=30))
    ),
}
PARTS |= {
    f"position {position}": positioned(position)
    for position in (
        NoPosition(),
        Learned(offset=2),
        Learned2D(),
        Rope2D(),
        XPos(),
        Alibi(),
        Sinusoidal(),
        RelativeBias(),
        KerplePower(),
        LogN(inner=KerpleLog()),
        LogN(inner=Learned()),
        Randomised(inner=Learned(), longest=90),
        Randomised(inner=RelativeBias(), longest=90),
    )
}
PARTS |= {
    f"cell {cell}": uniform(vocab_size=31, width=24, body=RecurrentBody(cell=cell, layers=3))
    for cell in (RNN(), LSTM(), LSTM(cells=40), StackRNN(depth=9), TapeRNN(cells=11))
}
SPECS = PARTS | {f"preset {name}": tiny(spec) for name, spec in PRESETS.items()}


def run(spec: ModelSpec, batch: int, seq: int, target: int, dtype: str) -> tuple[TracedGraph, int]:
    """(trace of a forward with everything that its head can give, FLOPs by torch's counter)."""
    on_cpu = isinstance(spec.body, ElmoBody)  # it asks where rows end, which tensors without data can't tell
    device = "cpu" if on_cpu else "meta"
    model = build_model(spec, device=device).to(getattr(torch, dtype)).eval()
    graph = describe(spec, batch=batch, seq=seq, target=target, dtype=dtype)
    inputs = {value.name: torch.ones(value.shape, dtype=torch.long, device=device) for value in graph.inputs}
    flags = torch.backends.mkldnn.flags(enabled=False)  # whose LSTM is one call, of which nothing is counted
    with flags, torch.no_grad(), FlopCounterMode(display=False) as counter, TracedGraph(model, **inputs) as trace:
        hidden = model(**inputs, output="hidden")
        model.read(hidden)
        for extra in ("pooled", "pairs"):
            if getattr(model.head, "pool", None) is not None and hasattr(model.head, extra):
                getattr(model.head, extra)(hidden)
    return trace, counter.get_total_flops()


# Rows of experts are no one call of the dispatcher: tests/unit/nn/test_experts.py counts those.
DENSE = [
    name for name, spec in SPECS.items() if not any(hasattr(layer.feedforward, "experts") for layer in spec.layers)
]


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("name", DENSE)
def test_a_described_graph_is_what_a_forward_does(name):
    spec, dtype = SPECS[name], random.choice(["float32", "bfloat16"])
    batch, seq, target = (random.randint(2, 12) for _ in range(3))
    graph = describe(spec, batch=batch, seq=seq, target=target, dtype=dtype)
    trace, total = run(spec, batch, seq, target, dtype)
    matched = trace.match(graph)
    for op in graph.ops:
        returned = matched[op.name]
        assert (op.shape, getattr(torch, op.dtype)) == (returned.shape, returned.dtype), op
        assert (set(op.inputs), op.flops) == trace.between(op, matched), op
    assert graph.forward_flops == total == sum(call.flops for call in trace.calls)


@pytest.mark.parametrize("name", SPECS)
def test_operations_own_the_parameters_of_the_modules_they_are_named_after(name):
    spec = SPECS[name]
    model, counted = build_model(spec, device="meta"), set()
    roles, modules = roles_of(model), dict(model.named_modules(remove_duplicate=False))
    for op in describe(spec).ops:
        own = dict(modules[op.name].named_parameters()) if op.name in modules else {}
        fresh = {path: p for path, p in own.items() if id(p) not in counted}
        assert op.parameters == sum(p.numel() for p in fresh.values()), op
        counted |= {id(p) for p in fresh.values()}
        declared = {roles[f"{op.name}.{path}"] for path in fresh if f"{op.name}.{path}" in roles}
        assert op.role in declared or declared <= {"bias"}, op
    assert counted == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("position", [Learned(), Sinusoidal(), Learned2D(), LogN(inner=Learned())])
def test_a_layer_cannot_have_positions_that_are_added_to_embeddings(position):
    layers = (MIXED.layers[0], replace(MIXED.layers[0], position=position))
    with pytest.raises(ConfigError, match=r"layer 1 can't have .* positions of its own.*model.position"):
        replace(MIXED, layers=layers)
