"""Preferences as files of rows → shards whose documents are grouped by prompt, with ranks, grades and soft labels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from luban.core.artifact import MANIFEST, ArtifactWriter, Parent, as_parent, open_artifact, read_manifest
from luban.core.errors import DataError
from luban.core.hashing import data_sha256, file_sha256
from luban.core.jsonl import read_rows
from luban.core.log import say, warn
from luban.data.groups import GROUP_FORMAT, GroupWriter
from luban.data.pack import copy_tokenizer
from luban.data.shards import token_dtype
from luban.tokenizer.chat import render
from luban.tokenizer.tokenizer import Tokenizer

HELDOUT = 0.05  # fraction of the prompts that is held out, where there are at least 20
GRADES = ("significantly better", "better", "slightly better", "negligibly better")  # Llama 2's four, from 0

Text = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Group:
    """The answers to one prompt."""

    prompt: Text
    answers: tuple[Text, ...]
    ranks: tuple[float, ...]  # one an answer: the higher, the better; of an unpaired answer 1 (wanted) or 0
    grade: int = -1  # how much better the first is, as an index into GRADES; -1: not given
    probability: float = 1.0  # that the first of a pair is the better one


def read_groups(file: Path) -> Iterator[tuple[int, Group | str]]:
    """(line number, group, or why the row is left out) of every row of a .jsonl file.

    Rows have `prompt`, `chosen` and `rejected`; or `prompt`, `responses` and `ranks` (or `scores`), the higher the better; or
    `prompt`, `completion` and `label` (true: wanted). Each is text or a list of messages. Optional: `grade`, `probability`.

    Raises:
        DataError: a row that isn't JSON or has other fields; names the line.
    """
    for number, row in read_rows(file):
        try:
            yield number, _group(row)
        except (DataError, KeyError, TypeError, ValueError) as error:
            why = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(
                f"{file}:{number}: {why}; a row needs prompt, chosen and rejected, or prompt, responses and ranks, or "
                f"prompt, completion and label"
            ) from None


def _group(row: dict[str, Any]) -> Group | str:
    if "responses" in row:
        ranks = row.get("ranks", row.get("scores"))
        ranks = scores_of(row["responses"], ranks)
        if len(ranks) < 2:
            raise ValueError("at least two responses are needed")
        if len(set(ranks)) == 1:
            return "all responses have the same rank"
        group = Group(prompt=row["prompt"], answers=tuple(row["responses"]), ranks=ranks)
    elif "completion" in row:
        if not isinstance(row.get("label"), bool):
            raise ValueError("label must be true or false")
        group = Group(prompt=row["prompt"], answers=(row["completion"],), ranks=(float(row["label"]),))
    else:
        prompt, chosen, rejected = _split(row)
        if chosen == rejected:
            return "chosen equals rejected"
        group = Group(
            prompt=prompt,
            answers=(chosen, rejected),
            ranks=(1.0, 0.0),
            grade=_grade(row.get("grade")),
            probability=_probability(row.get("probability", 1.0)),
        )
    for text in (group.prompt, *group.answers):
        require_text(text)
    if not group.prompt or any(not _spoken(answer) for answer in group.answers):
        return "the prompt or an answer is empty"
    return group


def _split(row: dict[str, Any]) -> tuple[Text, Text, Text]:
    """Prompt, chosen and rejected; conversations without `prompt` begin with it."""
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" in row:
        return row["prompt"], chosen, rejected
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise ValueError("chosen and rejected are no conversations, and there is no prompt")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared:
        raise ValueError("chosen and rejected share no prompt")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def scores_of(responses: Any, scores: Any) -> tuple[float, ...]:
    """The scores of a row's responses. Raises DataError unless both are lists of the same length, the scores finite numbers."""
    if not isinstance(responses, list) or not isinstance(scores, list) or len(responses) != len(scores):
        raise DataError("responses need a list of as many ranks or scores")
    if not all(isinstance(s, (int, float)) and not isinstance(s, bool) and math.isfinite(s) for s in scores):
        raise DataError(f"ranks and scores are finite numbers, {scores} given")
    return tuple(map(float, scores))


def require_text(text: Any) -> None:
    """Raise DataError for what is neither text nor a list of messages."""
    if not isinstance(text, str) and not (isinstance(text, list) and all(isinstance(m, Mapping) for m in text)):
        raise DataError(f"a prompt or an answer is text or a list of messages, {text!r} given")


def _spoken(answer: Text) -> bool:
    if isinstance(answer, str):
        return bool(answer.strip())
    return bool(answer) and all(m.get("content") or m.get("tool_calls") for m in answer)


def _grade(value: Any) -> int:
    if value is None:
        return -1
    if isinstance(value, str) and value.lower() in GRADES:
        return GRADES.index(value.lower())
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(GRADES):
        return value
    raise ValueError(f"grade is 0 to {len(GRADES) - 1} or one of {', '.join(GRADES)}, {value!r} given")


def _probability(value: Any) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1:
        return float(value)
    raise ValueError(f"probability is a number from 0 to 1, {value!r} given")


def as_messages(text: Text, role: str) -> list[dict[str, Any]]:
    """Messages as they are; text as one message of `role`."""
    return [{"role": role, "content": text}] if isinstance(text, str) else [dict(message) for message in text]


