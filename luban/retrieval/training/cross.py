"""`luban rag train` of a cross-encoder: each question's passage against passages that BM25 takes for it (Gao, Dai and Callan
2021, localized contrastive estimation)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from luban.checkpoint.weights import weights_hash
from luban.core.artifact import ArtifactWriter, Parent
from luban.core.config import to_dict
from luban.core.errors import ConfigError, DataError
from luban.core.hashing import file_sha256
from luban.core.log import progress
from luban.core.metrics.bootstrap import interval
from luban.core.seeding import derive
from luban.load.model import LoadedModel, load_model
from luban.models.build import build_model, state_of
from luban.models.head.rows import Classes
from luban.models.spec import changed
from luban.retrieval.packaged import located
from luban.retrieval.passages import titled
from luban.retrieval.questions import Question, read_questions
from luban.retrieval.reranking import CrossEncoder
from luban.retrieval.training.exporting import export_into
from luban.retrieval.training.optimiser import Optimiser, batches, step_count, trainable
from luban.retrieval.training.pairs import Pair, mine, split


@dataclass(frozen=True, kw_only=True)
class RerankerRecipe:
    """What a cross-encoder is trained on, and how."""

    type: Literal["reranker"] = "reranker"  # what is trained: encoder, reranker or rag
    data: Path = Path("questions.json")  # questions with right passages: SQuAD's or DPR's format
    encoder: str = "minilm"  # the encoder to begin with: a path, or a name that a package carries
    heldout: float = 0.1  # fraction of the passages kept from training, with their questions
    negatives: int = 7  # wrong passages a question: the file's, else BM25's best without an answer
    batch_size: int = 8  # questions a step
    epochs: int = 1  # passes over the questions
    lr: float = 3e-5  # highest learning rate, after a linear rise over a tenth of the steps; then a linear fall to 0
    clip: float = 1.0  # largest norm of the gradient
    seed: int = 0  # of the new head, the held-out passages and the order
    device: str = "cpu"  # such as cpu or cuda

    def __post_init__(self) -> None:
        for name in ("negatives", "batch_size", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: at least 1 is needed, {getattr(self, name)} given")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}: more than 0 is needed, {getattr(self, name)} given")
        if not 0 <= self.heldout < 1:
            raise ConfigError(f"heldout is from 0 to below 1, {self.heldout} given")


def train_reranker(recipe: RerankerRecipe, out: str | Path) -> dict[str, Any]:
    """Train, write the cross-encoder to `out` in the Hugging Face layout, and return its figures.

    Raises:
        DataError: too few passages to train on, or a vocabulary that doesn't say how two texts are joined.
        UnsupportedError: a model that is no encoder.
        ArtifactError: `out` is taken.
    """
    train, heldout = split(read_questions(recipe.data), recipe.heldout, recipe.seed)
    if not train:
        raise DataError(f"{recipe.data}: no question with a passage to train on")
    pairs = mine(train, recipe.negatives)
    begun = load_model(located(recipe.encoder, "encoder"), recipe.device)
    encoder = CrossEncoder(with_one_class(begun, recipe.seed))
    weights = weights_hash(state_of(begun.module))
    config = {**to_dict(recipe), "data": file_sha256(recipe.data), "encoder": weights}
    config.pop("device")
    parents = (Parent(role="encoder", kind="model", content_hash=weights, name=begun.name),)
    with ArtifactWriter(out, kind="encoder", config=config, seed=recipe.seed, parents=parents) as art:
        losses = list(steps(encoder, pairs, recipe))
        art.figures.update(questions=len(pairs), first_loss=losses[0], last_loss=losses[-1])
        if heldout and len({question.positives[0] for question in heldout}) > 1:
            art.figures["heldout"] = compared(encoder, heldout, recipe.negatives)
        export_into(encoder.model, art.path)
    return art.figures


def with_one_class(model: LoadedModel, seed: int) -> LoadedModel:
    """The model with a head of one class; one that is new is drawn at random."""
    if isinstance(model.spec.head, Classes) and model.spec.head.count == 1:
        return model
    spec = changed(model.spec, head=Classes(count=1))
    weight = next(model.module.parameters())
    module = build_model(spec, device=weight.device, dtype=weight.dtype, seed=derive(seed, "head") % 2**31)
    own = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in model.module.named_parameters():
            if name in own and own[name].shape == value.shape and not name.startswith("head.output"):
                own[name].copy_(value)
    return replace(model, spec=spec, module=module.eval())


def steps(encoder: CrossEncoder, pairs: Sequence[Pair], recipe: RerankerRecipe) -> Iterator[float]:
    """Train, giving the loss of every step: the mean over questions of the right passage's negative log-likelihood among its
    question's passages."""
    module, tokenizer = encoder.model.module, encoder.tokenizer
    total = step_count(len(pairs), recipe.batch_size, recipe.epochs)
    optimiser = Optimiser(trainable(module), lr=recipe.lr, total=total, clip=recipe.clip)
    with progress("training the cross-encoder", total=total, unit="steps") as bar:
        for batch in batches(pairs, recipe.batch_size, recipe.epochs, recipe.seed):
            asked = tokenizer.encode_batch([pair.question for pair in batch])
            rows, counts = [], []
            for question, pair in zip(asked, batch, strict=True):
                texts = tokenizer.encode_batch([titled(*text) for text in (pair.right, *pair.wrong)])
                rows += [encoder.pair(question, text) for text in texts]
                counts.append(len(texts))
            parts = encoder.logits(rows).split(counts)
            loss = -torch.stack([part.log_softmax(0)[0] for part in parts]).mean()
            loss.backward()
            optimiser.step()
            bar.advance(note=f"loss {loss.item():.3f}")
            yield loss.item()
    module.requires_grad_(False)


def compared(encoder: CrossEncoder, questions: Sequence[Question], negatives: int) -> dict[str, Any]:
    """Top-1 accuracy among a held-out question's passage and BM25's wrong ones, with its 95% interval, and that of chance."""
    right, chances = [], []
    for pair in mine(questions, negatives):
        scores = encoder.scores(pair.question, [titled(*text) for text in (pair.right, *pair.wrong)])
        right.append(float(scores.argmax() == 0))
        chances.append(1 / len(scores))
    return {
        "questions": len(right),
        "top_1": sum(right) / len(right),
        "top_1_interval": interval(right),
        "chance": sum(chances) / len(chances),
    }
