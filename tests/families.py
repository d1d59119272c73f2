"""One small model of each family, with the objective that trains it and random batches for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from luban.core.plan import ParallelPlan
from luban.data.batch import Batch
from luban.data.collate.labelled import LabelledBatch
from luban.data.collate.masked import PairBatch
from luban.data.collate.pairing import NextSentence
from luban.data.collate.source import source_batch
from luban.models.elmo import ElmoBody
from luban.models.encoder import EncoderBody
from luban.models.encoder_decoder import EncoderDecoderBody
from luban.models.head.language_model import LanguageModel
from luban.models.head.masked_lm import MaskedLM
from luban.models.head.rows import Classes
from luban.models.recurrent import RecurrentBody
from luban.models.spec import ModelSpec, uniform
from luban.nn.character import CharacterCNN
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.feedforward.plain import GELU, ReLU
from luban.nn.init import NormalInit
from luban.nn.mixer.grouped import Grouped
from luban.nn.moe.gshard import GShard
from luban.nn.moe.layer import MixtureOfExperts
from luban.nn.moe.router import Router
from luban.nn.moe.top_k import TopK
from luban.nn.norm import LayerNorm, RMSNorm
from luban.nn.position.kerple import KerpleLog
from luban.nn.position.learned import Learned
from luban.nn.position.t5 import RelativeBias
from luban.nn.recurrent.plain import LSTM
from luban.nn.recurrent.tape import TapeRNN
from luban.objectives.base import Objective
from luban.objectives.bidirectional import Bidirectional
from luban.objectives.causal import Causal
from luban.objectives.denoising import Denoising
from luban.objectives.labelled import Labelled
from luban.objectives.masked import Masked
from luban.optim.adamw import AdamW
from luban.optim.base import OptimizerConfig
from luban.parallel.apply import Execution, apply
from luban.parallel.engine import TrainEngine

VOCAB, TOKENS, CHARACTERS = 41, 8, 6
PLAIN: dict[str, Any] = {"vocab_size": VOCAB, "width": 32, "context": 48, "init": NormalInit(std=0.2)}


@dataclass(frozen=True)
class Family:
    """A model and what it is trained on; `batch(rows, rng)` draws one."""

    spec: ModelSpec
    objective: Objective
    batch: Callable[[int, np.random.Generator], Batch]


def packed_batch(rows: int, rng: np.random.Generator, words: int = VOCAB) -> Batch:
    """Two documents a row; most targets are trained."""
    tokens = rng.integers(0, words, (rows, TOKENS + 1))
    ends = rng.integers(2, TOKENS - 2, (rows, 1))
    at = np.arange(TOKENS)[None]
    documents = (at >= ends).astype(np.int32)
    positions = np.where(at >= ends, at - ends, at).astype(np.int32)
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_mask=rng.random((rows, TOKENS)) < 0.8,
        documents=documents,
        positions=positions,
    )


def pair_batch(rows: int, rng: np.random.Generator) -> Batch:
    """Two segments a row, some tokens hidden, and whether the segments belong together."""
    batch = packed_batch(rows, rng)
    one = replace(
        batch,
        documents=np.zeros_like(batch.documents),
        positions=np.broadcast_to(np.arange(TOKENS, dtype=np.int32), (rows, TOKENS)),
    )
    return PairBatch(
        **vars(one),
        segments=batch.documents.astype(np.int64),
        labels=rng.integers(0, 2, rows),
        weights=np.full(rows, 3.0, dtype=np.float32),
    )


def labelled_batch(rows: int, rng: np.random.Generator) -> Batch:
    """Texts padded on the right, with a class each."""
    tokens, ends = rng.integers(0, VOCAB, (rows, TOKENS + 1)), rng.integers(3, TOKENS + 1, (rows, 1))
    at = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), (rows, TOKENS))
    return LabelledBatch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_mask=at == ends - 1,
        positions=at,
        documents=np.where(at < ends, 0, -1).astype(np.int32),
        follows=at < ends - 1,
        labels=rng.integers(0, 2, rows),
        weights=np.full(rows, 0.1, dtype=np.float32),
    )


def translation_batch(rows: int, rng: np.random.Generator) -> Batch:
    """Sources and targets of different lengths."""
    sources, targets = (
        [rng.integers(3, VOCAB, rng.integers(3, TOKENS)).tolist() for _ in range(rows)] for _ in range(2)
    )
    return source_batch(sources, targets, start=1, pad=0, source_len=TOKENS, target_len=TOKENS)


def bidirectional_batch(rows: int, rng: np.random.Generator, *, characters: bool) -> Batch:
    """The next and the previous token as targets; words from characters or from a table."""
    batch = packed_batch(rows, rng)
    tokens = rng.integers(0, 20, (rows, TOKENS, CHARACTERS)) if characters else batch.tokens
    both = [np.stack([array, np.roll(array, 1, axis=1)], axis=-1) for array in (batch.targets, batch.loss_mask)]
    return replace(batch, tokens=tokens, targets=both[0], loss_mask=both[1])


def mixtures(router: Router, network: str) -> ModelSpec:
    """Three layers, the first and the last with four experts."""
    moe = MixtureOfExperts(width=16, experts=4, network=network, router=router)
    spec = uniform(**PLAIN, layers=3, mixer=Grouped(heads=4, kv_heads=2), feedforward=moe, tied_head=True)
    dense = replace(spec.layers[1], feedforward=SwiGLU(width=16))
    return replace(spec, layers=(spec.layers[0], dense, spec.layers[2]))


ENCODER = uniform(
    **PLAIN,
    layers=2,
    mixer=Grouped(heads=4, qkv_bias=True),
    feedforward=GELU(width=48, bias=True),
    norm=LayerNorm(),
    position=Learned(),
    body=EncoderBody(segments=2, embeddings=16),
    head=MaskedLM(pair=True),
    tied_head=True,
)
FAMILIES: dict[str, Family] = {
    "decoder": Family(
        uniform(**PLAIN, layers=2, mixer=Grouped(heads=4, kv_heads=2), feedforward=SwiGLU(width=48), tied_head=True),
        Causal(),
        packed_batch,
    ),
    "decoder-kerple": Family(
        uniform(
            **PLAIN,
            layers=2,
            mixer=Grouped(heads=4, qkv_bias=True, output_bias=True, qk_norm=RMSNorm()),
            feedforward=GELU(width=48, bias=True),
            norm=LayerNorm(),
            position=KerpleLog(),
            embedding_norm=LayerNorm(),
        ),
        Causal(smoothing=0.1, z_loss=1e-3),
        packed_batch,
    ),
    "experts": Family(  # a dense layer between two mixtures
        mixtures(TopK(active=2, balance=0.1, z_loss=0.01), network="swiglu"), Causal(), packed_batch
    ),
    "experts-gshard": Family(mixtures(GShard(balance=0.3, capacity=0.7), network="relu"), Causal(), packed_batch),
    "classifier": Family(
        uniform(
            **PLAIN,
            layers=2,
            mixer=Grouped(heads=4),
            feedforward=SwiGLU(width=48),
            head=Classes(pooling="last"),
            tied_head=True,
        ),
        Labelled(labels=("no", "yes"), weight=0.5),
        labelled_batch,
    ),
    "encoder": Family(ENCODER, Masked(pairing=NextSentence()), pair_batch),
    "albert": Family(
        replace(ENCODER, layers=(ENCODER.layers[0], replace(ENCODER.layers[0], share=0)), head=MaskedLM()),
        Masked(),
        packed_batch,
    ),
    "encoder-decoder": Family(
        uniform(
            **PLAIN,
            layers=2,
            mixer=Grouped(heads=4),
            feedforward=ReLU(width=48),
            position=Learned(),
            body=EncoderDecoderBody(decoder_start=1),
            head=LanguageModel(scale_hidden=True),
            tied_head=True,
        ),
        Denoising(),
        translation_batch,
    ),
    "t5": Family(
        uniform(
            **PLAIN,
            layers=2,
            mixer=Grouped(heads=4, score_scale=1.0),
            feedforward=SwiGLU(width=48),
            position=RelativeBias(),
            body=EncoderDecoderBody(decoder_start=1),
        ),
        Denoising(),
        translation_batch,
    ),
    "recurrent": Family(
        ModelSpec(**PLAIN, layers=(), body=RecurrentBody(cell=LSTM()), tied_head=True), Causal(), packed_batch
    ),
    "recurrent-tape": Family(
        ModelSpec(**PLAIN, layers=(), body=RecurrentBody(layers=1, cell=TapeRNN(cells=4, cell_width=3))),
        Causal(),
        packed_batch,
    ),
    "elmo": Family(
        ModelSpec(**PLAIN, layers=(), body=ElmoBody(words=CharacterCNN(characters=20, width=4, filters=(8, 8, 16)))),
        Bidirectional(characters=CHARACTERS),
        lambda rows, rng: bidirectional_batch(rows, rng, characters=True),
    ),
    "elmo-table": Family(
        ModelSpec(**PLAIN, layers=(), body=ElmoBody(cell=LSTM(cells=40)), tied_head=True),
        Bidirectional(),
        lambda rows, rng: bidirectional_batch(rows, rng, characters=False),
    ),
}


def engine_of(
    family: Family,
    *,
    seed: int,
    adapt=None,
    plan: ParallelPlan | None = None,
    eps: float = 1e-8,
    optimizer: OptimizerConfig | None = None,
    **execution: Any,
) -> TrainEngine:
    """The family's model ready to train, on the CPU unless told, by AdamW unless an optimizer is given."""
    with torch.device("meta"):
        model = family.spec.body.build(family.spec)
    settings = Execution(**{"device": torch.device("cpu"), **execution})
    return apply(
        family.objective.loss(model),
        plan or ParallelPlan(),
        optimizer or AdamW(lr=1e-2, eps=eps),
        execution=settings,
        init=seed,
        adapt=adapt,
    )
