"""`luban rag train`: a sentence encoder tuned on questions and passages by DPR's loss."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from luban.core.artifact import ArtifactWriter
from luban.core.config import to_dict
from luban.core.errors import ConfigError, DataError
from luban.core.hashing import file_sha256
from luban.core.log import progress
from luban.core.metrics.bootstrap import interval
from luban.parallel.device import choose_device
from luban.parallel.world import World
from luban.retrieval.encoder import QUESTIONS, TextEncoder
from luban.retrieval.fusion import top
from luban.retrieval.passages import titled
from luban.retrieval.questions import Question, read_questions
from luban.retrieval.training.contrastive import backward
from luban.retrieval.training.exporting import write_encoder
from luban.retrieval.training.optimiser import Optimiser, batches, step_count, trainable
from luban.retrieval.training.pairs import MINED, Pair, Text, by_words, mine, split


@dataclass(frozen=True, kw_only=True)
class EncoderRecipe:
    """What a sentence encoder is tuned on, and how."""

    type: Literal["encoder"] = "encoder"  # what is trained: encoder, reranker or rag
    data: Path = Path("questions.json")  # questions with right passages: SQuAD's or DPR's format
    encoder: str = "minilm"  # the encoder to begin with: a path, or a name that a package carries
    towers: Literal[1, 2] = 1  # encoders: one for questions and passages, or as in DPR one for each
    heldout: float = 0.1  # fraction of the passages kept from training, with their questions
    negatives: int = 1  # hard negatives a question: the file's, else the best passages without an answer
    mined_by: Literal["bm25", "encoder"] = "bm25"  # what takes passages for the best: BM25, or the encoder as it begins
    batch_size: int = 32  # questions a step; the passages of all of them are each other's negatives
    chunk: int = 8  # texts whose activations are in memory at once; changes nothing else
    epochs: int = 2  # passes over the questions
    lr: float = 2e-5  # highest learning rate, after a linear rise over a tenth of the steps; then a linear fall to 0
    temperature: float = 0.05  # scores are divided by it; 1 as in DPR for vectors that aren't of unit length
    clip: float = 1.0  # largest norm of the gradient
    seed: int = 0  # of the held-out passages and the order
    device: str = "cpu"  # such as cpu or cuda

    def __post_init__(self) -> None:
        for name in ("batch_size", "chunk", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: at least 1 is needed, {getattr(self, name)} given")
        for name in ("lr", "temperature", "clip"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}: more than 0 is needed, {getattr(self, name)} given")
        if not 0 <= self.heldout < 1 or self.negatives < 0:
            raise ConfigError("heldout is from 0 to below 1, negatives from 0")


def train_encoder(recipe: EncoderRecipe, out: str | Path, world: World | None = None) -> dict[str, Any]:
    """Tune the encoder, write it to `out` in the Hugging Face layout with its pooling, and return its figures.

    Args:
        world: processes that divide the texts of every batch; the first writes, the others return nothing.

    Raises:
        DataError: too few passages to train on.
        ArtifactError: `out` is taken.
    """
    train, heldout = split(read_questions(recipe.data), recipe.heldout, recipe.seed)
    if not train:
        raise DataError(f"{recipe.data}: no question with a passage to train on")
    world = world or World()
    encoder = TextEncoder.load(recipe.encoder, recipe.device if world.size == 1 else str(choose_device(recipe.device)))
    if recipe.towers == 2 and encoder.questions is encoder.model:
        copied = replace(encoder.model, module=copy.deepcopy(encoder.model.module))
        encoder = TextEncoder(encoder.model, copied)
    pairs = mine(train, recipe.negatives, partial(by_vectors, encoder) if recipe.mined_by == "encoder" else by_words)
    if not world.is_main:
        deque(steps(encoder, pairs, recipe, world), maxlen=0)
        return {}
    config = {**to_dict(recipe), "data": file_sha256(recipe.data), "encoder": encoder.identity}
    for operational in ("chunk", "device"):
        config.pop(operational)
    parents = encoder.parents
    with ArtifactWriter(out, kind="encoder", config=config, seed=recipe.seed, parents=parents) as art:
        collection = list(dict.fromkeys(question.positives[0] for question in (*train, *heldout)))
        before = ranks(encoder, heldout, collection) if heldout else None
        losses = list(steps(encoder, pairs, recipe, world))
        art.figures.update(questions=len(pairs), first_loss=losses[0], last_loss=losses[-1])
        if before is not None:
            art.figures["heldout"] = compared(before, ranks(encoder, heldout, collection))
        write_encoder(encoder.model, art.path)
        if encoder.questions is not encoder.model:
            write_encoder(encoder.questions, art.path / QUESTIONS)
    return art.figures


def by_vectors(encoder: TextEncoder, questions: Sequence[Question], collection: Sequence[Text]) -> Iterator[np.ndarray]:
    """Places of the passages that the encoder finds nearest to each question, nearest first (self-mined negatives)."""
    passages = encoder.passages([titled(*text) for text in collection])
    for vector in encoder.queries([question.text for question in questions]):
        yield top(passages @ vector, MINED)[0]


def steps(encoder: TextEncoder, pairs: Sequence[Pair], recipe: EncoderRecipe, world: World) -> Iterator[float]:
    """Train, giving the loss of every step."""
    modules = [encoder.model.module]
    if encoder.questions is not encoder.model:
        modules.append(encoder.questions.module)
    asked, read = encoder.question_embedder, encoder.embedder
    total = step_count(len(pairs), recipe.batch_size, recipe.epochs)
    weights = [weight for module in modules for weight in trainable(module)]
    optimiser = Optimiser(weights, lr=recipe.lr, total=total, clip=recipe.clip, world=world)
    with progress("training the encoder", total=total, unit="steps") as bar:
        for batch in batches(pairs, recipe.batch_size, recipe.epochs, recipe.seed):
            questions, passages = texts_of(batch)
            loss = backward(
                asked.vectors,
                read.vectors,
                asked.fitted([asked.pooling.query_prompt + text for text in questions])[0],
                read.fitted([read.pooling.passage_prompt + text for text in passages])[0],
                temperature=recipe.temperature,
                chunk=recipe.chunk,
                world=world,
            )
            optimiser.step()
            bar.advance(note=f"loss {loss:.3f}")
            yield loss
    for module in modules:
        module.requires_grad_(False)


def texts_of(batch: Sequence[Pair]) -> tuple[list[str], list[str]]:
    """(questions, passages) of a batch: first each question's right passage, then the wrong ones. A question whose passage is
    another one's, too, is left out, since that passage would count as wrong."""
    chosen: dict[Text, Pair] = {}
    for pair in batch:
        chosen.setdefault(pair.right, pair)
    wrong = dict.fromkeys(text for pair in chosen.values() for text in pair.wrong if text not in chosen)
    return [pair.question for pair in chosen.values()], [titled(*text) for text in (*chosen, *wrong)]


def ranks(encoder: TextEncoder, questions: Sequence[Question], collection: Sequence[Text]) -> np.ndarray:
    """(questions,) int64: the rank (from 1) of each question's passage in a collection that holds it."""
    places = {text: place for place, text in enumerate(collection)}
    passages = encoder.passages([titled(*text) for text in collection])
    scores = encoder.queries([question.text for question in questions]) @ passages.T
    own = np.array([places[question.positives[0]] for question in questions])
    return 1 + (scores > scores[np.arange(len(own)), own][:, None]).sum(1)


def compared(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """Average rank (DPR's measure of validation) and top-1 accuracy of held-out questions before and after, and the 95%
    interval of the gain in top-1."""
    gains = (after == 1).astype(float) - (before == 1)
    return {
        "questions": len(before),
        "average_rank": [float(before.mean()), float(after.mean())],
        "top_1": [float((before == 1).mean()), float((after == 1).mean())],
        "top_1_gain_interval": interval(gains.tolist()),
    }
