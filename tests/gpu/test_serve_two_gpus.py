"""A model over two GPUs, through NCCL, with and without recorded forwards, against the same model on one."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
import warm

import luban
from luban import Sampling
from luban.core.plan import ParallelPlan
from luban.load.model import LoadedModel
from luban.models.spec import uniform
from luban.nn.init import NormalInit
from luban.nn.mixer.grouped import Grouped
from luban.nn.position.alibi import Alibi
from luban.nn.position.learned import Learned
from luban.nn.position.rope import Rope
from luban.serve.batch import LostProcess
from luban.serve.paged import PagedBatch
from luban.serve.request import Request

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs several CUDA GPUs"),
]
VARIANTS = {
    "rope": {},
    "alibi, one key head": {"position": Alibi(), "mixer": Grouped(heads=4, kv_heads=1)},
    "learned": {"position": Learned(), "mixer": Grouped(heads=4, qkv_bias=True, output_bias=True), "tied_head": True},
}


def loaded(device: str, **fields) -> LoadedModel:
    plain = {"mixer": Grouped(heads=4, kv_heads=2), "position": Rope(), "init": NormalInit(std=0.2)}
    spec = uniform(**{"vocab_size": 97, "width": 128, "context": 300, "layers": 2, **plain, **fields})
    module = luban.build_model(spec, device=device)
    return LoadedModel(spec=spec, module=module, tokenizer=None, name="tiny", path=Path(), manifest=None)


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "not recorded"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_are_those_of_one_gpu(variant, recorded):
    """Weights are loaded on the CPU and sent; waves of prompts, so that prompts of their sizes are recorded; little memory."""
    rng, model = random.Random(3), loaded("cpu", **VARIANTS[variant])
    engine = luban.Engine(model, plan=ParallelPlan(tensor=2), device="cuda", cache_bytes=2**24)
    alone = luban.Engine(loaded("cuda", **VARIANTS[variant]), cache_bytes=2**24)
    sampling = Sampling(max_tokens=40, temperature=0, ignore_eos=True)
    try:
        held = 40 * 16 * engine.batch.budget.slot_bytes
        kernel = None if recorded else "luban"
        small = PagedBatch(engine.model.module, leader=engine.batch.leader, cache_bytes=held, kernel=kernel)
        assert (small.runner.graphs is not None) == recorded and small.runner.cache.device == torch.device("cuda", 0)
        engine.batch = small
        for _ in range(3):
            prompts = [[rng.randrange(97) for _ in range(rng.choice([1, 30, 200]))] for _ in range(17)]
            found, expected = (each.generate(prompts, sampling) for each in (engine, alone))
            assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
        assert small.scheduler.preemptions
        for each in (small.runner.graphs, small.runner.prompts) if recorded else ():
            assert each._graphs and not each._broken
    finally:
        engine.close()


def lose_a_process(rank: int) -> None:
    """Of a model over two GPUs, while the first waits for it."""
    engine = luban.Engine(loaded("cpu"), plan=ParallelPlan(tensor=2), device="cuda", cache_bytes=2**24)
    sampling = Sampling(max_tokens=200, temperature=0, ignore_eos=True)
    engine.generate([[1, 2]], sampling)
    engine.submit(Request([1, 2, 3], sampling))
    for _ in range(3):
        engine.step()
    engine.batch.leader._ends[0]()
    with pytest.raises(LostProcess, match="process 1 of 2 of the model ended"):
        while engine.step():
            pass
    os._exit(0)  # NCCL would be waited for


def test_a_process_that_is_killed_ends_the_engine_though_the_gpu_waits_for_it():
    warm.processes(lose_a_process, 1)


def test_memory_that_is_free_on_both():
    """Without a given size the pool takes what a forward leaves, on the GPU with less of it."""
    model = loaded("cpu", context=4096)
    engine = luban.Engine(model, plan=ParallelPlan(tensor=2), device="cuda", max_batch=8)
    try:
        assert engine.batch.budget.slots == 8 * 4096  # as much as eight sequences can use
        assert engine.generate([[1, 2, 3]], Sampling(max_tokens=4, ignore_eos=True))[0].token_ids
    finally:
        engine.close()
