"""Memory prediction: against what autograd keeps, against arithmetic by hand, and against a GPU's own figures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from luban.models.build import build_model
from luban.models.describe import describe
from luban.models.presets import PRESETS
from luban.models.spec import ModelSpec, changed, uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.feedforward.plain import GELU, ReLU
from luban.nn.mixer.dilated import Dilated
from luban.nn.mixer.grouped import Grouped
from luban.nn.mixer.hyena import Hyena
from luban.nn.mixer.lsh import LSH
from luban.nn.mixer.routing import Routing
from luban.nn.norm import LayerNorm, RMSNorm
from luban.nn.position.learned import Learned
from luban.nn.position.none import NoPosition
from luban.planner.memory import StepSettings, joint_parameters, layer_saved_bytes, predict_memory, saved_bytes

BATCH, SEQ = 3, 40
SHAPES = {
    "gpt": uniform(
        vocab_size=60,
        width=48,
        layers=3,
        context=64,
        position=Learned(),
        norm=LayerNorm(),
        mixer=Grouped(heads=4),
        feedforward=ReLU(width=144),
    ),
    "gelu": uniform(
        vocab_size=60,
        width=48,
        layers=2,
        context=64,
        position=Learned(),
        norm=LayerNorm(),
        mixer=Grouped(heads=4, kv_heads=2),
        feedforward=GELU(width=100),
    ),
    "llama": uniform(
        vocab_size=60, width=64, layers=2, context=64, mixer=Grouped(heads=4, kv_heads=2), feedforward=SwiGLU(width=96)
    ),
    "qk-norm": uniform(
        vocab_size=60,
        width=64,
        layers=2,
        context=64,
        mixer=Grouped(heads=4, kv_heads=2, qk_norm=RMSNorm()),
        feedforward=SwiGLU(width=96),
    ),
}


def saved_by_autograd(spec: ModelSpec) -> int:
    """Bytes of distinct activations that an eager fp32 forward on the CPU saves for its backward pass."""
    module = build_model(spec, seed=0)
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point() and tensor.shape[0] != 1:  # 1: sines
            found[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    tokens = torch.randint(spec.vocab_size, (BATCH, SEQ))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = module(tokens, output="hidden")
    del hidden
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("name", SHAPES)
def test_kept_activations_are_those_that_autograd_saves(name):
    spec = SHAPES[name]
    graph = describe(spec, batch=BATCH, seq=SEQ)
    predicted = saved_bytes(graph, StepSettings())
    tokens, layers = BATCH * SEQ, len(spec.layers)
    norms, heads = 2 * layers + 1, 6 * layers if name == "qk-norm" else 0  # of the stream; of query and key heads
    # What an eager model keeps otherwise than the operations say, tensor by tensor:
    last = tokens * spec.width  # the states that the head reads are kept by the loss, which isn't run here
    if name in ("llama", "qk-norm"):
        per_norm = norms * (1 + spec.width) + heads * (1 + 16)  # 1/deviation, and the result before its gain
        other = tokens * (per_norm + 96 * layers)  # silu(gate) beside gate, up and their product
    else:
        other = tokens * 2 * norms  # mean and deviation
    assert saved_by_autograd(spec) == predicted + 4 * (other - last)


@pytest.mark.parametrize(
    "mixer",
    [
        Hyena(order=3, bands=5),
        Dilated(heads=4, window=8, dilations=(1, 2)),
        LSH(heads=4, buckets=8, span=8, rounds=3),
        Routing(heads=4, local_heads=2, clusters=5, size=9),
        Routing(heads=4, local_heads=0, clusters=5, size=9),
        Routing(heads=4, local_heads=1, clusters=5, size=9, members="top"),
    ],
)
def test_kept_activations_of_other_mixers_are_those_that_autograd_saves(mixer):
    one = changed(SHAPES["gpt"], layers=1, position=NoPosition(), mixer=mixer)
    two = changed(one, layers=2)
    predicted = [saved_bytes(describe(spec, batch=BATCH, seq=SEQ), StepSettings()) for spec in (one, two)]
    of_a_layer = saved_by_autograd(two) - saved_by_autograd(one)
    assert of_a_layer == predicted[1] - predicted[0] + 4 * BATCH * SEQ * 2 * 2  # mean and deviation of two norms


def test_a_layer_by_hand():
    spec = SHAPES["llama"]
    tokens, E, Q, K, inner = BATCH * SEQ, 64, 64, 32, 96
    layer = describe(spec, batch=BATCH, seq=SEQ, dtype="bfloat16").layers()["decoder.blocks.1"]
    settings = StepSettings()
    sums = 4 * tokens * 4  # attention's log-sum-exp
    everything = 2 * tokens * (E + E + Q + 2 * K + Q + E + E + 3 * inner)
    assert layer_saved_bytes(layer, settings) == everything + sums
    joint = E * (Q + 2 * K) + E * 2 * inner
    assert joint_parameters(layer) == joint
    assert layer_saved_bytes(layer, replace(settings, gpu_kernels=True)) == everything + sums + 2 * joint
    assert layer_saved_bytes(layer, replace(settings, saves_activation=False)) == everything + sums - 2 * tokens * inner
    selective = replace(settings, gpu_kernels=True, remat="selective")
    assert layer_saved_bytes(layer, selective) == 2 * tokens * (E + Q + 2 * K + Q + E + 2 * inner) + sums
    assert layer_saved_bytes(layer, replace(selective, remat="full")) == 2 * tokens * E
    widened = replace(settings, attention="fp32")
    assert layer_saved_bytes(layer, widened) == everything + sums + 2 * tokens * (Q + 2 * K) + 4 * tokens * Q


# torch.cuda.max_memory_allocated in GB, a step of the 1.1B shape of benchmarks/gpu_step.py, batch 16 × 2,048, H100.
MEASURED = [
    (16, {"remat": "selective"}, 4, 42.6),  # bf16 weights, fp32 moments
    (32, {}, 2, 52.6),  # all bf16
    (32, {"saves_activation": False}, 2, 44.5),  # SwiGLU inside its matmuls
    (16, {"saves_activation": False}, 2, 45.3),
    (16, {}, 2, 53.5),
    (16, {"remat": "selective"}, 2, 38.1),
    (16, {"remat": "full"}, 2, 13.0),
    (16, {"remat": "full", "saves_activation": False}, 2, 12.7),
    (16, {"remat": "selective", "master_weights": True}, 4, 47.1),
]


@pytest.mark.parametrize(("heads", "changed", "moments", "gigabytes"), MEASURED)
def test_within_five_percent_of_what_a_gpu_allocated(heads, changed, moments, gigabytes):
    spec = uniform(
        vocab_size=32_000,
        width=2048,
        layers=22,
        context=2048,
        mixer=Grouped(heads=heads, kv_heads=4),
        feedforward=SwiGLU(width=5632),
    )
    graph = describe(spec, batch=16, seq=2048, dtype="bfloat16")
    settings = StepSettings(
        **{"master_weights": False, "gpu_kernels": True} | changed,
        optimizer_bytes=2 * moments * graph.parameters,
    )
    assert predict_memory(graph, settings).total / 1e9 == pytest.approx(gigabytes, rel=0.05)


def test_attention_by_chunks_of_queries_by_hand():
    spec = changed(SHAPES["llama"], context=256)
    heads, keys, width, seq = 4, 2, 16, 200  # chunks of 64 queries, which see 64, 128, 192 and 200 keys
    layer = describe(spec, batch=BATCH, seq=seq, dtype="bfloat16").layers()["decoder.blocks.0"]
    plain = StepSettings()
    chunked = replace(plain, attention="chunked")
    scores = BATCH * heads * (64 * (64 + 128 + 192) + 8 * 200)
    copies = 2 * BATCH * keys * width * (64 + 128 + 192 + 200 - 200)  # of keys and values, beside their own
    sums = 4 * BATCH * seq * heads
    more = layer_saved_bytes(layer, chunked) - layer_saved_bytes(layer, plain)
    assert more == pytest.approx((4 + 2) * scores + 2 * copies - sums, rel=0.1)  # mean chunks for the last one
    long = describe(
        spec, batch=2**24 // (heads * seq**2) + 1, seq=seq, dtype="bfloat16"
    )  # too many scores: in fp32 after all
    assert layer_saved_bytes(long.layers()["decoder.blocks.0"], chunked) == layer_saved_bytes(
        long.layers()["decoder.blocks.0"], replace(chunked, attention="fp32")
    )
    masked = saved_bytes(long, replace(chunked, dense_masks=4)) - saved_bytes(long, chunked)
    assert masked == 4 * 4 * long.batch * seq**2 and saved_bytes(layer, replace(chunked, dense_masks=4)) == saved_bytes(
        layer, chunked
    )


# Bytes of a compiled step on two CPU cores (torch 2.13), all that torch allocates: width, layers, heads, key heads, inner
# width; batch and length; what differs; MB.
ON_A_CPU = [
    ((256, 6, 4, 2, 768), (16, 256), {}, 372),
    ((256, 6, 4, 2, 768), (16, 256), {"dtype": "float32"}, 527),
    ((256, 6, 4, 2, 768), (4, 256), {"accumulates": True}, 123),
    ((256, 6, 4, 2, 768), (64, 64), {}, 300),
    ((256, 6, 4, 2, 768), (16, 256), {"remat": "selective"}, 214),
    ((512, 8, 8, 8, 1536), (16, 256), {}, 1030),
    ((512, 8, 8, 8, 1536), (8, 256), {"dtype": "float32"}, 692),
]


@pytest.mark.parametrize(("shape", "batch", "changed", "megabytes"), ON_A_CPU)
def test_within_five_percent_of_what_a_compiled_step_on_a_cpu_allocated(shape, batch, changed, megabytes):
    width, layers, heads, keys, inner = shape
    spec = uniform(
        vocab_size=4096,
        width=width,
        layers=layers,
        feedforward=SwiGLU(width=inner),
        mixer=Grouped(heads=heads, kv_heads=keys, qk_norm=RMSNorm()),
    )
    graph = describe(spec, batch=batch[0], seq=batch[1], dtype=changed.get("dtype", "bfloat16"))
    changed = {name: value for name, value in changed.items() if name != "dtype"}
    found = predict_memory(graph, StepSettings(**{"attention": "chunked", "dense_masks": 1, **changed}))
    assert (found.total - found.parameters) / 1e6 == pytest.approx(megabytes, rel=0.05)


def test_weights_moments_and_gradients_by_precision():
    fp64, fp32, bf16 = (  # so few tokens that the end of the backward pass is the peak
        describe(PRESETS["luban-6m"], batch=1, seq=1, dtype=dtype) for dtype in ("float64", "float32", "bfloat16")
    )
    n = bf16.parameters
    for graph, settings, parameters, gradients in (
        (fp64, StepSettings(), 8 * n, 8 * n),
        (fp64, StepSettings(accumulates=True), 8 * n, 16 * n),
        (fp32, StepSettings(), 4 * n, 4 * n),
        (bf16, StepSettings(), 6 * n, 2 * n),
        (bf16, StepSettings(master_weights=False), 2 * n, 2 * n),
        (bf16, StepSettings(accumulates=True), 6 * n, 6 * n),
    ):
        found = predict_memory(graph, replace(settings, optimizer_bytes=8 * n))
        assert (found.parameters, found.gradients, found.optimizer) == (parameters, gradients, 8 * n)
    busy = predict_memory(bf16, StepSettings(optimizer_bytes=8 * n, update_bytes=16 * n))
    assert busy.transient == 16 * n and f"{busy.total / 1e6:.0f} MB" in str(busy)


def test_no_category_is_negative_in_a_narrow_feed_forward_network():
    """Its activations' gradients are smaller than the inputs of head and final norm, which are freed before them."""
    network = {"mixer": Grouped(heads=4), "feedforward": SwiGLU(width=64)}
    spec = uniform(vocab_size=4096, width=512, layers=1, tied_head=True, **network)
    graph = describe(spec, batch=1, seq=400)
    found = predict_memory(graph, StepSettings())
    head = 4 * 4096 * 512
    assert (found.gradients, found.transient) == (head, 0)  # the peak is in the last layer's backward pass
    assert found.activations == saved_bytes(graph, StepSettings())


