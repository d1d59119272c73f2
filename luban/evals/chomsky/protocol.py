"""Training and measuring on one task, with several seeds at once.

Inputs are followed by as many places as the answer has tokens, or before these by steps in which nothing is asked; a model predicts
the answer in these places, and none of it is fed back. Train on lengths drawn from 1 to 40, test on 41 to 500; a model's score is the mean over lengths of the share of right
tokens, of the best seed (Delétang et al. 2023, section 4 and appendix B).

S seeds, B rows, L input tokens, O tokens of the answer, V vocabulary.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from luban.core.artifact import write_json
from luban.core.errors import ArtifactError, ConfigError
from luban.core.log import Bar
from luban.core.units import seconds
from luban.evals.chomsky.models import CELLS, RANDOM_RANGE, model_spec
from luban.evals.chomsky.state import Progress, load_state, save_state
from luban.evals.chomsky.tasks import ChomskyTask, chomsky_task
from luban.models.base import Model
from luban.models.build import build_model
from luban.models.recurrent import RecurrentBody
from luban.models.spec import ModelSpec, write_spec

FILE = "chomsky.json"  # beside spec.json
LEAST = {  # values of a protocol
    **dict.fromkeys(("seeds", "batch", "longest", "test_step", "test_rows", "test_from", "width", "layers"), 1),
    **dict.fromkeys(("steps", "computation"), 0),
}
ROOM = 2  # tokens that tasks add to a length: even ones made odd, the end of an answer


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a model is trained and measured. The defaults are the paper's but for the steps (10⁶) and seeds (10)."""

    task: str = "parity"
    model: str = "rnn"  # of `luban.evals.chomsky.models`
    width: int | None = None  # of the model; none: the paper's
    layers: int | None = None  # of a Transformer; none: the paper's
    position_range: int = RANDOM_RANGE  # positions that randomised ones are drawn from
    computation: int = 0  # steps between input and answer for every token of the input
    seeds: int = 3  # trained at once, of which the best counts
    steps: int = 10_000
    batch: int = 128  # rows a step
    longest: int = 40  # training length
    test_from: int = 41  # test lengths, from and to
    test_to: int = 500
    test_step: int = 1  # every so many lengths
    test_rows: int = 64  # a length
    lr: float = 1e-3  # of Adam
    clip: float = 1.0  # bound on each seed's gradient norm
    enough: float = 0.9995  # accuracy at a few test lengths at which training stops
    seconds: float = float("inf")  # training time, at most
    seed: int = 0  # of data; models are drawn from seed, seed + 1, …

    def __post_init__(self):
        chomsky_task(self.task)
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, {value} given")
        self.spec(8)
        if self.layers is not None and self.model in CELLS:
            raise ConfigError(f"layers are those of Transformers: {self.model} has one")
        if self.test_to < self.test_from:
            raise ConfigError(f"test lengths go from {self.test_from} to {self.test_to}: none")
        for name in ("lr", "clip", "seconds"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, {getattr(self, name)} given")
        if "random_" in self.model and self.position_range != RANDOM_RANGE:
            longest = self.tokens(self.longest)
            if self.position_range < longest:
                raise ConfigError(
                    f"position_range {self.position_range} is too small: the longest rows of {self.task} have {longest} tokens"
                )

    def told(self) -> dict[str, Any]:
        """The fields for JSON, which has no infinity: without a limit on seconds where there is none."""
        return {name: value for name, value in asdict(self).items() if value != float("inf")}

    def tokens(self, length: int) -> int:
        """Those of the longest rows of lengths up to `length`; a Transformer always has positions for the tests."""
        longest = length if self.model in CELLS else max(length, self.longest, self.test_to)
        return row_tokens(chomsky_task(self.task), longest, self.computation)

    def spec(self, tokens: int) -> ModelSpec:
        """The model for rows of so many tokens."""
        task, sizes = chomsky_task(self.task), {"layers": self.layers, "position_range": self.position_range}
        return model_spec(self.model, task, tokens, self.width, computes=self.computation > 0, **sizes)

    def lengths(self) -> range:
        """Those that count."""
        return range(self.test_from, self.test_to + 1, self.test_step)


def row_tokens(task: ChomskyTask, length: int, computation: int = 0) -> int:
    """Inputs, steps of computation and answer of the longest rows of a length."""
    inputs, answers = task.sample(np.random.default_rng(0), 1, length)
    return (1 + computation) * (inputs.shape[1] + ROOM) + answers.shape[1]


def blank_of(task: ChomskyTask) -> int:
    """The token in an answer's place; the next one stands where nothing is asked."""
    return max(task.inputs, task.outputs)


def batch_of(
    task: ChomskyTask, rng: np.random.Generator, rows: int, length: int, computation: int = 0
) -> tuple[Tensor, Tensor]:
    """(tokens (B, L + computation · L + O), answers (B, O))."""
    inputs, answers = (torch.from_numpy(x) for x in task.sample(rng, rows, length))
    inputs = F.pad(inputs, (0, computation * inputs.shape[1]), value=blank_of(task) + 1)
    return F.pad(inputs, (0, answers.shape[1]), value=blank_of(task)), answers


class Seeds:
    """Models of one specification that are trained at once: their parameters are stacked and vectorised over, where their
    operations allow it; torch's fused recurrences run one after another.

    Args:
        models: of the same specification.
    """

    def __init__(self, models: list[Model], *, vectorised: bool):
        self.models, self.vectorised = models, vectorised
        self.recurrent = isinstance(models[0].spec.body, RecurrentBody)
        if vectorised:
            stacked, self.buffers = stack_module_state(models)  # type: ignore[arg-type]
            self.parameters = {name: nn.Parameter(value.detach()) for name, value in stacked.items()}
            self.shell = build_model(models[0].spec, device="meta").train()
        else:
            self.shell = None

    def trained(self) -> list[nn.Parameter]:
        """What an optimizer updates."""
        if self.vectorised:
            return list(self.parameters.values())
        return [parameter for model in self.models for parameter in model.parameters()]

    def logits(self, tokens: Tensor, answers: int, blank: int) -> Tensor:
        """(S, B, O, V) in the last places."""
        given = {"segments": (tokens >= blank).long()} if self.recurrent else {}
        if not self.vectorised:
            return torch.stack([model(tokens, **given)[:, -answers:] for model in self.models])

        def one(parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Tensor:
            return functional_call(self.shell, (parameters, buffers), (tokens,), given)[:, -answers:]  # type: ignore[arg-type]

        with sdpa_kernel(SDPBackend.MATH):  # whose operations vmap can batch
            return vmap(one, randomness="same")(dict[str, Tensor](self.parameters), self.buffers)

    def clip(self, most: float) -> None:
        """Bound the gradient norm of every seed by itself."""
        if not self.vectorised:
            for model in self.models:
                nn.utils.clip_grad_norm_(model.parameters(), most)
            return
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norms_S = sum(g.flatten(1).square().sum(1) for g in gradients).sqrt()  # type: ignore[union-attr]
        factors_S = (most / (norms_S + 1e-6)).clamp_max(1.0)
        for gradient in gradients:
            gradient.mul_(factors_S.view(-1, *[1] * (gradient.dim() - 1)))

    @torch.no_grad()
    def unstacked(self) -> list[Model]:
        """The models with what was trained."""
        if self.vectorised:
            for number, model in enumerate(self.models):
                for name, parameter in model.named_parameters():
                    parameter.copy_(self.parameters[name][number])
        return self.models


def train(
    protocol: Protocol, device: str = "cpu", folder: Path | None = None, save_seconds: float = 60.0
) -> tuple[list[Model], int]:
    """(the trained models, steps taken). Trained memories are as large as training needs; `accuracy` makes larger ones.

    Args:
        folder: where the state of the training is kept, every `save_seconds` and at the end. A training that is there goes on.

    Raises:
        ConfigError: the training in `folder` differs in more than steps and seconds.
    """
    task, rng = chomsky_task(protocol.task), np.random.default_rng(protocol.seed)
    spec = protocol.spec(protocol.tokens(protocol.longest))
    models = [build_model(spec, seed=protocol.seed + number, device=device).train() for number in range(protocol.seeds)]
    seeds = Seeds(models, vectorised=protocol.seeds > 1 and protocol.model not in ("rnn", "lstm"))
    optimizer = torch.optim.Adam(seeds.trained(), lr=protocol.lr)
    torch.manual_seed(protocol.seed)
    state = (seeds.trained(), optimizer, rng)
    progress = Progress() if folder is None else load_state(folder, *state, protocol.told())
    blank, began, saved = blank_of(task), time.monotonic() - progress.seconds, time.monotonic()

    def keep() -> None:
        progress.seconds = time.monotonic() - began
        if folder is not None:
            save_state(folder, *state, progress, protocol.told())

    limited = protocol.seconds < float("inf")  # steps then don't tell the time left
    bar = Bar(f"{protocol.task} {protocol.model}", None if limited else protocol.steps, "steps", start=progress.step)
    while not progress.learned and progress.step < protocol.steps and time.monotonic() - began < protocol.seconds:
        length = int(rng.integers(1, protocol.longest + 1))
        rows, answers = (x.to(device) for x in batch_of(task, rng, protocol.batch, length, protocol.computation))
        logits = seeds.logits(rows, answers.shape[1], blank)[..., : task.outputs]
        wanted = answers.expand(protocol.seeds, -1, -1)
        loss = F.cross_entropy(logits.flatten(0, 2), wanted.flatten()) * protocol.seeds  # each seed's own mean
        optimizer.zero_grad()
        loss.backward()
        seeds.clip(protocol.clip)
        optimizer.step()
        progress.step += 1
        bar.advance(note=f"of {seconds(protocol.seconds)} at most" if limited else None)
        if progress.step % 500 == 0:
            few = np.linspace(protocol.test_from, protocol.test_to, 4).astype(int).tolist()
            found = accuracies(seeds.unstacked(), replace(protocol, test_rows=16), few)
            progress.learned = max(sum(each) / len(each) for each in found) > protocol.enough
        if time.monotonic() - saved >= save_seconds:
            keep()
            saved = time.monotonic()
    bar.close()
    keep()
    return seeds.unstacked(), progress.step


@torch.no_grad()
def accuracies(models: Iterable[Model], protocol: Protocol, lengths: Iterable[int] | None = None) -> list[list[float]]:
    """Of every model, the share of right tokens at each length."""
    task, lengths = chomsky_task(protocol.task), list(lengths or protocol.lengths())
    models, found = list(models), []
    bar = Bar(f"{protocol.task} {protocol.model}, measured", len(models) * len(lengths), "lengths")
    for model in models:
        device = next(model.parameters()).device
        wide = build_model(protocol.spec(protocol.tokens(max(lengths))), seed=None, device=device)
        wide.load_state_dict(model.state_dict())
        wide.eval()
        rng = np.random.default_rng([protocol.seed, 1])  # other rows than in training
        found.append([])
        for length in lengths:
            found[-1].append(_accuracy(wide, task, rng, protocol, length, device))
            bar.advance()
    bar.close()
    return found


def _accuracy(
    model: Model,
    task: ChomskyTask,
    rng: np.random.Generator,
    protocol: Protocol,
    length: int,
    device: torch.device,
) -> float:
    tokens, answers = (x.to(device) for x in batch_of(task, rng, protocol.test_rows, length, protocol.computation))
    given = {"segments": (tokens >= blank_of(task)).long()} if isinstance(model.spec.body, RecurrentBody) else {}
    logits = model(tokens, **given)[:, -answers.shape[1] :, : task.outputs]
    return (logits.argmax(-1) == answers).float().mean().item()


def save(model: Model, protocol: Protocol, out: Path) -> None:
    """Write a model that `luban eval OUT chomsky` measures."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    write_spec(model.spec, out)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, out / "model.safetensors")
    write_json(out / FILE, protocol.told())


def read_protocol(folder: Path) -> Protocol:
    """What a saved model was trained on. Raises ArtifactError where the folder doesn't say."""
    file = folder / FILE
    if not file.is_file():
        raise ArtifactError(
            f"{folder} was not trained on a task of the Chomsky hierarchy: it has no {FILE}; benchmarks/chomsky.py --out DIR trains "
            "models that have one"
        )
    return Protocol(**json.loads(file.read_text(encoding="utf-8")))
