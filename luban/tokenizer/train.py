"""Learn a vocabulary from a stream of texts and keep it as an artifact."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from importlib import resources
from pathlib import Path

from luban.core.artifact import ArtifactWriter, Parent
from luban.core.errors import DataError
from luban.core.log import warn
from luban.tokenizer.algorithms import ALGORITHMS
from luban.tokenizer.cutting import DEFAULT, Cutting
from luban.tokenizer.settings import Settings, write_settings
from luban.tokenizer.special import BOS, EOS, PAD, RESERVED, special_tokens
from luban.tokenizer.tokenizer import FILE, Tokenizer, load_tokenizer

# The `tokenizers` library counts pairs in 32 signed bits, and there are fewer pairs than bytes. Past this a
# frequent pair's count turns negative, and the vocabulary is silently bad.
MOST_BYTES = 2**31 - 1


def train_tokenizer(
    texts: Iterable[str],
    out: str | Path,
    *,
    algorithm: str = "bpe",
    vocab_size: int = 4096,
    cut: Cutting = DEFAULT,
    reserved: int = len(RESERVED),
    chat_template: str | None = None,
    parents: tuple[Parent, ...] = (),
) -> Tokenizer:
    """Learn `vocab_size` tokens from `texts`, which are read once and not kept, and write them to `out`.

    Args:
        texts: documents' texts; only the algorithm's word counts stay in memory.
        algorithm: a name in `ALGORITHMS`.
        vocab_size: ids in all, special tokens counted.
        cut: what is done with digits and runs of white space.
        reserved: special tokens kept for later, 9 or more.
        chat_template: Jinja source; by default Luban's own, which has the roles system, user and assistant.
        parents: the corpus the texts come from.

    Raises:
        ConfigError: an unknown algorithm, or a vocabulary too small for its fixed entries.
        DataError: the texts hold no character.
    """
    learn, special = ALGORITHMS[algorithm], special_tokens(reserved)
    read = _Counted(texts)
    config = {"algorithm": algorithm, "vocab_size": vocab_size, "special": list(special), **asdict(cut)}
    with ArtifactWriter(out, kind="tokenizer", config=config, parents=parents) as art:
        model = learn(read, vocab_size, special, cut)
        if not read.bytes:
            raise DataError("a tokenizer cannot be trained on nothing: the corpus holds no text")
        if read.cut:
            warn(
                f"the tokenizer is learned from the first {read.documents} texts: more than {MOST_BYTES} bytes would "
                f"overflow the library's counts"
            )
        template = default_template() if chat_template is None else chat_template
        settings = Settings(bos_token=BOS, eos_token=EOS, pad_token=PAD, chat_template=template)
        made = Tokenizer(model, settings)
        if made.vocab_size < vocab_size:
            warn(
                f"the texts only yield a vocabulary of {made.vocab_size}, not {vocab_size}: they are too small or too alike"
            )
        (art.path / FILE).write_text(made.to_json(), encoding="utf-8")
        write_settings(art.path, settings, [t for t in special if t not in (BOS, EOS, PAD)])
        art.figures.update(vocab_size=made.vocab_size, documents=read.documents, bytes=read.bytes)
    return load_tokenizer(out)


def default_template() -> str:
    """The chat template of tokenizers that Luban trains."""
    return resources.files("luban.tokenizer").joinpath("chat_template.jinja").read_text(encoding="utf-8")


class _Counted:
    """Passes texts on and counts them, up to MOST_BYTES."""

    def __init__(self, texts: Iterable[str]):
        self.texts, self.documents, self.bytes, self.cut = texts, 0, 0, False

    def __iter__(self):
        for text in self.texts:
            size = len(text.encode("utf-8", "replace"))
            if self.bytes + size > MOST_BYTES:
                self.cut = True
                return
            self.documents += 1
            self.bytes += size
            yield text
