"""Generates instruction data with any model, call by call, resumable, with what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from luban.align.instruct import prompts
from luban.align.instruct.filters import InstructionFilter
from luban.align.instruct.seeds import Instruction, read_seeds
from luban.core.artifact import ArtifactWriter
from luban.core.errors import ConfigError, DataError, UnfinishedError
from luban.core.hashing import file_sha256
from luban.core.jsonl import write_rows
from luban.core.log import progress
from luban.core.seeding import generator
from luban.evals.backends.base import Backend
from luban.evals.requests import Prompt, Response, Write, Written
from luban.evals.store import ResponseStore, StoredBackend

MOST_BARREN = 20  # rounds without a new task after which the model is given up


@dataclass(frozen=True, kw_only=True)
class InstructConfig:
    """How instructions are generated."""

    method: Literal["alpaca", "self_instruct"] = (
        "alpaca"  # whole tasks at once, or instruction, kind, instance in three steps
    )
    count: int = 100  # tasks wanted
    calls: int = 0  # rounds of requests at most; 0: until there are `count`
    per_call: int = 20  # tasks of a list (alpaca), demonstrations among them
    parallel: int = 8  # lists that are asked for at once
    demos: int = 3  # seed tasks shown (alpaca); Self-Instruct shows 6 seeds and 2 generated instructions
    max_tokens: int = 1024  # of an answer
    temperature: float = 1.0  # of lists of tasks; labels and instances are greedy
    top_p: float = 1.0  # of lists of tasks
    chat: bool = True  # prompts as a chat's message; false: as text for a base model to continue
    seed: int = 0  # of demonstrations and samples
    price_in: float = 0.0  # for a million tokens read, in any currency
    price_out: float = 0.0  # for a million tokens written

    def __post_init__(self):
        for name in ("count", "per_call", "parallel", "demos", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, {getattr(self, name)} given")


class Generation:
    """What both methods share: asking, filters, counts.

    Args:
        seeds: the tasks to begin with.
    """

    def __init__(self, backend: Backend, seeds: Sequence[Instruction], config: InstructConfig):
        self.backend, self.seeds, self.config = backend, list(seeds), config
        self.filter = InstructionFilter(self.seeds)
        self.made: list[Instruction] = []
        self.nearest: list[float] = []
        self.tokens = {"read": 0, "written": 0}
        self.failed = 0

    def ask(
        self, texts: Sequence[str], *, stop: tuple[str, ...], sample: int = 0, greedy: bool = False
    ) -> list[Response]:
        """Answers to prompts; those without one are `Failed`."""
        config = self.config
        asked = []
        for text in texts:
            prompt: Prompt = [{"role": "user", "content": text}] if config.chat else text
            asked.append(
                Write(
                    prompt=prompt,
                    max_tokens=config.max_tokens,
                    temperature=0.0 if greedy else config.temperature,
                    top_p=1.0 if greedy else config.top_p,
                    stop=stop,
                    sample=sample,
                    seed=0 if greedy else config.seed,
                )
            )
        found = self.backend.respond(asked)
        for each in found:
            if isinstance(each, Written):
                self.tokens["read"] += each.prompt_tokens
                self.tokens["written"] += each.tokens
            else:
                self.failed += 1
        return found

    def keep(self, task: Instruction, nearest: float) -> None:
        """Add a task to what was made."""
        self.made.append(task)
        self.nearest.append(nearest)


class Alpaca(Generation):
    """Whole tasks in one list (Taori et al. 2023): 3 seeds, 20 tasks a call."""

    def round(self, number: int) -> None:
        """Ask for `parallel` lists."""
        config, texts = self.config, []
        for place in range(config.parallel):
            rng = generator(config.seed, "alpaca", number, place)
            chosen = rng.permutation(len(self.seeds))[: config.demos]
            texts.append(prompts.alpaca_prompt([self.seeds[i] for i in chosen], config.per_call))
        last = f"\n{config.per_call + 1}."
        for response in self.ask(texts, stop=(last,), sample=number):
            if not isinstance(response, Written):
                continue
            tasks, unread = prompts.read_alpaca(response.text, whole=response.finish_reason == "stop")
            self.filter.dropped["unreadable"] += unread
            for task in tasks:
                nearest = self.filter.admit(task.instruction)
                if nearest is not None and self.filter.instance(task):
                    self.keep(task, nearest)


class SelfInstruct(Generation):
    """Instructions, whether they are classifications, then instances (Wang et al. 2023)."""

    SEEDS, MADE, MORE = 6, 2, 8  # demonstrations of each kind, and instructions asked for after them

    def round(self, number: int) -> None:
        """Ask for `parallel` lists of instructions, then for the kind and an instance of each that is kept."""
        config = self.config
        lists, firsts = [], []
        for place in range(config.parallel):
            rng = generator(config.seed, "self-instruct", number, place)
            own = [self.made[i].instruction for i in rng.permutation(len(self.made))[: self.MADE]]
            seeds = [
                self.seeds[i].instruction for i in rng.permutation(len(self.seeds))[: self.SEEDS + self.MADE - len(own)]
            ]
            shown = [*seeds, *own]
            order = rng.permutation(len(shown))
            lists.append(prompts.instructions_prompt([shown[i] for i in order], self.MORE))
            firsts.append(len(shown) + 1)
        admitted: list[tuple[str, float]] = []
        stop = (f"\nTask {self.SEEDS + self.MADE + self.MORE + 1}",)
        for first, response in zip(firsts, self.ask(lists, stop=stop, sample=number), strict=True):
            if isinstance(response, Written):
                whole = response.finish_reason == "stop"
                for instruction in prompts.read_instructions(response.text, first, self.MORE, whole=whole):
                    nearest = self.filter.admit(instruction)
                    if nearest is not None:
                        admitted.append((instruction, nearest))
        if admitted:
            self._instances(admitted)

    def _instances(self, admitted: Sequence[tuple[str, float]]) -> None:
        yes, no = ([s for s in self.seeds if s.classification is kind] for kind in (True, False))
        demos = [each for pair in zip(yes[:6], no[:6], strict=False) for each in pair] or self.seeds[:6]
        texts = [prompts.classification_prompt(demos, instruction) for instruction, _ in admitted]
        kinds = [
            isinstance(r, Written) and r.text.strip().lower().startswith("yes")
            for r in self.ask(texts, stop=("\n",), greedy=True)
        ]
        texts = [
            prompts.instance_prompt((yes if kind else no)[:4], instruction, classification=kind)
            for (instruction, _), kind in zip(admitted, kinds, strict=True)
        ]
        answers = self.ask(texts, stop=("\nTask:",), greedy=True)
        for (instruction, nearest), kind, response in zip(admitted, kinds, answers, strict=True):
            if not isinstance(response, Written):
                continue
            task = prompts.read_instance(response.text, instruction, classification=kind)
            if task is None or response.finish_reason == "length":
                self.filter.dropped["unreadable"] += 1
            elif self.filter.instance(task):
                self.keep(task, nearest)


METHODS: dict[str, type[Alpaca | SelfInstruct]] = {"alpaca": Alpaca, "self_instruct": SelfInstruct}


def generate_instructions(backend: Backend, seed_file: Path, out: Path, config: InstructConfig) -> dict[str, Any]:
    """Write instructions.jsonl (rows for `luban sft`) and responses.jsonl as an artifact; returns the figures.

    Raises:
        DataError: seeds that aren't right, or a model that gives no usable task.
        UnfinishedError: an endpoint left requests unanswered; the same command asks again.
    """
    seeds = read_seeds(seed_file)
    identity = {**asdict(config), "model": backend.identity, "seeds": file_sha256(seed_file)}
    with ArtifactWriter(out, kind="instructions", config=identity, seed=config.seed, resumable=True) as art:
        with ResponseStore(art.path / "responses.jsonl", backend.identity) as store:
            work = METHODS[config.method](StoredBackend(backend, store, "asking"), seeds, config)
            number = _until_enough(work)
        kept = work.made[: config.count]
        write_rows(
            art.path / "instructions.jsonl",
            [{**task.row(), "similarity": near} for task, near in zip(kept, work.nearest, strict=False)],
        )
        figures: dict[str, Any] = {
            "kept": len(kept),
            "rounds": number,
            "dropped": dict(work.filter.dropped),
            "tokens_read": work.tokens["read"],
            "tokens_written": work.tokens["written"],
            "cost": (work.tokens["read"] * config.price_in + work.tokens["written"] * config.price_out) / 1e6,
            "highest_similarity": max(work.nearest[: config.count], default=0.0),
        }
        art.note(**figures)
        if work.failed:
            raise UnfinishedError(
                f"{work.failed} requests have no answer; {len(kept)} tasks are kept, and the same command asks again"
            )
        if not kept:
            dropped = ", ".join(f"{reason} {count}" for reason, count in work.filter.dropped.most_common())
            raise DataError(f"no task of {backend.name} could be used ({dropped or 'nothing was written'})")
    return figures


def _until_enough(work: Alpaca | SelfInstruct) -> int:
    """Rounds until there are enough tasks, or no more come; how many there were."""
    number = barren = 0
    config = work.config
    with progress("instructions", config.count, "tasks") as bar:
        while len(work.made) < config.count and (not config.calls or number < config.calls) and barren < MOST_BARREN:
            before = len(work.made)
            work.round(number)
            number += 1
            barren = barren + 1 if len(work.made) == before else 0
            bar.advance(len(work.made) - before)
            if work.failed:
                break
    return number
