"""Which generated tasks are kept. Every reason is counted."""

from __future__ import annotations

import re
from collections import Counter

from luban.align.instruct.seeds import Instruction
from luban.core.metrics.rouge import RougePool

SIMILAR = 0.7  # ROUGE-L with an instruction of the pool from which a new one is dropped (Wang et al. 2023)
FEWEST, MOST = 3, 150  # words of an instruction
UNSEEN = (
    "image",
    "images",
    "graph",
    "graphs",
    "picture",
    "pictures",
    "file",
    "files",
    "map",
    "maps",
    "draw",
    "plot",
    "video",
    "audio",
    "music",
    "diagram",
)  # what text can't show


class InstructionFilter:
    """Keeps a pool of instructions apart from each other.

    Args:
        seeds: what is in the pool from the start.
    """

    def __init__(self, seeds: list[Instruction]):
        self.pool = RougePool()
        self.dropped: Counter[str] = Counter()
        self._instances: set[tuple[str, str]] = set()
        for seed in seeds:
            self.pool.add(seed.instruction)

    def form(self, instruction: str) -> str:
        """Why an instruction is dropped for its form; empty: it isn't."""
        words = instruction.split()
        if not FEWEST < len(words) <= MOST:
            return "length"
        if any(re.search(rf"\b{word}\b", instruction, re.IGNORECASE) for word in UNSEEN):
            return "not text"
        if instruction.lower().startswith("write a program"):
            return "program"
        if not instruction[0].isascii() or not (instruction[0].isalnum() or instruction[0] in "\"'("):
            return "beginning"
        return ""

    def admit(self, instruction: str) -> float | None:
        """Put an instruction into the pool; the ROUGE-L with the nearest one of it. None: dropped, and counted."""
        if reason := self.form(instruction):
            self.dropped[reason] += 1
            return None
        nearest, _ = self.pool.nearest(instruction)
        if nearest >= SIMILAR:
            self.dropped["similar"] += 1
            return None
        self.pool.add(instruction)
        return nearest

    def instance(self, task: Instruction) -> bool:
        """Whether an instance is kept: its output isn't its input, and the same instruction and input aren't there yet."""
        key = (task.instruction, task.input)
        reason = "output is input" if task.output == task.input else "instance" if key in self._instances else ""
        if reason:
            self.dropped[reason] += 1
            return False
        self._instances.add(key)
        return True
