"""Ghost Attention (Touvron et al. 2023b, "Llama 2", section 3.3): dialogues that keep an instruction given at their start.

The model that writes the answers reads the instruction in every user turn, so that it has no need to remember it. The model that
is trained reads it in the first turn only. The earlier answers of a training dialogue have weight 0: they may break the
instruction, since they are those of the given dialogue, and are no targets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from luban.align.writing import write_answers
from luban.core.artifact import ArtifactWriter
from luban.core.config import from_dict, load_toml, to_dict
from luban.core.errors import ConfigError, DataError
from luban.core.hashing import file_sha256
from luban.core.jsonl import parsed_rows, write_rows
from luban.core.seeding import generator
from luban.corpus.document import check_messages
from luban.evals.backends.base import Backend
from luban.evals.store import ResponseStore, StoredBackend

SHIPPED = Path(__file__).parent / "ghost_attention.toml"
FILE = "dialogues.jsonl"
Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """A kind of instruction, with the values that it may have."""

    name: str
    long: str  # as the model is told that writes answers; {value} stands for the value
    short: str  # the same in fewer words
    values: tuple[str, ...]

    def __post_init__(self):
        if "{value}" not in self.long or "{value}" not in self.short or not self.values:
            raise ConfigError(f"constraint {self.name}: long and short need {{value}}, and values at least one entry")


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """A file of constraints."""

    constraint: tuple[Constraint, ...]

    def __post_init__(self):
        names = [each.name for each in self.constraint]
        if not names or len(set(names)) < len(names):
            raise ConfigError("a file of constraints has at least one, each with a name of its own")


@dataclass(frozen=True, kw_only=True)
class GhostConfig:
    """How dialogues are made."""

    most: int = 2  # constraints that an instruction joins, at most
    short: float = 0.5  # fraction of the training dialogues whose instruction has the short form
    place: Literal["user", "system"] = (
        "user"  # where training dialogues have the instruction: first user turn, or system
    )
    every_turn: bool = False  # a training dialogue for every turn, not for the last one alone
    rewrite: bool = False  # earlier answers are written by the model too, where the dialogue has some
    max_tokens: int = 256  # of an answer
    temperature: float = 1.0  # of answers
    seed: int = 0  # of instructions and answers

    def __post_init__(self):
        if self.most < 1 or self.max_tokens < 1:
            raise ConfigError(f"most and max_tokens must be at least 1, {self.most} and {self.max_tokens} given")
        if not 0 <= self.short <= 1:
            raise ConfigError(f"short is a fraction from 0 to 1, {self.short} given")


@dataclass
class Dialogue:
    """A dialogue and the instruction drawn for it."""

    system: list[Message]  # the system's message, if there is one
    questions: list[str]  # user turns
    answers: list[str | None]  # one a user turn; None: the model writes it
    long: str = ""  # the instruction as the writing model reads it
    told: str = ""  # … as the trained model reads it
    constraints: tuple[str, ...] = ()  # "name=value"

    def prompt(self, turn: int) -> list[Message]:
        """What the writing model reads before its answer of a turn: the instruction in every user turn."""
        messages = list(self.system)
        for i in range(turn):
            messages += [_user(f"{self.long}\n\n{self.questions[i]}"), _assistant(self.answers[i] or "")]
        return [*messages, _user(f"{self.long}\n\n{self.questions[turn]}")]

    def training(self, turn: int, answer: str, place: str) -> list[Message]:
        """The dialogue up to a turn: the instruction at its start only, targets in its last answer only."""
        if place == "system":
            text = "\n\n".join([*(m["content"] for m in self.system), self.told])
            messages, first = list[Message]([{"role": "system", "content": text}]), self.questions[0]
        else:
            messages, first = list(self.system), f"{self.told}\n\n{self.questions[0]}"
        for i, question in enumerate([first, *self.questions[1 : turn + 1]]):
            messages.append(_user(question))
            messages.append({**_assistant(self.answers[i] or ""), "weight": 0} if i < turn else _assistant(answer))
        return messages


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def read_constraints(file: Path | None = None) -> Constraints:
    """The constraints of a TOML file, or those that ship. Raises ConfigError for one that isn't right."""
    try:
        return from_dict(Constraints, load_toml(file or SHIPPED))
    except ConfigError as error:
        raise ConfigError(f"{file or SHIPPED}: {error}") from None


def read_dialogues(file: Path) -> list[Dialogue]:
    """Dialogues of a .jsonl file: `messages`, in which answers may be missing (user turns that follow each other), or `turns`, a
    list of user turns. A last user turn without an answer counts.

    Raises DataError for a row of neither form, and for a file without rows.
    """
    return parsed_rows(file, _dialogue, "dialogue")