def tokenise(prompt: Text, answer: Text, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """Token ids of prompt and answer, and how many of them are the prompt's. The ids end with the answer's end token.

    Raises:
        DataError: a conversation that the chat template refuses, an answer that doesn't end with an assistant's message, or one
            without a token.
    """
    said = as_messages(answer, "assistant")
    if not said or said[-1].get("role") != "assistant":
        raise DataError("the answer doesn't end with a message of the assistant")
    if tokenizer.chat_template is None and isinstance(prompt, str) and isinstance(answer, str):
        head = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        first = [*head, *tokenizer.encode(prompt)]
        return [*first, *tokenizer.encode(answer), *([] if tokenizer.eos_id is None else [tokenizer.eos_id])], len(
            first
        )
    rendered = render([*as_messages(prompt, "user"), *said], tokenizer)
    spans = [span for span in rendered.spans if span.trained]
    if not spans:
        raise DataError("the answer has no token that the chat template trains on")
    return rendered.token_ids[: spans[-1].stop], spans[-1].start


def as_preference_shards(path: Path, tokenizer: Tokenizer, cache: Path, seed: int) -> Path:
    """Preference shards for `path`: shards of preferences already, a .jsonl file, or an artifact of `luban annotate`.

    A prompt and all its answers are of one split. Rows that can't be used are left out, counted, and said.

    Raises:
        DataError: nothing there, or no row that can be used.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist: --data.path takes a .jsonl file of preferences, or shards of them")
    if (path / MANIFEST).is_file() and read_manifest(path).kind == "preferences":
        open_artifact(path, "preferences")
        path = path / "preferences.jsonl"
    if path.is_dir():
        if (kind := read_manifest(path).kind) != "shards":
            raise DataError(f"{path} is a {kind}: --data.path takes a .jsonl file of preferences, or shards of them")
        manifest = open_artifact(path, "shards", verify=False)
        if manifest.config.get("groups") != GROUP_FORMAT:
            raise DataError(f"shards {path} hold no preferences: give a .jsonl file with prompt, chosen and rejected")
        return path
    out = cache / f"preferences-{data_sha256([file_sha256(path), tokenizer.content_hash, seed])[:12]}"
    if not (out / MANIFEST).is_file():
        say(f"packing {path} into {out}")
        pack_preferences(path, tokenizer, out, seed)
    return out


def pack_preferences(file: Path, tokenizer: Tokenizer, out: Path, seed: int = 0) -> None:
    """Write the preferences of a .jsonl file as shards."""
    groups, left = [], Counter[str]()
    example: dict[str, int] = {}
    for number, found in read_groups(file):
        if isinstance(found, str):
            left[found] += 1
            example.setdefault(found, number)
        else:
            groups.append((number, found))
    for why, times in left.items():
        warn(f"{file}: {times} rows are left out, since {why} (such as line {example[why]})")
    if not groups:
        raise DataError(f"{file} has no row that can be used" + (f": {next(iter(left))}" if left else ""))
    heldout = heldout_prompts([group.prompt for _, group in groups], seed)
    dtype = token_dtype(tokenizer.vocab_size)
    config = shards_config(tokenizer, dtype)
    with ArtifactWriter(out, kind="shards", config=config, parents=tokenizer_parents(tokenizer)) as art:
        copy_tokenizer(tokenizer, art.path / "tokenizer")
        for split in ("train", "heldout"):
            writer = GroupWriter(art.path, split, dtype)
            for number, group in groups:
                if (data_sha256(group.prompt) in heldout) == (split == "heldout"):
                    _write(writer, group, tokenizer, f"{file}:{number}")
            art.figures[split] = writer.close()
        art.figures["left_out"] = dict(left)


def shards_config(tokenizer: Tokenizer, dtype: np.dtype, groups: int = GROUP_FORMAT) -> dict[str, Any]:
    """The configuration of shards of preferences."""
    pad = tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id
    return {
        "dtype": dtype.str,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_hash": tokenizer.content_hash,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "pad_id": 0 if pad is None else pad,
        "groups": groups,
    }


def tokenizer_parents(tokenizer: Tokenizer) -> tuple[Parent, ...]:
    """The tokenizer as a parent, where it is an artifact."""
    path = tokenizer.path
    known = path and (path / MANIFEST).is_file() and read_manifest(path).kind == "tokenizer"
    return (as_parent("tokenizer", path),) if path and known else ()


def heldout_prompts(prompts: Sequence[Text], seed: int) -> set[str]:
    """Hashes of the prompts that are held out: the first of them by a hash that depends on the seed."""
    hashes = sorted({data_sha256(prompt) for prompt in prompts}, key=lambda each: data_sha256([seed, each]))
    return set(hashes[: int(len(hashes) * HELDOUT)])


def _write(writer: GroupWriter, group: Group, tokenizer: Tokenizer, where: str) -> None:
    order = sorted(range(len(group.answers)), key=lambda i: -group.ranks[i])  # best first
    texts, prompts = [], set()
    for i in order:
        try:
            ids, cut = tokenise(group.prompt, group.answers[i], tokenizer)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        texts.append((ids, cut))
        prompts.add(tuple(ids[:cut]))
    if len(prompts) > 1:
        raise DataError(f"{where}: the answers share no prompt: their prompts differ after the chat template")
    writer.add(
        [(ids, cut, group.ranks[i]) for (ids, cut), i in zip(texts, order, strict=True)],
        grade=group.grade,
        probability=group.probability,
    )
