"""`luban rag train`: sentence encoders, cross-encoders, and models that answer with the passage summed out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from luban.retrieval.rag.train import RagRecipe
    from luban.retrieval.training.cross import RerankerRecipe
    from luban.retrieval.training.train import EncoderRecipe


def run(argv: Sequence[str]) -> int:
    """`luban rag train RECIPE --out DIR`"""
    import luban.recipes
    from luban.cli.launch import launch
    from luban.core.arguments import parse_recipe, recipe_type, without_processes
    from luban.core.config import to_dict
    from luban.core.errors import ConfigError, UsageError
    from luban.parallel.world import process_count
    from luban.retrieval.rag.train import RagRecipe
    from luban.retrieval.training.cross import RerankerRecipe
    from luban.retrieval.training.train import EncoderRecipe

    shipped = Path(luban.recipes.__file__).parent
    recipes: dict[str, type[EncoderRecipe | RerankerRecipe | RagRecipe]] = {
        "encoder": EncoderRecipe,
        "reranker": RerankerRecipe,
        "rag": RagRecipe,
    }
    kind = recipe_type(argv, shipped, default="encoder")
    if kind not in recipes:
        raise ConfigError(f"type: encoder, reranker or rag, {kind!r} given")
    call = parse_recipe(
        recipes[kind],
        argv,
        verb="rag train",
        about="Of type encoder: tune a sentence encoder on questions and passages, each question's passage against those of all "
        "others in the batch and hard negatives (DPR). --nproc N divides the texts of every batch among N processes, and changes "
        "nothing else. The result is an encoder for luban rag index --encoder DIR.\n\n"
        "Of type reranker: train a cross-encoder, which reads question and passage together, for luban rag search --rerank "
        "DIR.\n\n"
        "Of type rag: train a model that writes answers together with the encoder of questions, the passage summed out "
        "(RAG-Sequence, RAG-Token). The result is a model for luban rag ask INDEX DIR. Its fields: luban rag train "
        "smollm2_rag_cpu --help.",
        examples="luban rag train minilm_dpr_cpu --data questions.json --out encoder\n"
        "luban rag train minilm_dpr_cpu --data nq-train.json --batch_size 128 --chunk 16 --device cuda --nproc 4 --out encoder\n"
        "luban rag train minilm_reranker_cpu --data questions.json --out reranker\n"
        "luban rag train smollm2_rag_cpu --data questions.json --index index --out answers\n"
        "luban rag train smollm2_rag_cpu --data questions.json --index index --marginal token --k 10 --device cuda --out answers",
        shipped=shipped,
    )
    processes = max(call.processes, process_count())
    if processes > 1 and not isinstance(call.recipe, EncoderRecipe):
        raise UsageError(f"luban rag train of type {kind} runs in one process: leave --nproc out")
    if call.dry_run:
        print(json.dumps(to_dict(call.recipe), indent=2))
    elif isinstance(call.recipe, RagRecipe):
        _train_rag(call.recipe, call.out)
    elif isinstance(call.recipe, RerankerRecipe):
        _train_reranker(call.recipe, call.out)
    elif call.processes > 1 and process_count() == 1:
        return launch(["rag", "train", *without_processes(argv)], call.processes)
    else:
        _train_encoder(call.recipe, call.out)
    return 0


def _train_rag(recipe: RagRecipe, out: Path) -> None:
    from luban.core.log import say
    from luban.retrieval.rag.train import train_rag

    figures = train_rag(recipe, out)
    say(f"rag {out}: {figures['questions']} questions, loss {figures['first_loss']:.3f} → {figures['last_loss']:.3f}")
    if held := figures.get("heldout"):
        (was, now), (low, high) = held["exact_match"], held["gain_interval"]
        say(
            f"  {held['questions']} held-out questions: exact match {was:.1%} → {now:.1%} (gain {low:+.1%} to {high:+.1%}, "
            "95% interval)"
        )


def _train_reranker(recipe: RerankerRecipe, out: Path) -> None:
    from luban.core.log import say
    from luban.retrieval.training.cross import train_reranker

    figures = train_reranker(recipe, out)
    say(
        f"reranker {out}: {figures['questions']} questions, loss {figures['first_loss']:.3f} → {figures['last_loss']:.3f}"
    )
    if held := figures.get("heldout"):
        low, high = held["top_1_interval"]
        say(
            f"  {held['questions']} questions about held-out passages, each among BM25's best wrong ones: top-1 {held['top_1']:.1%} "
            f"({low:.1%} to {high:.1%}, chance {held['chance']:.1%})"
        )


def _train_encoder(recipe: EncoderRecipe, out: Path) -> None:
    from luban.core.config import to_dict
    from luban.core.log import say
    from luban.core.plan import ParallelPlan
    from luban.parallel.device import choose_device
    from luban.parallel.world import World, process_count
    from luban.retrieval.training.train import train_encoder

    plan = ParallelPlan(replicate=process_count())
    world = World.join(plan, choose_device(recipe.device), {"recipe": to_dict(recipe)})
    figures = train_encoder(recipe, out, world)
    World.leave()
    if not world.is_main:
        return
    say(
        f"encoder {out}: {figures['questions']} questions, loss {figures['first_loss']:.3f} → {figures['last_loss']:.3f}"
    )
    if held := figures.get("heldout"):
        (rank, rank_now), (top, top_now) = held["average_rank"], held["top_1"]
        low, high = held["top_1_gain_interval"]
        say(
            f"  {held['questions']} questions about held-out passages, among all passages: average rank {rank:.2f} → "
            f"{rank_now:.2f}, top-1 {top:.1%} → {top_now:.1%} (gain {low:+.1%} to {high:+.1%}, 95% interval)"
        )
