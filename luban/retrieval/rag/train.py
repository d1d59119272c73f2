"""`luban rag train` of a generator and the encoder of questions together (Lewis et al. 2020, section 2.4).

The loss is −log p(answer | question) with the passage summed out; its gradient reaches the question's vector through the
probabilities of the passages. B questions, K passages, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from luban.checkpoint.weights import weights_hash
from luban.core.artifact import MANIFEST, ArtifactWriter, Parent, as_parent
from luban.core.config import to_dict
from luban.core.errors import ConfigError, DataError
from luban.core.hashing import file_sha256
from luban.core.log import progress, warn
from luban.core.metrics.answers import exact_match
from luban.core.metrics.bootstrap import interval
from luban.load.export import import_model
from luban.load.model import load_model
from luban.models.build import state_of
from luban.retrieval.encoder import QUESTIONS, TextEncoder
from luban.retrieval.index import Index
from luban.retrieval.questions import Question, read_questions
from luban.retrieval.rag.asking import RagAsker
from luban.retrieval.rag.generator import Generator
from luban.retrieval.rag.marginal import Marginal, marginal
from luban.retrieval.rag.model import GENERATOR, KIND, RagModel
from luban.retrieval.training.exporting import write_encoder
from luban.retrieval.training.optimiser import Optimiser, batches, step_count, trainable
from luban.retrieval.training.pairs import is_heldout


@dataclass(frozen=True, kw_only=True)
class RagRecipe:
    """What a generator is trained on with an index, and how."""

    type: Literal["rag"] = "rag"  # what is trained: encoder, reranker or rag
    data: Path = Path("questions.json")  # questions with answers: SQuAD's or DPR's format
    index: Path = Path("index")  # from luban rag index
    model: str = "smollm2"  # the generator to begin with: a path or name of a model that writes text
    marginal: Marginal = "sequence"  # one passage a whole answer (sequence) or a token (token) is held to come from
    k: int = 5  # passages a question
    train_retriever: bool = True  # also the encoder of questions; the index's vectors stay
    heldout: float = 0.1  # fraction of the questions kept from training, of which exact match is measured
    batch_size: int = 8  # questions a step, of k rows each
    epochs: int = 1  # passes over the questions
    lr: float = 3e-5  # highest learning rate, after a linear rise over a tenth of the steps; then a linear fall to 0
    retriever_lr: float = 1e-5  # that of the encoder of questions
    temperature: float = (
        0.05  # scores are divided by it; 1 for BM25, and as in the paper for vectors not of unit length
    )
    answer_tokens: int = 32  # of an answer at most
    clip: float = 1.0  # largest norm of the gradient
    seed: int = 0  # of the held-out questions and the order
    device: str = "cpu"  # such as cpu or cuda

    def __post_init__(self) -> None:
        for name in ("k", "batch_size", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: at least 1 is needed, {getattr(self, name)} given")
        for name in ("lr", "retriever_lr", "temperature", "clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}: more than 0 is needed, {getattr(self, name)} given")
        if not 0 <= self.heldout < 1:
            raise ConfigError(f"heldout is from 0 to below 1, {self.heldout} given")
        if self.answer_tokens < 2:
            raise ConfigError("answer_tokens: at least 2 are needed, a word and the end")


def train_rag(recipe: RagRecipe, out: str | Path) -> dict[str, Any]:
    """Train, write generator and encoder of questions to `out`, and return the figures.

    Raises:
        DataError: no question with an answer, or a context too short for one.
        UnsupportedError: a model that writes no text.
        ArtifactError: `out` is taken, or there is no such index.
    """
    asked = [question for question in read_questions(recipe.data) if question.answers]
    train, heldout = split(asked, recipe.heldout, recipe.seed)
    if not train:
        raise DataError(f"{recipe.data}: no question with an answer to train on")
    index = Index(recipe.index, device=recipe.device)
    if not len(index):
        raise DataError(f"{recipe.index} holds no passage")
    rag = untrained(recipe, index)
    if rag.questions is None:  # searches by words may find nothing, and find the same all along
        train = _findable(rag, index, train)
    model = rag.generator.model
    weights = weights_hash(state_of(model.module))
    config = {
        **to_dict(recipe),
        "data": file_sha256(recipe.data),
        "index": index.manifest.content_hash,
        "model": weights,
        "passage_encoder": rag.passage_encoder,
    }
    config.pop("device")
    if (model.path / MANIFEST).is_file():
        begun = as_parent("model", model.path)
    else:
        begun = Parent(role="model", kind="model", content_hash=weights, name=model.name)
    parents = (as_parent("index", recipe.index), begun)
    with ArtifactWriter(out, kind=KIND, config=config, seed=recipe.seed, parents=parents) as art:
        before = matches(rag, index, heldout, recipe.answer_tokens)
        losses = list(steps(rag, index, train, recipe))
        art.figures.update(questions=len(train), first_loss=losses[0], last_loss=losses[-1])
        if heldout:
            after = matches(rag, index, heldout, recipe.answer_tokens)
            gains = [now - was for was, now in zip(before, after, strict=True)]
            art.figures["heldout"] = {
                "questions": len(heldout),
                "exact_match": [sum(before) / len(before), sum(after) / len(after)],
                "gain_interval": interval(gains),
            }
        import_model(rag.generator.model, art.path / GENERATOR)
        if rag.questions is not None:
            write_encoder(rag.questions.questions, art.path / QUESTIONS)
    return art.figures


def split(questions: Sequence[Question], heldout: float, seed: int) -> tuple[list[Question], list[Question]]:
    """(training, held out), by the questions' texts."""
    sides: tuple[list[Question], list[Question]] = ([], [])
    for question in questions:
        sides[is_heldout(question.text, heldout, seed)].append(question)
    return sides


