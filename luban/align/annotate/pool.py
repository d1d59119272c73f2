"""A pool of simulated annotators as data: a TOML file says who they are and what they ask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from luban.core.config import from_dict, load_toml
from luban.core.errors import ConfigError, UsageError, nearest
from luban.evals.judges.model import JudgeTemplate

SHIPPED = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Annotator:
    """One simulated annotator."""

    name: str
    model: str  # a name of [models], or what --judge takes: rule:NAME, a model, a reward model, an address
    template: str = ""  # a name of [templates], a shipped one or a file; empty: as --judge chooses
    order: Literal["drawn", "given", "swapped"] = "drawn"  # in which the answers are shown
    batch: int = 1  # pairs in one prompt
    temperature: float = 1.0  # of the judge's answer
    weight: float = 1.0  # how often it is drawn

    def __post_init__(self):
        if self.batch < 1 or self.weight <= 0 or self.temperature < 0:
            raise ConfigError(
                f"annotator {self.name}: batch must be at least 1, weight positive and temperature at least 0; {self.batch}, "
                f"{self.weight} and {self.temperature} given"
            )


@dataclass(frozen=True, kw_only=True)
class Pool:
    """A pool."""

    annotator: tuple[Annotator, ...]
    noise: float = 0.25  # fraction of the labels that is flipped
    models: dict[str, str] = field(default_factory=dict)  # name → what it stands for
    templates: dict[str, JudgeTemplate] = field(default_factory=dict)  # name → how a model is asked

    def __post_init__(self):
        names = [each.name for each in self.annotator]
        if not names or len(set(names)) < len(names):
            raise ConfigError("a pool has at least one annotator, each with a name of its own")
        if not 0 <= self.noise < 0.5:
            raise ConfigError(f"noise is a fraction below 0.5, {self.noise} given")

    def with_models(self, given: Mapping[str, str]) -> Pool:
        """The pool with other models behind its names. UsageError for an unknown name, or one that stands for nothing."""
        for name in given:
            if name not in self.models:
                raise UsageError(f"the pool has no model '{name}'{nearest(name, self.models)}")
        models = {**self.models, **given}
        used = {each.model for each in self.annotator}
        if empty := sorted(name for name, model in models.items() if not model and name in used):
            raise UsageError(
                f"the pool's models {', '.join(empty)} aren't given: --models {' '.join(f'{n}=MODEL' for n in empty)}"
            )
        return replace(self, models=models)


def read_pool(name: str) -> Pool:
    """A pool file, or a shipped one by its name (alpacafarm). ConfigError for one that isn't right."""
    path = SHIPPED / f"{name}.toml"
    path = path if path.is_file() else Path(name)
    try:
        return from_dict(Pool, load_toml(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from None
