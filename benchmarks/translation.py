"""Translation scored by BLEU: an encoder–decoder trained on the texts of gettext catalogues.

    pip download --no-deps django==5.2.19 wagtail==8.0.1 -d wheels
    python benchmarks/translation.py --wheels wheels --language fr                # one CPU core, half an hour

Wheels that carry .po files give pairs of an English text and its translation: one line each, without formatting codes other than
names in braces or %(…)s, at most 100 characters, fuzzy ones left out, each English text once. A tenth by the hash of its words is held out.
The shipped recipe transformer_translation_cpu trains on the rest; the held-out pairs are translated by `luban eval RUN translation`
and scored by sacrebleu with a 95% bootstrap interval, beside the copy of the source.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from kept import require_settings

from luban.cli.main import main as luban_command
from luban.core.metrics.translation import corpus_score

LONGEST = 100  # characters of a text
MARKUP = re.compile(r"<[^>]+>|&\w+;|\\")


def entries(text: str) -> Iterator[tuple[str, str]]:
    """(msgid, msgstr) of a catalogue; fuzzy, obsolete and plural ones are left out."""
    for block in re.split(r"\n\s*\n", text):
        lines = [line for line in block.splitlines() if not line.startswith("#~")]
        if any(line.startswith("#,") and "fuzzy" in line for line in lines):
            continue
        fields: dict[str, str] = {}
        name = ""
        for line in lines:
            head, _, rest = line.partition(" ")
            if head in ("msgid", "msgstr", "msgctxt", "msgid_plural") or head.startswith("msgstr["):
                name, line = head, rest
            if line.startswith('"') and name:
                fields[name] = fields.get(name, "") + ast.literal_eval(line)
        if "msgid_plural" not in fields and fields.get("msgid") and fields.get("msgstr"):
            yield fields["msgid"], fields["msgstr"]


def pairs_of(wheels: Path, language: str) -> list[tuple[str, str]]:
    """All pairs of the wheels, in the order of the English texts."""
    found: dict[str, str] = {}
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name in sorted(archive.namelist()):
                if f"/locale/{language}/LC_MESSAGES/" not in name or not name.endswith(".po"):
                    continue
                for source, target in entries(archive.read(name).decode("utf-8")):
                    source, target = source.strip(), target.strip()
                    plain = not any("\n" in t or "\t" in t or MARKUP.search(t) for t in (source, target))
                    if plain and max(len(source), len(target)) <= LONGEST:
                        found.setdefault(source, target)
    return sorted(found.items())


def held_out(source: str) -> bool:
    """By the hash of the text without case and punctuation, so that texts that differ in these alone are on one side."""
    words = re.sub(r"[^\w{}%]+", " ", source.lower()).strip()
    return int(hashlib.sha256(words.encode()).hexdigest(), 16) % 10 == 0


def run(*words: object) -> None:
    """A command of Luban's. Raises SystemExit where it fails."""
    if luban_command([str(word) for word in words]):
        raise SystemExit(f"luban {words[0]} failed")


def main() -> None:
    """Make the data, train, translate, score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, required=True)
    parser.add_argument("--language", default="fr")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    out = given.out or Path(tempfile.mkdtemp(prefix="translation-"))
    wheels = sorted(path.name for path in given.wheels.glob("*.whl"))
    require_settings(out, language=given.language, wheels=wheels)
    pairs = pairs_of(given.wheels, given.language)
    train, test = ([pair for pair in pairs if held_out(pair[0]) == held] for held in (False, True))
    print(f"{len(train):,} pairs to train on, {len(test):,} held out")
    with (out / "train.jsonl").open("w", encoding="utf-8") as file:
        for source, target in train:
            said = (("user", source), ("assistant", target))
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in said]}) + "\n")
    (out / "test.tsv").write_text("".join(f"{source}\t{target}\n" for source, target in test), encoding="utf-8")
    if not (out / "shards").exists():
        run("corpus", "build", out / "train.jsonl", "--out", out / "corpus", "--heldout", "0.05")
        run("tokenizer", "train", out / "corpus", "--out", out / "tokenizer", "--vocab-size", "2000")
        run("data", "pack", out / "corpus", "--tokenizer", out / "tokenizer", "--out", out / "shards")
    words = ("--train.device", given.device, "--train.steps", given.steps)
    run("pretrain", "transformer_translation_cpu", "--data.path", out / "shards", "--out", out / "run", *words)
    run("eval", out / "run", "translation", "--data", out / "test.tsv", "--out", out / "eval")
    results = json.loads((out / "eval" / "results.json").read_text())
    for name in ("bleu", "chrf"):
        copied, interval, _ = corpus_score(name, [s for s, _ in test], [[t] for _, t in test], given.language)
        ours = results[name]
        low, high = ours["interval"]
        print(
            f"{name}: {ours['value']:.1f} ({low:.1f} to {high:.1f}), the copied source {copied:.1f} ({interval[0]:.1f} to {interval[1]:.1f})"
        )


if __name__ == "__main__":
    main()
