"""`luban scaling emergence`: a ladder of small models, and what of their abilities grows with size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luban.cli.scaling_ladder import show_rung, split_options
from luban.core.arguments import parse_recipe, run_directory
from luban.core.errors import UsageError
from luban.core.log import print_result, say
from luban.core.units import count

ABOUT = """Train a recipe at growing widths on text that is made for it, evaluate every model on tasks that stand in no document, and draw
what grows with size: the gain of examples in the context, the gain of writing steps before an answer, and one ability measured by a
threshold (whole answers) and smoothly (likelihoods of their tokens). Everything is in --out: text, models, task files,
evaluations, emergence.json, emergence.html. The same command resumes.

--widths N …      of the ladder, multiples of 8 (16 32 64)
--ratio R         tokens a parameter, without embeddings (400)
--documents N     of the text (20000)
--items N         of each task (300)"""
USAGE = "RECIPE --out DIR [--widths N …] [--ratio R] [--documents N] [--items N] [--json] [--section.field value …]"
EXAMPLES = """
luban scaling emergence luban_emergence_gpu --out runs/emergence --widths 32 64 128 256 --documents 200000
luban scaling emergence luban_emergence_cpu --out runs/small
luban eval runs/small/width-64 runs/small/tasks/addition.toml --out runs/addition     # the tasks are ordinary ones
"""
OWN = {"widths": [16, 32, 64], "ratio": 400.0, "documents": 20_000, "items": 300, "json": False}


def run(argv: Sequence[str]) -> int:
    """Make text, train, evaluate, draw."""
    from luban.cli.training import RECIPES
    from luban.train.recipe import Recipe

    own, rest = split_options(argv, OWN)
    if own["documents"] < 100 or own["items"] < 1:
        raise UsageError(
            f"--documents is at least 100 and --items at least 1, {own['documents']} and {own['items']} given"
        )
    out = run_directory(rest)
    if out is not None:
        rest += ["--data.path", str(out / "shards")]
    call = parse_recipe(
        Recipe, rest, verb="scaling emergence", about=ABOUT, examples=EXAMPLES, shipped=RECIPES, usage=USAGE
    )
    from luban.core.artifact import atomic_write
    from luban.evals.emergence import growth, sharpness, write_tasks
    from luban.evals.run import EvalOptions, evaluate
    from luban.report.emergence import emergence_page
    from luban.train.ladder import climb, require_width

    seed = call.recipe.train.seed
    for width in own["widths"]:
        require_width(width)
    _make_text(call.out, own["documents"], seed)
    rungs = climb(call.recipe, call.out, sorted(own["widths"]), own["ratio"], show_rung)
    tasks = write_tasks(call.out / "tasks", own["items"], seed)
    results = [
        evaluate(rung.path, tasks, call.out / f"evaluation-{rung.width}", EvalOptions()).results for rung in rungs
    ]
    found, sizes = growth(results), [rung.parameters for rung in rungs]
    sharp = {name: sharpness(found[name]) for name in ("whole answer right", "likelihood of a token")}
    table = {"widths": [rung.width for rung in rungs], "parameters": sizes, "loss": [rung.loss for rung in rungs]}
    (call.out / "emergence.json").write_text(json.dumps({**table, **found, "sharpness": sharp}, indent=1) + "\n")
    atomic_write(call.out / "emergence.html", emergence_page(sizes, found, sharp))
    print_result(json.dumps({**table, **found, "sharpness": sharp}) if own["json"] else _lines(sizes, found, sharp))
    if not own["json"]:
        print_result(call.out / "emergence.html")
    return 0


def _make_text(out: Path, documents: int, seed: int) -> None:
    """Corpus, tokenizer of bytes, and shards in `out`; what is there stays. Raises UsageError where it is other text."""
    from luban.core.artifact import MANIFEST, as_parent, write_json
    from luban.core.jsonl import write_rows
    from luban.corpus.build import build_corpus
    from luban.corpus.reader import read_corpus
    from luban.corpus.split import SPLITS
    from luban.data.pack import pack
    from luban.evals.emergence import documents as made
    from luban.tokenizer.train import train_tokenizer

    out.mkdir(parents=True, exist_ok=True)
    made_of, wanted = out / "text.json", {"documents": documents, "seed": seed}
    if made_of.is_file() and (there := json.loads(made_of.read_text())) != wanted:
        raise UsageError(
            f"{out} holds text of {there['documents']} documents with seed {there['seed']}, and {documents} with seed {seed} are asked "
            "for: give another --out, or the same --documents and --train.seed"
        )
    write_json(made_of, wanted)
    if (out / "shards" / MANIFEST).is_file():
        return
    write_rows(out / "documents.jsonl", list(made(documents, seed)))
    if not (out / "corpus" / MANIFEST).is_file():
        build_corpus([str(out / "documents.jsonl")], out / "corpus", steps=(), heldout=0.02, seed=seed)
    parents = (as_parent("corpus", out / "corpus"),)
    if not (out / "tokenizer" / MANIFEST).is_file():
        texts = (document.text for document in read_corpus(out / "corpus"))
        train_tokenizer(texts, out / "tokenizer", vocab_size=272, parents=parents)
    pack(
        {split: read_corpus(out / "corpus", split) for split in SPLITS},
        out / "tokenizer",
        out / "shards",
        parents=parents,
    )
    say(f"text of {documents} documents: {out / 'shards'}")


def _lines(sizes: Sequence[int], found: dict[str, Any], sharp: dict[str, float]) -> str:
    lines = [f"{'parameters':24}{''.join(f'{count(n):>9}' for n in sizes)}"]
    lines += [f"{name:24}{''.join(f'{value:9.3f}' for value in values)}" for name, values in found.items()]
    return "\n".join([*lines, *(f"largest step of {name}: {value:.0%} of its range" for name, value in sharp.items())])
