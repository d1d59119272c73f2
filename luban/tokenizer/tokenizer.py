"""A vocabulary in use: text ⇄ token ids, special tokens, chat template, identity."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import tokenizers

from luban.core.artifact import MANIFEST, open_artifact, read_manifest
from luban.core.errors import ArtifactError, DataError
from luban.core.hashing import data_sha256
from luban.core.whole_directory import incomplete_path
from luban.tokenizer.exact import ByteFallbackDecoder, exact_encoder, require_ids
from luban.tokenizer.pieces import Pieces
from luban.tokenizer.settings import Settings, read_settings, write_settings
from luban.tokenizer.special import END_OF_TURN

FILE = "tokenizer.json"


class Tokenizer:
    """Text ⇄ token ids. Ordinary text never yields a special token, even where it spells one.

    Args:
        model: the vocabulary, as the `tokenizers` library holds it.
        settings: which token begins, ends and pads, and the chat template.
        path: the directory it came from.
        content_hash: its identity, compared along a model's life; by default computed from vocabulary and template.
    """

    def __init__(
        self,
        model: tokenizers.Tokenizer,
        settings: Settings,
        *,
        path: Path | None = None,
        content_hash: str | None = None,
    ):
        self._model = model
        self._model.encode_special_tokens = True  # text that spells a special token stays text
        self._model.no_padding()
        self._model.no_truncation()
        self._encoder, self._rules = exact_encoder(self._model)
        self._byte_fallback = ByteFallbackDecoder.of(self._model)
        self.settings = settings
        self.path = path
        self.chat_template = settings.chat_template
        added = self._model.get_added_tokens_decoder()
        self.special: dict[str, int] = {token.content: i for i, token in sorted(added.items()) if token.special}
        self.bos_id = self._id_of(settings.bos_token)
        self.eos_id = self._id_of(settings.eos_token)
        self.pad_id = self._id_of(settings.pad_token)
        ends = [self.eos_id, *settings.stop_ids, *(self.special.get(name) for name in END_OF_TURN)]
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(i for i in ends if i is not None))
        self.content_hash: str | None = content_hash or data_sha256([self._model.to_str(), self.chat_template])

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self._model.token_to_id(token)

    @cached_property
    def vocab_size(self) -> int:
        """Number of ids, special tokens counted; every id is below it."""
        return max(self._model.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids of `text`, with the begin and end tokens where asked for.

        Lone surrogates, which no UTF-8 text has, become U+FFFD.

        Raises:
            DataError: `bos` or `eos` is asked of a tokenizer that has none.
        """
        ids = self._encoder.encode(self._prepared(text), add_special_tokens=False).ids
        head = [self._require(self.bos_id, "begin")] if bos else []
        tail = [self._require(self.eos_id, "end")] if eos else []
        return [*head, *ids, *tail]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, in parallel; equal to `encode` of each."""
        found = self._encoder.encode_batch_fast([self._prepared(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in found]

    @cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """Ids that the vocabulary's own post-processor puts before and behind every text, such as BERT's [CLS] and [SEP]."""
        inner = self._encoder.encode("a", add_special_tokens=False).ids
        ids = self._encoder.encode("a", add_special_tokens=True).ids
        place = next((i for i in range(len(ids)) if ids[i : i + len(inner)] == inner), len(ids))
        return ids[:place], ids[place + len(inner) :]

    def pair(self, first: Sequence[int], second: Sequence[int]) -> tuple[list[int], list[int]]:
        """Ids of two texts as the vocabulary's own post-processor joins them, such as BERT's [CLS] first [SEP] second [SEP],
        and the segment of each id.

        Raises:
            DataError: a vocabulary that doesn't say how texts are joined.
        """
        (head, between, tail), (head_of, first_of, between_of, second_of, tail_of) = self._pair_frame
        ids = [*head, *first, *between, *second, *tail]
        segments = [*head_of, *[first_of] * len(first), *between_of, *[second_of] * len(second), *tail_of]
        return ids, segments

    @cached_property
    def _pair_frame(
        self,
    ) -> tuple[tuple[list[int], list[int], list[int]], tuple[list[int], int, list[int], int, list[int]]]:
        """Ids before, between and behind two texts; and the segments of these and of the texts."""
        inner = self._encoder.encode("a", add_special_tokens=False).ids
        found = self._encoder.encode("a", "a", add_special_tokens=True)
        ids, of, width = found.ids, found.type_ids, len(inner)
        one, two = [i for i in range(len(ids)) if ids[i : i + width] == inner][:2]
        if len(ids) == 2 * width:
            raise DataError(f"tokenizer {self.path or ''} doesn't say how two texts are joined, as BERT's do")
        between, tail = slice(one + width, two), slice(two + width, None)
        return (ids[:one], ids[between], ids[tail]), (of[:one], of[one], of[between], of[two], of[tail])

    def _prepared(self, text: str) -> str:
        text = without_surrogates(text)
        return text if self._rules is None else self._rules(text)

    def _require(self, token: int | None, what: str) -> int:
        if token is None:
            raise DataError(f"tokenizer {self.path or ''} has no {what}-of-text token")
        return token

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD, and ids outside the vocabulary give no text.

        Raises:
            DataError: something that cannot be a token id.
        """
        ids = require_ids(ids, self.vocab_size)
        if self._byte_fallback is not None:
            return self._byte_fallback.decode(ids, skip_special)
        return self._model.decode(ids, skip_special_tokens=skip_special)

    def token(self, index: int) -> str | None:
        """The vocabulary's own spelling of one id."""
        return self._model.id_to_token(index)

    def token_bytes(self, index: int) -> bytes:
        """The bytes of one id in the middle of a text; those of a text's ids, one after another, are the text's."""
        return self._pieces(index)

    @cached_property
    def _pieces(self) -> Pieces:
        return Pieces(self._model)

    def encode_marked(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character ranges of a rendered template, in which special tokens ARE recognised.

        Only `luban.tokenizer.chat` calls this, on text whose special tokens all come from the template.
        """
        return self._aligned(self._marked, text, self._special_pattern)

    def encode_plain(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character ranges of ordinary text, in which no special token is recognised."""
        return self._aligned(self._encoder, text, None)

    def _aligned(
        self, encoder: tokenizers.Tokenizer, text: str, kept: re.Pattern[str] | None
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character ranges; what matches `kept` is not normalised."""
        if self._rules is None:
            found = encoder.encode(text, add_special_tokens=False)
            return found.ids, found.offsets
        pieces, ranges, position = [], [], 0
        spans = [match.span() for match in kept.finditer(text)] if kept else []
        for start, stop in [*spans, (len(text), len(text))]:
            piece, places = self._rules.aligned(text[position:start])
            pieces += [piece, text[start:stop]]
            ranges += [(a + position, b + position) for a, b in places]
            ranges += [(i, i + 1) for i in range(start, stop)]
            position = stop
        found = encoder.encode("".join(pieces), add_special_tokens=False)
        ranges.append((len(text), len(text)))
        offsets = [(ranges[a][0], ranges[b - 1][1] if b > a else ranges[a][0]) for a, b in found.offsets]
        return found.ids, offsets

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.special, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @cached_property
    def _marked(self) -> tokenizers.Tokenizer:
        twin = tokenizers.Tokenizer.from_str(self._encoder.to_str())
        twin.encode_special_tokens = False
        return twin

    def with_template(self, source: str) -> Tokenizer:
        """The same vocabulary with another chat template, which makes it another tokenizer."""
        return Tokenizer(self._model, replace(self.settings, chat_template=source))

    def same_vocabulary(self, other: Tokenizer) -> bool:
        """True if both give every text the same ids."""
        return self._model.to_str() == other._model.to_str()

    def to_json(self) -> str:
        """The vocabulary as a `tokenizer.json`."""
        return self._model.to_str(pretty=True)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and its settings into `folder`, as `transformers.AutoTokenizer` reads them too."""
        (folder / FILE).write_text(self.to_json(), encoding="utf-8")
        roles = {self.settings.bos_token, self.settings.eos_token, self.settings.pad_token, self.settings.unk_token}
        write_settings(folder, self.settings, [token for token in self.special if token not in roles])


def without_surrogates(text: str) -> str:
    """`text` with lone surrogates, which UTF-8 cannot hold, as U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer from a Luban tokenizer, from a run or other artifact that carries one, or from a Hugging Face directory.

    Where such a directory has no `tokenizer.json`, its SentencePiece model or other vocabulary file is read
    (`luban.tokenizer.importing.folder`).

    Raises:
        ArtifactError: there is none at `path`, or its files are damaged.
    """
    from luban.tokenizer.importing.folder import read_vocabulary, unknown_use, vocabulary_file

    path = Path(path)
    for folder in (path, path / "tokenizer", incomplete_path(path) / "tokenizer"):
        if (folder / FILE).is_file():
            return _load(folder)
    if not path.exists():
        raise ArtifactError(f"tokenizer {path} does not exist")
    file = path if path.is_file() else vocabulary_file(path)
    if file is None:
        raise ArtifactError(
            f"{path} holds no tokenizer: {FILE} is needed there or in {path / 'tokenizer'}{unknown_use(path)}"
        )
    return _load(file.parent) if file.name == FILE else read_vocabulary(file)


def _load(folder: Path) -> Tokenizer:
    identity = None
    if (folder / MANIFEST).is_file() and read_manifest(folder).kind == "tokenizer":
        identity = open_artifact(folder, "tokenizer").content_hash
    try:
        model = tokenizers.Tokenizer.from_str((folder / FILE).read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise ArtifactError(f"{folder / FILE} is not a tokenizer: {error}") from None
    return Tokenizer(model, read_settings(folder), path=folder, content_hash=identity)
