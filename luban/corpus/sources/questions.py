"""`python:questions`: questions and answers made from the standard library's docstrings.

Every object's questions are in the same split, the one its docstring has in `python:stdlib`. Which module has
an object is not asked where the whole module is held out: nothing that is trained on could tell.
`meta` holds the object, its module, the task, and `answer_key`: what a right answer must contain.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from luban.core.seeding import derive
from luban.corpus.document import Document, conversation_text
from luban.corpus.sources import SourceContext
from luban.corpus.split import HELDOUT, TRAIN
from luban.corpus.stdlib.library import Library, scan_library
from luban.corpus.stdlib.scan import Definition
from luban.corpus.stdlib.summary import summary

WHAT = {
    "module": ("What is the module {name} for?", "Describe the module {name}.", "What is in the module {name}?"),
    "class": ("What is {name}?", "What is the class {name} for?", "Describe {name} in one sentence."),
    "function": ("What does {name} do?", "What is the function {name} for?", "Explain {name} in one sentence."),
    "method": ("What does {name} do?", "What is the method {name} for?", "Explain {name} in one sentence."),
}
SIGNATURE = ("What is the signature of {name}?", "How is {name} called?", "Which arguments does {name} take?")
SUMMARY = (
    "Which {kind} of {module} fits this description? {summary}",
    "Name the {kind} in {module} for this: {summary}",
)
WHICH_MODULE = ("Which module has {short}?", "In which module is the {kind} {short}?", "Where do I find {short}?")
WHICH_MODULE_HINTED = (
    "Which module has {short}, the {kind} described as: {summary}",
    "In which module is the {kind} {short}? It is described as: {summary}",
)
MOST_OF_A_MODULE = 18  # held-out questions with the same right module, so that no constant answer scores well
LONGEST_SIGNATURE = 100  # characters; longer ones make no good answer


def read(name: str, context: SourceContext) -> Iterator[Document]:
    """One conversation a question, in scan order of the objects."""
    library = scan_library()
    heldout = library.heldout_units(context.heldout, context.seed)
    yield from documents(library, heldout, context.label)


def documents(library: Library, heldout: frozenset[str], label: str) -> Iterator[Document]:
    """The questions about every public object that has a summary."""
    objects = [(d, text) for d in library.definitions if d.public and (text := summary(d.doc))]
    homes = _homes(library)
    alike = Counter((d.short, text) for d, text in objects)
    taught = {d.module for d in library.definitions if d.public and d.unit not in heldout}
    taught |= {module.name for module in library.modules if module.unit not in heldout}
    seen: dict[str, set[str]] = defaultdict(set)
    asked: Counter[str] = Counter()  # held-out which_module questions of each module
    for definition, text in objects:
        split = HELDOUT if definition.unit in heldout else TRAIN
        numbers: Counter[str] = Counter()
        for task, question, answer, key in _questions(definition, text, homes, alike):
            if question in seen[task] or (task == "which_module" and definition.module not in taught):
                continue  # two objects with the same description: the first has it
            if split == HELDOUT and task == "which_module":
                asked[definition.module] += 1
                if asked[definition.module] > MOST_OF_A_MODULE:
                    continue
            seen[task].add(question)
            numbers[task] += 1
            name = definition.name if numbers[task] == 1 else f"{definition.name}#{numbers[task]}"
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            meta = {"object": definition.name, "module": definition.module, "task": task, "answer_key": key}
            yield Document(
                id=f"{label}/{task}/{name}",
                text=conversation_text(messages),
                source=label,
                lang="en",
                messages=messages,
                meta=meta,
                split=split,
            )


def _homes(library: Library) -> dict[str, set[str]]:
    """Short name of a top-level definition → the public modules that have one, documented or not."""
    found: dict[str, set[str]] = defaultdict(set)
    for module in library.modules:
        for segment in module.segments:
            found[segment.unit.partition(":")[2]].add(module.name)
    for definition in library.compiled:
        found[definition.short.split(".")[0]].add(definition.module)
    return found


def _questions(
    d: Definition, text: str, homes: dict[str, set[str]], alike: Counter[tuple[str, str]]
) -> Iterator[tuple[str, str, str, str]]:
    """(task, question, answer, answer key) of one object."""
    fields = {"name": d.name, "short": d.short, "kind": d.kind, "module": d.module, "summary": text}
    yield "what", _phrase(WHAT[d.kind], d, fields), text, text
    if d.kind == "module":
        return
    if 2 < len(d.signature) <= LONGEST_SIGNATURE and _chosen(d, "signature", 2):
        answer = d.name + d.signature
        yield "signature", _phrase(SIGNATURE, d, fields), answer, d.signature
    if d.module == "builtins":
        return
    if d.kind == "method":
        if _chosen(d, "summary", 6):
            yield "summary", _phrase(SUMMARY, d, fields), d.name, d.name
        return
    if _chosen(d, "summary", 3):
        yield "summary", _phrase(SUMMARY, d, fields), d.name, d.name
    answer = f"It is in the module {d.module}."
    if homes[d.short] <= {d.module}:  # no other module has one of this name
        yield "which_module", _phrase(WHICH_MODULE, d, fields), answer, d.module
    if alike[d.short, text] == 1:
        yield "which_module", _phrase(WHICH_MODULE_HINTED, d, fields), answer, d.module


def _phrase(wordings: Sequence[str], definition: Definition, fields: dict[str, str]) -> str:
    """One of the wordings, always the same one for the same object."""
    return wordings[derive(0, definition.name, wordings[0]) % len(wordings)].format(**fields)


def _chosen(definition: Definition, task: str, one_in: int) -> bool:
    """True if this object is one of those (one in `one_in`) that get a question of this task."""
    return derive(0, definition.name, task) % one_in == 0
