"""The recipe of a training run: the fields of `recipes/*.toml`, which `--section.field value` overrides.

Fields marked `Operational`, `Numerical` or `Extensible` may change when a run is resumed (see luban.core.resuming).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from luban.adapters.base import AdapterConfig
from luban.checkpoint.manager import CheckpointConfig
from luban.core.config import Partial
from luban.core.errors import ConfigError
from luban.core.log import say
from luban.core.plan import ParallelPlan
from luban.core.resuming import Extensible, Numerical, Operational
from luban.data.shards import Shards
from luban.models.config import ModelConfig
from luban.objectives.base import Objective
from luban.objectives.causal import Causal
from luban.optim.adamw import AdamW
from luban.optim.base import OptimizerConfig
from luban.optim.schedule.base import Schedule
from luban.optim.schedule.cosine import Cosine
from luban.tokenizer.tokenizer import Tokenizer
from luban.train.elastic.config import ElasticConfig
from luban.train.spikes import SpikeConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training data."""

    path: Operational[str] = ""  # shards (for sft also a corpus of conversations or a .jsonl with messages)
    packing: Literal["stream", "fit"] = (
        "stream"  # fixed windows over all concatenated documents, or whole documents with padding
    )
    verify: Operational[bool] = False  # verify the hash of every file first
    # threads that prepare batches ahead (default: 2 on CUDA, 0 on CPU); batches don't depend on it
    workers: Operational[int | None] = None

    def __post_init__(self):
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers must be at least 0, {self.workers} given")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimizer steps, batches, precision and logging."""

    MOVED: ClassVar[dict[str, str]] = {
        "recompute": "plan.remat (none, selective, full, sqrt or rotor)"
    }  # earlier names

    steps: Extensible[int] = 1000  # optimizer steps
    epochs: Extensible[float] = 0.0  # lower `steps` to this many passes over the training text (0: off)
    # after up to 20 timed steps, lower `steps` so that training takes this long (0: off)
    budget_seconds: Extensible[float] = 0.0
    seed: int = 0  # of the initial weights and of the order of the data
    batch_size: int = 16  # sequences per optimizer step, over all ranks and micro-batches
    accumulate: Numerical[int] = 1  # micro-batches per optimizer step; batch_size is divided among them
    seq_len: int = 256  # input tokens per sequence (seq_len + 1 are read)
    # compute dtype of the matmuls; with fp8 only the Transformer layers use fp8, everything else bf16
    precision: Literal["fp64", "fp32", "bf16", "fp16", "fp8"] = "fp32"
    # dtype of the stored weights; bf16: no fp32 masters, stochastic rounding
    weights: Literal["fp32", "bf16"] = "fp32"
    # attention kernel; auto: the fastest that supports the run's masks
    attention: Numerical[Literal["auto", "flash4", "cudnn", "luban", "flash2", "torch"]] = "auto"
    device: Numerical[Literal["auto", "cpu", "cuda"]] = "auto"  # auto: cuda if available
    deterministic: Numerical[bool | None] = None  # bitwise repeatable; default: true on the CPU, false on CUDA
    compile: Numerical[bool] = False  # torch.compile; off with a warning if there is no compiler
    neftune: float = (
        0.0  # noise within ±neftune/√(tokens·width) on embeddings in training (NEFTune: 5 to 15 for sft; 0: none)
    )
    # factor on the gradients that layers send to token embeddings (GLM-130B: 0.1; 1: as they are)
    embedding_gradient: float = 1.0
    clip: float = 1.0  # maximum global gradient norm (0: no clipping)
    max_bad_steps: Operational[int] = 10  # steps with a NaN or infinite loss or gradient (skipped) before the run stops
    # of several processes: seconds in which none gets on, after which the run ends and names the one that is stuck (0: never). Pauses
    # of ten times the longest before are waited for, and so are compiling and checkpoints
    hang_seconds: Operational[float] = 60.0
    log_every: Operational[int] = 10  # steps between rows of metrics.jsonl
    tensorboard: Operational[bool] = False  # also write RUN/tensorboard
    profile: Operational[int] = 0  # steps to trace, after the first 3, into RUN/profile (0: none)

    @property
    def kernel(self) -> str | None:
        """Name of the attention kernel; None: the fastest."""
        return None if self.attention == "auto" else self.attention

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "seq_len", "max_bad_steps", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, {getattr(self, name)} given")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}")
        if self.weights == "bf16" and self.precision not in ("bf16", "fp8"):
            raise ValueError(f"weights kept in bf16 need matmuls in bf16 or fp8, precision is {self.precision}")
        if self.epochs < 0:
            raise ValueError(f"epochs must be at least 0, {self.epochs} given")
        if not 0 < self.embedding_gradient <= 1:
            raise ValueError(f"embedding_gradient must lie in (0, 1], {self.embedding_gradient} given")
        if min(self.budget_seconds, self.clip, self.profile, self.neftune, self.hang_seconds) < 0:
            raise ValueError("budget_seconds, clip, profile, neftune and hang_seconds must be at least 0")


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Loss and bits per byte on the held-out split."""

    every: Operational[int] = 100  # steps between validations (0: only after the last step)
    batches: int = 0  # held-out batches of train.batch_size sequences, always the same ones (0: all)
    patience: Extensible[int] = 0  # end training after this many validations without improvement (0: off)

    def __post_init__(self):
        if self.every < 0 or self.batches < 0 or self.patience < 0:
            raise ValueError("every, batches and patience must be at least 0")
        if self.patience and not self.every:
            raise ValueError(
                "validation.patience counts validations, but validation.every is 0, which validates only at the end"
            )


def model_of_init(data: dict[str, Any], given: Collection[str]) -> dict[str, Any]:
    """A recipe's data if the fields `given` are set on the command line: `--init MODEL` replaces the recipe's [model] except
    its head, which fine-tuning may change."""
    model = data.get("model") or {}
    described = model.keys() - {"head"}
    if "init" not in given or not described:
        return data
    say("the model is that of --init; the recipe's [model] is ignored")
    return {**data, "model": {name: value for name, value in model.items() if name == "head"}}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole training run as data."""

    # the model, or changes to a preset
    model: Partial[ModelConfig] = field(default_factory=lambda: Partial(ModelConfig))
    init: Operational[str] = ""  # start from this MODEL's weights and spec (empty: random weights)
    # train few parameters beside the frozen weights of `init` (none: train these themselves)
    adapter: AdapterConfig | None = None
    data: DataConfig = field(default_factory=DataConfig)
    objective: Objective = field(default_factory=Causal)
    optim: OptimizerConfig = field(default_factory=AdamW)
    schedule: Schedule = field(default_factory=Cosine)
    train: TrainConfig = field(default_factory=TrainConfig)
    plan: ParallelPlan = field(default_factory=ParallelPlan)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    elastic: ElasticConfig = field(default_factory=ElasticConfig)

    def trained(self, shards: Shards) -> Shards:
        """The training split as the loss of this recipe reads it."""
        return shards

    def check_rows(self, plan: ParallelPlan) -> None:
        """Raise ConfigError where plan or compilation needs micro-batches of equally many rows and the objective has none."""
        divided = [name for name in ("shard", "tensor", "pipeline", "context", "expert") if getattr(plan, name) > 1]
        if self.objective.varies_rows and (divided or self.train.compile):
            what = f"plan.{divided[0]}" if divided else "train.compile"
            name = Objective.registry.name_of(type(self.objective))
            raise ConfigError(
                f"objective {name} has another number of rows of each task in every micro-batch, which does not go with "
                f"{what}: leave it out; --plan.replicate divides the rows among processes"
            )

    def require_tokenizer(self, shards: Shards, tokenizer: Tokenizer) -> None:
        """Raise LineageError unless the shards were packed with the tokenizer of `init`."""
        shards.require_tokenizer(tokenizer.content_hash, f"model {self.init}")

    def __post_init__(self):
        if self.adapter is not None and not self.init:
            raise ConfigError("an adapter needs a model that it adapts: give --init MODEL")
        if self.optim.keeps_rate and self.schedule.decays:
            name = OptimizerConfig.registry.name_of(type(self.optim))
            raise ConfigError(
                f"{name} averages weights in place of a decaying learning rate: give --schedule.type constant"
            )
        if self.train.weights == "bf16" and not self.optim.rounds_stochastically:
            name = OptimizerConfig.registry.name_of(type(self.optim))
            raise ConfigError(
                f"train.weights bf16 needs an optimizer that rounds stochastically, or small updates are "
                f"lost, and {name} doesn't: use --optim.type adamw or --train.weights fp32"
            )
