"""What the demo may take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from luban.cli.training import RECIPES
from luban.core.config import from_dict, read_toml
from luban.demo.life import CPU, FIXED, GPU, USED, WHOLE_BATCH, life, on_gpu
from luban.models.config import resolve_spec
from luban.models.describe import describe
from luban.planner.memory import predict_memory
from luban.train.predict import step_settings
from luban.train.recipe import Recipe

LIMIT = 480  # seconds that the stages may take together
OTHERS = 63  # seconds of the stages without a budget, on two quiet cores (docs/MAP.md)


def test_each_stage_leaves_its_artifact_and_reads_only_those_of_earlier_ones(tmp_path):
    out = tmp_path / "a folder with {braces}"
    for sizes in (CPU, GPU):
        left: set[Path] = set()
        for stage in life(out, sizes, seed=7):
            *words, option, own = stage.command
            assert option == "--out" and Path(own) == stage.out and stage.out.parent == out
            read = {out / Path(part).relative_to(out).parts[0] for word in words for part in paths(word, out)}
            assert read <= left, f"{stage.name} reads what no earlier stage leaves: {read - left}"
            left.add(stage.out)
    assert {stage.name for stage in life(out, GPU, 0)} - {stage.name for stage in life(out, CPU, 0)} == {
        "packages",
        "text",
    }


def paths(word: str, out: Path) -> list[str]:
    """The artifacts below `out` that a word of a command names."""
    at = word.find(str(out) + "/")
    return [word[at:]] if at >= 0 else []


def test_budgets_leave_the_other_stages_twice_their_time():
    assert CPU.pretrain_seconds + CPU.sft_seconds + 2 * OTHERS <= LIMIT
    for sizes in (CPU, GPU):
        stages = {stage.name: stage.command for stage in life(Path("demo"), sizes, seed=0)}
        for name, budget in (("pretrain", sizes.pretrain_seconds), ("sft", sizes.sft_seconds)):
            words = stages[name]
            assert words[words.index("--train.budget_seconds") + 1] == str(budget)


def test_on_a_gpu_pretraining_is_cut_until_it_fits():
    """Into micro-batches, by the memory that a dry run predicts for the recipe."""
    recipe = from_dict(Recipe, read_toml(RECIPES / f"{GPU.pretrain}.toml"))
    spec = resolve_spec(recipe.model.given, GPU.vocabulary)
    settings = step_settings(recipe, spec, torch.device("cuda"))
    for free in (80e9, 16e9, 12.4e9, 8e9, 5e9):
        n = on_gpu(free).micro_batches
        rows = recipe.train.batch_size // n
        graph = describe(spec, batch=rows, seq=recipe.train.seq_len, dtype="bfloat16")
        needed = predict_memory(graph, replace(settings, accumulates=n > 1)).total
        assert 0.8 * (FIXED + WHOLE_BATCH / n) < needed <= FIXED + WHOLE_BATCH / n < free
        assert n == 1 or FIXED + 2 * WHOLE_BATCH / n > USED * free
        words = next(stage.command for stage in life(Path("demo"), on_gpu(free), 0) if stage.name == "pretrain")
        assert words[words.index("--train.accumulate") + 1] == str(n)