def test_more_rows_cost_their_activations_and_recomputation_saves_them():
    graphs = [describe(PRESETS["llama-7b"], batch=batch, seq=2048, dtype="bfloat16") for batch in (16, 32, 48)]
    last = []
    for policy in ("none", "selective", "full"):
        totals = [predict_memory(g, StepSettings(gpu_kernels=True, remat=policy)).total for g in graphs]
        assert totals[2] - totals[1] == totals[1] - totals[0] > 0
        last.append(totals[2])
    assert last[0] > last[1] > last[2]


def test_offloaded_state_is_not_on_the_device():
    """Half-precision weights, one layer's gradients and the activations are."""
    graph = describe(
        uniform(vocab_size=512, width=256, layers=8, feedforward=SwiGLU(width=768)), batch=2, seq=64, dtype="bfloat16"
    )
    plain = StepSettings(gpu_kernels=True, accumulates=True, optimizer_bytes=8 * graph.parameters)
    kept, away = (predict_memory(graph, replace(plain, offloads=o)) for o in (False, True))
    assert away.parameters == 2 * graph.parameters and away.optimizer == 0
    assert kept.total - away.total > 12 * graph.parameters  # masters and moments
    assert away.gradients <= 2 * max(layer.parameters for layer in graph.layers().values()) + 2 * 512 * 256
    layers = sum(layer.parameters for layer in graph.layers().values())
    tiled = predict_memory(graph, replace(plain, offloads=True, host_parameters=layers))
    assert tiled.parameters == 2 * (graph.parameters - layers) == 2 * (2 * 512 * 256 + 256)  # tables and the last norm
