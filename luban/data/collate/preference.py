"""Batches of preferences: a row holds all answers to one prompt, each with the prompt, as documents one after another.

B rows (groups), T tokens a row, K answers of the largest group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from luban.core.errors import DataError
from luban.core.log import warn
from luban.data.batch import Batch
from luban.data.groups import Groups
from luban.data.shards import Shards

MULTIPLE = 64  # of a row's length in tokens


@dataclass(frozen=True, kw_only=True)
class PreferenceBatch(Batch):
    """Answers by prompt. A step's loss is divided by the number of groups."""

    ends: np.ndarray  # (B, K) int64, slot of each answer's last token; 0 where there is no answer
    present: np.ndarray  # (B, K) bool
    ranks: np.ndarray  # (B, K) float32, the best first
    grades: np.ndarray  # (B,) int64, -1: none
    probabilities: np.ndarray  # (B,) float32
    reference: np.ndarray  # (B, K) float32, log-probability of each answer under the reference model; NaN: not computed
    mismatched_reference: np.ndarray  # (B,) float32, the same of the prompt with another prompt's answer; NaN: none

    @property
    def target_count(self) -> int:
        """Groups in the batch."""
        return int(self.present.any(-1).sum())


def require_answers(groups: Groups, owner: str, *, least: int, most: int | None) -> None:
    """Raise DataError where a prompt has fewer answers than `least` or more than `most`; says what would be right."""
    amounts = np.diff(groups.first)
    if int(amounts.min(initial=least)) < least:
        raise DataError(
            f"{owner} hold {int((amounts < least).sum())} single answers (completion and label), and answers to a prompt are "
            f"compared here: leave these rows out, or train on them by luban dpo … --objective.method.type kto"
        )
    if most is not None and groups.largest > most:
        raise DataError(
            f"{owner} hold rankings of up to {groups.largest} answers, and this loss takes pairs: make pairs of them by luban "
            f"data feedback FILE --use pairs, or train by --objective.method.type kto"
        )


class PreferenceRows:
    """A group a row.

    Groups with a text of more than `seq_len` tokens are left out and counted: an answer is never cut.

    Args:
        least, most: answers a group may have; DataError where one has fewer or more.
        mismatches: put behind the answers the prompt with the first answer of the next group, as document K of the row.

    Raises:
        DataError: shards without preferences, or none that is short enough.
    """

    def __init__(
        self, shards: Shards, seq_len: int, *, least: int = 1, most: int | None = None, mismatches: bool = False
    ):
        self.shards, self.groups = shards, Groups.open(shards)
        require_answers(self.groups, f"shards {shards.path}", least=least, most=most)
        sizes, amounts = np.diff(shards.offsets), np.diff(self.groups.first)
        owner = np.repeat(np.arange(self.groups.count), amounts)
        longest = np.zeros(self.groups.count, dtype=np.int64)
        np.maximum.at(longest, owner, sizes)
        self.kept = np.flatnonzero(longest <= seq_len)
        self.rows, self.answers = len(self.kept), self.groups.largest
        if dropped := self.groups.count - self.rows:
            warn(
                f"{dropped} of {self.groups.count} {shards.split} groups have a text of more than {seq_len} tokens and are "
                f"left out: raise train.seq_len to keep them"
            )
        if not self.rows:
            raise DataError(
                f"every {shards.split} text of {shards.path} has more than {seq_len} tokens: raise train.seq_len to "
                f"{int(longest.max(initial=0))}"
            )
        total = int(np.bincount(owner, weights=sizes)[self.kept].max())
        self.mismatches, self.longest = mismatches, seq_len
        self.length = -(-(total + seq_len * mismatches) // MULTIPLE) * MULTIPLE  # of every row

    def _texts(self, group: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(document of the row, token ids, loss mask) of each text of a group."""
        shards, first = self.shards, self.groups.first
        for k, document in enumerate(range(first[group], first[group + 1])):
            inside = slice(shards.offsets[document], shards.offsets[document + 1])
            yield k, shards.data[inside], shards.mask[inside]  # type: ignore[index]
        if self.mismatches:
            (prompt, _), (_, answer) = self._parts(group), self._parts((group + 1) % self.groups.count)
            ids = np.concatenate([prompt, answer])
            if len(ids) <= self.longest:
                yield self.answers, ids, np.arange(len(ids)) >= len(prompt)

    def _parts(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and first answer of a group, token ids."""
        document = self.groups.first[group]
        inside = slice(self.shards.offsets[document], self.shards.offsets[document + 1])
        ids, answer = self.shards.data[inside], np.asarray(self.shards.mask[inside], dtype=bool)  # type: ignore[index]
        return ids[~answer], ids[answer]

    def gather(self, rows: np.ndarray, epochs: np.ndarray | None = None) -> PreferenceBatch:
        """The batch of these rows; a negative row is a row of padding."""
        rows, groups = np.asarray(rows), self.groups
        shape, wide = (len(rows), self.length), (len(rows), self.answers)
        tokens = np.full(shape, self.shards.pad_id, dtype=np.int64)
        targets, mask = tokens.copy(), np.zeros(shape, dtype=bool)
        documents, positions = np.full(shape, -1, dtype=np.int32), np.zeros(shape, dtype=np.int32)
        ends, present = np.zeros(wide, dtype=np.int64), np.zeros(wide, dtype=bool)
        ranks, reference = np.zeros(wide, dtype=np.float32), np.full(wide, np.nan, dtype=np.float32)
        mismatched = np.full(len(rows), np.nan, dtype=np.float32)
        chosen = np.where(rows >= 0, self.kept[rows], -1)
        for b, group in enumerate(chosen.tolist()):
            at = 0
            for k, ids, answer in self._texts(group) if group >= 0 else ():
                end = at + len(ids)
                tokens[b, at:end], targets[b, at : end - 1] = ids, ids[1:]
                mask[b, at : end - 1], documents[b, at:end], positions[b, at:end] = answer[1:], k, np.arange(len(ids))
                at = end
                if k == self.answers:
                    mismatched[b] = np.nan if groups.mismatched is None else groups.mismatched[group]
                    continue
                document = groups.first[group] + k
                ends[b, k], present[b, k], ranks[b, k] = at - 1, True, groups.ranks[document]
                if groups.reference is not None:
                    reference[b, k] = groups.reference[document]
        return PreferenceBatch(
            tokens=tokens,
            targets=targets,
            loss_mask=mask,
            documents=documents,
            positions=positions,
            ends=ends,
            present=present,
            ranks=ranks,
            grades=np.where(chosen >= 0, groups.grades[chosen], -1).astype(np.int64),
            probabilities=np.where(chosen >= 0, groups.probabilities[chosen], 1).astype(np.float32),
            reference=reference,
            mismatched_reference=mismatched,
        )