def _findable(rag: RagModel, index: Index, questions: Sequence[Question]) -> list[Question]:
    """The questions for which the index has a passage. Raises DataError where there is none."""
    found = rag.find(index, [question.text for question in questions], 1)
    kept = [question for question, passages in zip(questions, found, strict=True) if passages.hits]
    if not kept:
        raise DataError(f"{index.path} finds no passage for any of {len(questions)} questions")
    if lost := len(questions) - len(kept):
        warn(f"{lost} of {len(questions)} questions are left out of training: {index.path} finds no passage for them")
    return kept


def untrained(recipe: RagRecipe, index: Index) -> RagModel:
    """The model as training begins: the generator as it is, and a copy of the index's encoder for questions, where it has
    vectors and their encoder is to be trained."""
    identity, name = index.config["encoder"], index.encoder_name
    encoder = None
    if recipe.train_retriever and identity is not None and name is not None:
        encoder = TextEncoder.load(name, recipe.device)
        encoder.require(identity, str(index.path))
    return RagModel(
        generator=Generator(load_model(recipe.model, recipe.device)),
        questions=encoder,
        marginal=recipe.marginal,
        k=recipe.k,
        temperature=recipe.temperature,
        passage_encoder=identity,
    )


def steps(rag: RagModel, index: Index, questions: Sequence[Question], recipe: RagRecipe) -> Iterator[float]:
    """Train, giving each step's loss: the mean of −log p(answer | question) over its questions, in nats."""
    generator = rag.generator.model.module
    total = step_count(len(questions), recipe.batch_size, recipe.epochs)
    optimisers = [Optimiser(trainable(generator), lr=recipe.lr, total=total, clip=recipe.clip)]
    if rag.questions is not None:
        weights = trainable(rag.questions.questions.module)
        optimisers.append(Optimiser(weights, lr=recipe.retriever_lr, total=total, clip=recipe.clip))
    with progress("training", total=total, unit="steps") as bar:
        for batch in batches(questions, recipe.batch_size, recipe.epochs, recipe.seed):
            loss = -answer_logprobs(rag, index, batch, recipe.answer_tokens).mean()
            loss.backward()
            for optimiser in optimisers:
                optimiser.step()
            bar.advance(note=f"loss {loss.item():.3f}")
            yield loss.item()
    generator.requires_grad_(False)
    if rag.questions is not None:
        rag.questions.questions.module.requires_grad_(False)


def answer_logprobs(rag: RagModel, index: Index, questions: Sequence[Question], longest: int) -> Tensor:
    """(B,) log p(answer | question) of each question's first answer with gradients, in nats; the index has a passage for each
    question."""
    found = rag.find(index, [question.text for question in questions], rag.k)
    prompts, answers = [], []
    for question, passages in zip(questions, found, strict=True):
        answer = rag.generator.answer(question.answers[0], longest)
        for hit in passages.hits:
            prompts.append(rag.generator.prompt(question.text, hit.passage.titled, longest))
            answers.append(answer)
    rows_NT = rag.generator.logprobs(prompts, answers)
    priors = [passages.priors_K.to(rows_NT) for passages in found]
    parts = rows_NT.split([len(prior) for prior in priors])
    return torch.cat(
        [marginal(rag.marginal, prior[None], part[None]) for prior, part in zip(priors, parts, strict=True)]
    )


def matches(rag: RagModel, index: Index, questions: Sequence[Question], tokens: int) -> list[float]:
    """1 for each question that is answered right word for word, else 0, by greedy thorough decoding."""
    asker, scores = RagAsker(index, rag, beams=1, max_tokens=tokens), []
    with progress("asking held-out questions", total=len(questions), unit="questions") as bar:
        for question in questions:
            said = asker.ask(question.text)
            scores.append(exact_match(said.written, question.answers))
            bar.advance()
    return scores
