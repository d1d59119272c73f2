"""Batch-invariant engines: the same bits alone and in a batch of 64, through chunks, preemption and the prefix cache."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import luban
from luban import Sampling
from luban.core.errors import UnsupportedError
from luban.load.model import LoadedModel
from luban.models.encoder_decoder import EncoderDecoderBody
from luban.models.spec import uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.feedforward.plain import GELU
from luban.nn.init import NormalInit
from luban.nn.invariant import InvariantMatmul, use_invariant_matmuls
from luban.nn.mixer.grouped import Grouped
from luban.nn.norm import LayerNorm, RMSNorm
from luban.nn.position.alibi import Alibi
from luban.nn.position.learned import Learned
from luban.nn.position.t5 import RelativeBias
from luban.serve.memory import slot_bytes
from luban.serve.paged import PagedBatch
from luban.serve.request import Request

SHAPE = {"vocab_size": 211, "width": 48, "context": 96, "layers": 1, "init": NormalInit(std=0.15)}
VARIANTS = {
    "rope": uniform(**SHAPE, mixer=Grouped(heads=6, kv_heads=2, qk_norm=RMSNorm()), feedforward=SwiGLU(width=100)),
    "window, alibi": uniform(**SHAPE, mixer=Grouped(heads=4, window=40), position=Alibi(), feedforward=GELU(width=100)),
    "learned": uniform(
        **SHAPE, mixer=Grouped(heads=4), position=Learned(), norm=LayerNorm(), feedforward=GELU(width=130)
    ),
    "encoder–decoder": uniform(
        **SHAPE,
        body=EncoderDecoderBody(decoder_start=1),
        position=RelativeBias(),
        mixer=Grouped(heads=4, score_scale=1.0),
    ),
}


def loaded(variant: str, dtype: torch.dtype, seed: int) -> LoadedModel:
    spec = VARIANTS[variant]
    module = luban.build_model(spec, seed=seed).to(dtype)
    return LoadedModel(spec=spec, module=module, tokenizer=None, name="tiny", path=Path(), manifest=None)


def requests_of(rng: random.Random, count: int) -> list[Request]:
    """Greedy and seeded ones, many with a common beginning, with log-probabilities, which show the bits."""
    beginning = [rng.randrange(211) for _ in range(24)]
    made = []
    for index in range(count):
        prompt = beginning[: rng.randrange(24)] + [rng.randrange(211) for _ in range(rng.randrange(1, 10))]
        drawn = {"temperature": 1.1, "top_p": 0.95, "top_k": rng.choice([0, 40]), "seed": index}
        settings = rng.choice([{"temperature": 0.0}, drawn])
        made.append(Request(prompt, Sampling(max_tokens=4, ignore_eos=True, logprobs=2, **settings)))
    return made


def engine_for(model: LoadedModel, blocks: int) -> luban.Engine:
    """An engine with so many blocks of 4 tokens."""
    engine, held = luban.Engine(model, batch_invariant=True), blocks * 4 * slot_bytes(model.module)
    engine.batch = PagedBatch(
        model.module, max_batch=64, max_tokens=200, block_size=4, cache_bytes=held, batch_invariant=True
    )
    return engine


def outputs(request: Request) -> list[tuple]:
    """Tokens with all bits of their log-probabilities."""
    return [(each.token, each.logprob, each.sampling_logprob, tuple(each.top)) for each in request.result.logprobs]


def run(engine: luban.Engine, requests: list[Request]) -> list[list[tuple]]:
    for request in requests:
        engine.submit(request)
    while engine.step():
        pass
    return [outputs(request) for request in requests]


@pytest.mark.parametrize("length", [1, 15, 16, 17])
def test_a_prompt_alone_may_end_anywhere_in_a_tile(length):
    """A bias by distance reaches as far as the longest sequence, here to the middle of its last tile."""
    model = loaded("window, alibi", torch.float32, 0)
    prompt, sampling = list(range(length)), Sampling(max_tokens=4, ignore_eos=True, temperature=0.0)
    expected = luban.Engine(model).generate([prompt], sampling)[0].token_ids
    assert engine_for(model, blocks=24).generate([prompt], sampling)[0].token_ids == expected


@pytest.mark.parametrize(
    ("variant", "dtype"), [*((variant, torch.bfloat16) for variant in VARIANTS), ("rope", torch.float32)]
)
def test_outputs_are_bit_equal_alone_and_in_a_batch_of_64(variant, dtype):
    seed = random.randrange(2**32)
    print("seed", seed)
    model = loaded(variant, dtype, seed % 1000)
    together = engine_for(model, blocks=400)
    found = run(together, requests_of(random.Random(seed), 64))
    assert run(together, requests_of(random.Random(seed), 64)[:8]) == found[:8]
    assert together.batch.scheduler.prefix_hits
    asked = requests_of(random.Random(seed), 64)
    for index in random.Random(seed).sample(range(64), 4):
        assert run(engine_for(model, blocks=24), [asked[index]]) == [found[index]]


def test_preempted_requests_get_the_same_bits(seed=5):
    model = loaded("rope", torch.bfloat16, seed)
    prompts = [[index, *range(1, 12)] for index in range(6)]
    sampling = Sampling(max_tokens=16, temperature=0, ignore_eos=True, logprobs=1)
    short = engine_for(model, blocks=20)
    found = run(short, [Request(prompt, sampling) for prompt in prompts])
    assert short.batch.scheduler.preemptions
    assert found == [run(engine_for(model, blocks=24), [Request(prompt, sampling)])[0] for prompt in prompts]


def test_without_it_bits_depend_on_the_batch():
    """Otherwise the test above shows nothing. A processor that multiplies bf16 may do it row by row."""
    differ = []
    for dtype in (torch.bfloat16, torch.float32):
        model = loaded("rope", dtype, 3)
        found = run(luban.Engine(model), requests_of(random.Random(3), 16))
        alone = [run(luban.Engine(model), [request])[0] for request in requests_of(random.Random(3), 16)]
        differ.append(found != alone)
    assert any(differ)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_a_row_of_a_matmul_knows_nothing_of_the_others(dtype):
    for inputs, outputs in ((96, 211), (33, 50), (576, 130)):
        x, weight, bias = torch.randn(37, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
        with torch.inference_mode():
            whole = InvariantMatmul().linear(x, weight, bias)
            for rows in ([0], [36], list(range(5, 30)), torch.randperm(37).tolist()):
                assert torch.equal(InvariantMatmul().linear(x[rows], weight, bias), whole[rows])
            assert InvariantMatmul().linear(x[None, :0], weight, bias).shape == (1, 0, len(weight))
        assert torch.allclose(whole.float(), F.linear(x.float(), weight.float(), bias.float()), rtol=2e-2, atol=1e-1)


def test_weights_in_8_bits_are_refused():
    from luban.nn.int8 import pack_for_inference

    model = loaded("rope", torch.float32, 0)
    pack_for_inference(model.module)
    with pytest.raises(UnsupportedError, match="are packed in fewer bits"):
        use_invariant_matmuls(model.module)
