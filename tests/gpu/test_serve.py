"""The engine on a GPU: recorded forwards, the Triton kernel and what was measured for the pool, against the contiguous cache."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from adapted_models import write_adapted

import luban
from luban import Sampling
from luban.adapters.dora import DoRA
from luban.adapters.lora import LoRA
from luban.load.model import LoadedModel
from luban.models.spec import uniform
from luban.nn.init import NormalInit
from luban.nn.int8 import pack_for_inference
from luban.nn.mixer.grouped import Grouped
from luban.nn.mixer.layout import Strided
from luban.nn.position.alibi import Alibi
from luban.nn.position.kerple import KerpleLog
from luban.nn.position.rope import Rope
from luban.nn.position.t5 import RelativeBias
from luban.serve.decode_graph import DecodeGraphs
from luban.serve.paged import PagedBatch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
VARIANTS = {
    "rope": {},
    "window": {"mixer": Grouped(heads=4, kv_heads=2, window=20)},
    "layout": {"mixer": Grouped(heads=4, kv_heads=2, layout=Strided(block=16, window=16, stride=2))},
    "alibi": {"position": Alibi()},
    "kerple": {"position": KerpleLog()},
    "t5": {"position": RelativeBias()},
}


def loaded(**fields) -> LoadedModel:
    plain = {"mixer": Grouped(heads=4, kv_heads=2), "position": Rope(), "init": NormalInit(std=0.2)}
    spec = uniform(**{"vocab_size": 97, "width": 128, "context": 300, "layers": 2, **plain, **fields})
    module = luban.build_model(spec, device="cuda")
    return LoadedModel(spec=spec, module=module, tokenizer=None, name="tiny", path=Path(), manifest=None)


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_are_those_of_the_contiguous_cache(variant):
    rng, model = random.Random(3), loaded(**VARIANTS[variant])
    engine = luban.Engine(model, cache_bytes=2**24)
    assert isinstance(engine.batch, PagedBatch) and (engine.batch.runner.graphs is None) == (variant == "layout")
    prompts = [[rng.randrange(97) for _ in range(rng.choice([1, 30, 200]))] for _ in range(37)]
    sampling = Sampling(max_tokens=40, temperature=0, ignore_eos=True)
    found = engine.generate(prompts, sampling)
    again = luban.Engine(model, cache_bytes=40 * 16 * 1024).generate(prompts, sampling)  # little memory: preemptions
    expected = [luban.Engine(model, paged=False).generate([prompt], sampling)[0] for prompt in prompts]
    for recorded in (engine.batch.runner.graphs, engine.batch.runner.prompts):
        assert recorded is None or not recorded._broken
    for ours, other, theirs in zip(found, again, expected, strict=True):
        assert ours.token_ids == theirs.token_ids == other.token_ids


def test_prompts_read_by_recorded_forwards_give_the_same_tokens():
    """Waves of new prompts of a few sizes, so that every size is recorded; the first wave is read without."""
    rng, model = random.Random(5), loaded(context=1200)  # so long that single tokens' keys are shared out
    engine = luban.Engine(model, cache_bytes=2**26, max_batch=4)
    alone = luban.Engine(model, paged=False)
    assert isinstance(engine.batch, PagedBatch) and engine.batch.runner.prompts is not None
    sampling = Sampling(max_tokens=12, temperature=0, ignore_eos=True)
    for _ in range(4):
        prompts = [[rng.randrange(97) for _ in range(length)] for length in rng.sample((40, 100, 7, 900), 4)]
        expected = [alone.generate([prompt], sampling)[0].token_ids for prompt in prompts]
        assert [answer.token_ids for answer in engine.generate(prompts, sampling)] == expected
    assert engine.batch.runner.prompts._graphs and not engine.batch.runner.prompts._broken


@pytest.mark.parametrize("weights", ["", "int8", "fp8"])
def test_eight_bits_give_what_they_give_alone(weights):
    """In recorded forwards over many sequences, and one by one without."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with fp8")
    rng, model = random.Random(6), loaded()
    if weights:
        pack_for_inference(model.module, weights)
    engine = luban.Engine(model, cache_bytes=2**24, cache_dtype="fp8")
    alone = luban.Engine(model, cache_bytes=2**24, cache_dtype="fp8", max_batch=1)
    alone.batch.runner.graphs = alone.batch.runner.prompts = None  # type: ignore[attr-defined]
    sampling = Sampling(max_tokens=30, temperature=0, ignore_eos=True)
    for _ in range(2):
        prompts = [[rng.randrange(97) for _ in range(rng.choice([1, 30, 200]))] for _ in range(21)]
        found = engine.generate(prompts, sampling)
        expected = [alone.generate([prompt], sampling)[0] for prompt in prompts]
        alike = [a.token_ids == b.token_ids for a, b in zip(found, expected, strict=True)]
        assert sum(alike) >= 20, alike  # sums of other numbers of rows round otherwise: one near tie
    assert not engine.batch.runner.graphs._broken  # type: ignore[attr-defined]


