"""A small model on disk with adapters for it, and what each gives alone."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from tiny_models import write_checkpoint

from luban import Engine, Sampling, load_model
from luban.adapters.base import AdapterConfig
from luban.adapters.dora import DoRA
from luban.adapters.lora import LoRA
from luban.checkpoint.weights import weights_hash
from luban.load.adapted import ActiveAdapter, put_in
from luban.load.adapter_export import export_adapter
from luban.models.build import state_of
from luban.models.spec import uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.init import NormalInit
from luban.nn.mixer.grouped import Grouped

SPEC = uniform(
    vocab_size=272,
    width=32,
    layers=2,
    context=64,
    mixer=Grouped(heads=4, kv_heads=2),
    feedforward=SwiGLU(width=48),
    init=NormalInit(std=0.3),
)
KINDS = {"a": LoRA(rank=3), "b": LoRA(rank=2, targets=("q", "down")), "c": DoRA(rank=2)}
GREEDY = Sampling(max_tokens=8, temperature=0, ignore_eos=True)


def write_adapted(folder: Path, kinds: Mapping[str, AdapterConfig] = KINDS) -> tuple[Path, dict[str, Path]]:
    """A model and adapters for it."""
    base = write_checkpoint(folder / "base", SPEC, seed=3)
    return base, {name: write_adapter(base, config, folder / name) for name, config in kinds.items()}


def write_adapter(base: Path, config: AdapterConfig, out: Path) -> Path:
    """An adapter of random values in PEFT's layout."""
    m = load_model(base)
    weights = state_of(m.module)
    found = weights_hash(weights)
    put_in(m.module, config, config.initial(m.spec, weights, 1), "test")
    with torch.no_grad():
        for parameter in m.module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    export_adapter(replace(m, adapter=ActiveAdapter(config, str(base), found)), out)
    return out


def prompts(count: int) -> list[list[int]]:
    """That begin alike."""
    rng = random.SystemRandom()
    common = [rng.randrange(20, 270) for _ in range(18)]
    return [[*common, *(rng.randrange(20, 270) for _ in range(rng.randrange(1, 6)))] for _ in range(count)]


def alone(base: Path, adapter: Path | None, prompt: list[int], device: str = "cpu") -> list[int]:
    """What a model with one adapter writes."""
    return Engine(load_model(base, device, adapter=adapter), max_batch=2).generate(prompt, GREEDY)[0].token_ids
