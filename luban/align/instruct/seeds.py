"""Seed tasks, and the rows that are made of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luban.core.errors import DataError
from luban.core.jsonl import read_rows


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One task with one instance of it."""

    instruction: str
    input: str = ""  # what the instruction is about, where it isn't in it
    output: str = ""
    classification: bool = False  # whether the output is one of a few labels

    def row(self) -> dict[str, Any]:
        """A row that `luban sft` takes: the conversation, with the parts it was made of."""
        asked = f"{self.instruction}\n\n{self.input}" if self.input else self.instruction
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": self.output}]
        return {"messages": messages, "instruction": self.instruction, "input": self.input, "output": self.output}


def read_seeds(file: Path) -> list[Instruction]:
    """Seed tasks of a .jsonl file: `instruction` with `instances` (input, output) and `is_classification`, as Self-Instruct
    publishes them, or with `input` and `output`.

    Raises DataError for a row without an instruction or an output, and for fewer than 3 rows.
    """
    found = []
    for number, row in read_rows(file):
        instances = row.get("instances") or [{"input": row.get("input", ""), "output": row.get("output")}]
        first = instances[0] if isinstance(instances, list) and isinstance(instances[0], dict) else {}
        if not isinstance(row.get("instruction"), str) or not isinstance(first.get("output"), str):
            raise DataError(f"{file}:{number}: a seed needs an instruction and instances with an output")
        found.append(
            Instruction(
                instruction=row["instruction"].strip(),
                input=str(first.get("input") or "").strip(),
                output=first["output"].strip(),
                classification=bool(row.get("is_classification", False)),
            )
        )
    if len(found) < 3:
        raise DataError(f"{file} holds {len(found)} seed tasks: at least 3 are needed")
    return found