def test_adapters_in_recorded_forwards_give_the_same_tokens(tmp_path):
    """Beside forwards that aren't recorded, and each request over the model with its adapter alone, while more adapters are
    asked for than memory holds; c is in no stack, so that what shares a batch with it isn't recorded."""
    rng, sampling = random.Random(7), Sampling(max_tokens=20, temperature=0, ignore_eos=True)
    kinds = {"a": LoRA(rank=3), "b": LoRA(rank=20, targets=("q", "down")), "c": DoRA(rank=2)}
    base, made = write_adapted(tmp_path, kinds)
    engines = [luban.Engine(luban.load_model(base, "cuda"), adapters=made, max_adapters=2) for _ in range(2)]
    runners = [engine.batch.runner for engine in engines]  # type: ignore[attr-defined]
    runners[1].graphs = runners[1].prompts = None
    plain = {n: luban.Engine(luban.load_model(base, "cuda", adapter=made.get(n))) for n in ("", *made)}
    for wave in range(5):
        known = ("", "a", "b") if wave < 3 else ("", *made)
        texts = [[rng.randrange(20, 270) for _ in range(rng.choice([1, 20, 40]))] for _ in range(24)]
        names = [rng.choice(known) for _ in texts]
        found, again = (engine.generate(texts, sampling, adapters=names) for engine in engines)
        expected = [plain[name].generate([text], sampling)[0] for name, text in zip(names, texts, strict=True)]
        for ours, unrecorded, theirs in zip(found, again, expected, strict=True):
            assert ours.token_ids == theirs.token_ids == unrecorded.token_ids
        if wave == 2:  # later c drives others out, and what was recorded with them
            for recorded in (runners[0].graphs, runners[0].prompts):
                assert not recorded._broken and any(adapted for _, adapted in recorded._graphs)


def test_a_forward_that_cannot_be_recorded_runs_without_and_leaves_torch_as_it_was(monkeypatch, capsys):
    model, prompt = loaded(), [1, 2, 3]
    sampling = Sampling(max_tokens=9, temperature=0, ignore_eos=True)
    expected = luban.Engine(model, cache_bytes=2**22).generate([prompt], sampling)[0].token_ids
    forward = DecodeGraphs._forward
    monkeypatch.setattr(DecodeGraphs, "_forward", lambda self, size: (torch.cuda.synchronize(), forward(self, size))[1])
    engine = luban.Engine(model, cache_bytes=2**22)
    assert engine.generate([prompt], sampling)[0].token_ids == expected
    assert "without a CUDA graph" in capsys.readouterr().err
    assert torch.randn(3, device="cuda").isfinite().all()
    monkeypatch.undo()
    engine = luban.Engine(model, cache_bytes=2**22)
    assert engine.generate([prompt], sampling)[0].token_ids == expected and not engine.batch.runner.graphs._broken


def test_the_pool_leaves_what_a_forward_needs():
    engine = luban.Engine(loaded())
    used = torch.cuda.memory_allocated()
    assert engine.budget.slots == 256 * 304  # all that 256 sequences could use, in whole blocks
    assert used < torch.cuda.get_device_properties(0).total_memory


def test_weights_put_elsewhere_are_read_there():
    model, prompt = loaded(), [1, 2, 3]
    sampling = Sampling(max_tokens=20, temperature=0, ignore_eos=True)
    engine = luban.Engine(model, cache_bytes=2**22)
    before = engine.generate([prompt], sampling)[0].token_ids
    for parameter in model.module.parameters():
        parameter.data = parameter.data.flip(0).clone()
    after = engine.generate([prompt], sampling)[0].token_ids
    assert after == luban.Engine(model, paged=False).generate([prompt], sampling)[0].token_ids != before
