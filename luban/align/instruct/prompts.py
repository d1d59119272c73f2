"""What a model is asked for, and how its answers are read.

Every prompt is a list that the model continues, so that a base model can do it as well; a chat model gets it as one message.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from luban.align.instruct.seeds import Instruction

NO_INPUT = "<noinput>"
RULES = """Below is a list of {count} different tasks for a general assistant that works with text. Each task has an instruction of one or two sentences, an input where one is needed ({none} otherwise), and the ideal output. The tasks differ in verbs, topics and form: questions and commands, classification, rewriting, brainstorming, open-ended writing and more. An assistant without eyes, ears or hands can do each of them.

"""
BORDER = "###"
FIELD = re.compile(r"^\s*(?:\d+\.\s*)?(Instruction|Input|Output)\s*:", re.MULTILINE | re.IGNORECASE)
NUMBERED = re.compile(r"^\s*(?:Task\s+)?(\d+)\s*[.:]\s*(.+?)\s*$", re.MULTILINE)


def alpaca_prompt(demos: Sequence[Instruction], count: int) -> str:
    """Alpaca's way: whole tasks of `count` in one list, of which the demonstrations are the first."""
    parts = [RULES.format(count=count, none=NO_INPUT)]
    for number, demo in enumerate(demos, 1):
        parts.append(
            f"{BORDER}\n{number}. Instruction: {demo.instruction}\n{number}. Input: {demo.input or NO_INPUT}\n"
            f"{number}. Output: {demo.output}\n"
        )
    return "".join([*parts, f"{BORDER}\n{len(demos) + 1}. Instruction:"])


def read_alpaca(text: str, *, whole: bool) -> tuple[list[Instruction], int]:
    """(tasks of a continued list, how many could not be read).

    Args:
        whole: the text ended by itself; else its last task was cut off and is dropped.
    """
    blocks = [block for block in ("1. Instruction:" + text).split(BORDER) if block.strip()]
    dropped = 0
    if not whole and blocks:
        blocks.pop()
        dropped += 1
    found = []
    for block in blocks:
        pieces = FIELD.split(block)
        fields = {name.lower(): value.strip() for name, value in zip(pieces[1::2], pieces[2::2], strict=False)}
        if not fields.get("instruction") or not fields.get("output"):
            dropped += 1
            continue
        given = fields.get("input", "")
        given = "" if given.lower().strip("<>. ") in ("", "noinput", "none", "n/a") else given
        found.append(Instruction(instruction=fields["instruction"], input=given, output=fields["output"]))
    return found, dropped


def instructions_prompt(demos: Sequence[str], more: int) -> str:
    """Self-Instruct's first step: `more` instructions after the demonstrations."""
    listed = "".join(f"Task {number}: {demo}\n" for number, demo in enumerate(demos, 1))
    return f"Come up with a series of {len(demos) + more} different tasks:\n{listed}Task {len(demos) + 1}:"


def read_instructions(text: str, first: int, more: int, *, whole: bool) -> list[str]:
    """The instructions of a continued list, the last one left out where the text was cut off."""
    found = [match[2] for match in NUMBERED.finditer(f"Task {first}:{text}")]
    return (found if whole else found[:-1])[:more]


def classification_prompt(demos: Sequence[Instruction], instruction: str) -> str:
    """Self-Instruct's second step: is the output one of a few labels?"""
    listed = "".join(f"Task: {d.instruction}\nClassification: {'Yes' if d.classification else 'No'}\n\n" for d in demos)
    return (
        f"Can the output of a task be only one of a few labels? Then it is a classification task.\n\n{listed}"
        f"Task: {instruction}\nClassification:"
    )


def instance_prompt(demos: Sequence[Instruction], instruction: str, *, classification: bool) -> str:
    """Self-Instruct's third step: an instance. Of a classification the label comes first, so that labels don't all turn out
    alike; of other tasks the input."""
    if classification:
        listed = "".join(
            f"Task: {d.instruction}\nLabel: {d.output}\nInput: {d.input or NO_INPUT}\n\n"
            for d in demos
            if d.classification
        )
        return f"Give an input for a label of each classification task.\n\n{listed}Task: {instruction}\nLabel:"
    listed = "".join(
        f"Task: {d.instruction}\nInput: {d.input or NO_INPUT}\nOutput: {d.output}\n\n"
        for d in demos
        if not d.classification
    )
    return f"Give an example of each task: an input where one is needed ({NO_INPUT} otherwise), and the output.\n\n{listed}Task: {instruction}\nInput:"


def read_instance(text: str, instruction: str, *, classification: bool) -> Instruction | None:
    """The instance that a model has written; None where its second part is missing or the output is empty."""
    text = text.split("\nTask:")[0]
    first, found, second = text.partition("\nInput:" if classification else "\nOutput:")
    given, output = (second, first) if classification else (first, second)
    given, output = given.strip(), output.strip()
    if not found or not output:
        return None
    given = "" if given.lower().strip("<>. ") in ("", "noinput", "none", "n/a") else given
    return Instruction(instruction=instruction, input=given, output=output, classification=classification)