def _dialogue(row: Message) -> Dialogue:
    turns = row.get("turns")
    if isinstance(turns, list) and turns and all(isinstance(turn, str) and turn for turn in turns):
        return Dialogue(system=[], questions=turns, answers=[None] * len(turns))
    if "messages" not in row:
        raise ValueError("a row needs messages, or turns (a list of user turns)")
    made = Dialogue(system=[], questions=[], answers=[])
    for place, message in enumerate(check_messages(row["messages"])):
        role, content = message["role"], message["content"]
        if role == "user":
            made.questions.append(content)
            made.answers.append(None)
        elif role == "system" and place == 0:
            made.system.append(message)
        elif role == "assistant" and made.questions and made.answers[-1] is None and content:
            made.answers[-1] = content
        else:
            raise ValueError(f"message {place + 1}, of role {role}, stands where a dialogue has none")
    if not made.questions:
        raise ValueError("the dialogue has no user turn")
    return made


def draw_instruction(dialogue: Dialogue, constraints: Constraints, config: GhostConfig, number: int) -> None:
    """Give a dialogue an instruction: 1 to `most` constraints, each of another kind, in drawn order."""
    rng = generator(config.seed, "instruction", number)
    known = constraints.constraint
    size = int(rng.integers(1, min(config.most, len(known)) + 1))
    kinds = [known[int(i)] for i in rng.permutation(len(known))[:size]]
    values = [each.values[int(rng.integers(len(each.values)))] for each in kinds]
    short = rng.random() < config.short
    dialogue.long = " ".join(k.long.replace("{value}", v) for k, v in zip(kinds, values, strict=True))
    dialogue.told = " ".join(
        (k.short if short else k.long).replace("{value}", v) for k, v in zip(kinds, values, strict=True)
    )
    dialogue.constraints = tuple(f"{k.name}={v}" for k, v in zip(kinds, values, strict=True))


def ghost_attention(
    file: Path, backend: Backend, constraints: Constraints, out: Path, config: GhostConfig
) -> dict[str, Any]:
    """Write dialogues.jsonl, which `luban sft` trains on: `messages` with the instruction at the start only, earlier answers of
    weight 0, the last one by the model under the instruction; and `constraints`, the instruction's values. Dialogues whose last
    answer is empty or cut off by max_tokens are left out and counted.

    Raises:
        DataError: a row that is no dialogue, or no answer that can be trained on.
        UnfinishedError: the model left requests unanswered; the same command asks again.
    """
    dialogues = read_dialogues(file)
    identity = {
        **asdict(config),
        "model": backend.identity,
        "known": to_dict(constraints),
        "dialogues": file_sha256(file),
    }
    with (
        ArtifactWriter(out, kind="conversations", config=identity, seed=config.seed, resumable=True) as art,
        ResponseStore(art.path / "responses.jsonl", backend.identity) as store,
    ):
        for number, dialogue in enumerate(dialogues):
            draw_instruction(dialogue, constraints, config, number)
            if config.rewrite:
                dialogue.answers = [None] * len(dialogue.answers)
        counts: Counter[str] = Counter(dialogues=len(dialogues))
        rows = _rows(dialogues, StoredBackend(backend, store, "ghost attention"), config, counts)
        if not rows:
            raise DataError(f"no dialogue of {file} got an answer that can be trained on: {dict(counts)}")
        write_rows(art.path / FILE, rows)
        figures = {"rows": len(rows), **counts}
        art.note(**figures)
    return figures


def _rows(
    dialogues: Sequence[Dialogue], backend: Backend, config: GhostConfig, counts: Counter[str]
) -> list[dict[str, Any]]:
    """Training dialogues, written turn by turn over all dialogues, so that the model answers many at once."""
    found: list[tuple[int, int, dict[str, Any]]] = []
    for turn in range(max(len(each.questions) for each in dialogues)):
        here = [i for i, each in enumerate(dialogues) if turn < len(each.questions)]
        wanted = {i for i in here if config.every_turn or turn == len(dialogues[i].questions) - 1}
        asked = [i for i in here if i in wanted or dialogues[i].answers[turn] is None]
        answers = write_answers(
            backend,
            [dialogues[i].prompt(turn) for i in asked],
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            sample=turn,
            seed=config.seed,
        )
        counts["answers written"] += len(answers)
        for i, answer in zip(asked, answers, strict=True):
            each, text = dialogues[i], answer.text.strip()
            if i in wanted and text and answer.finish_reason == "stop":
                messages = each.training(turn, text, config.place)
                found.append((i, turn, {"messages": messages, "constraints": list(each.constraints)}))
            elif i in wanted:
                counts["left out: cut off" if text else "left out: empty"] += 1
            if each.answers[turn] is None:
                each.answers[turn] = text
    return [row for _, _, row in sorted(found, key=lambda each: each[:2])]
