"""Token ids → text as it streams: no torn character, no part of a stop string, and all of it the text of all ids."""

from __future__ import annotations

from collections.abc import Sequence

from luban.tokenizer.tokenizer import Tokenizer

TORN = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet one
UNFINISHED = 3  # bytes, and so U+FFFD, of a character at the end of which the last byte is still to come
WINDOW = 16  # tokens decoded again at each step, so that a long text costs no more a token than a short one
OVERLAP = 4  # tokens with text that stay when the window moves: a character has at most four bytes
MOST_CONTEXT = 64  # tokens before the text that are looked at


class TextStream:
    """Text of a growing list of tokens. `push` returns what can be shown; `stopped` says that a stop string came.

    What `push` and `finish` return, joined, is `decode(context + tokens)` without `decode(context)`: a vocabulary that
    drops the space before a text keeps it between a prompt and its continuation.

    Args:
        tokenizer: gives `decode`.
        stop: strings that end the text.
        context: ids before the text, which it continues; none where it is a text of its own.
        kept: special tokens that are text, spelled as the vocabulary does.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...] = (),
        context: Sequence[int] = (),
        kept: frozenset[int] = frozenset(),
    ):
        self.tokenizer, self.stop, self.kept = tokenizer, stop, kept
        self.special = frozenset(tokenizer.special.values()) - kept
        self.window: list[int] = self._context(context)
        self.read = len(self._decode(self.window))  # characters of the window's text already taken
        self.held = ""  # text that may be the beginning of a stop string
        self.text = ""  # all text returned so far
        self.stopped = False

    def _context(self, context: Sequence[int]) -> list[int]:
        """As many of the last ids before the text as its beginning depends on; none after half a character."""
        recent = [token for token in context if token not in self.special][-MOST_CONTEXT:]
        for size in range(min(OVERLAP, len(recent)), len(recent) + 1):
            text = self._decode(recent[len(recent) - size :])
            if text or size == len(recent):
                return [] if text.endswith(TORN) else recent[len(recent) - size :]
        return []

    def _decode(self, ids: Sequence[int]) -> str:
        """The ids' text."""
        if self.kept.isdisjoint(ids):
            return self.tokenizer.decode(ids)
        place = next(place for place, token in enumerate(ids) if token in self.kept)
        spelled = self.tokenizer.token(ids[place]) or ""
        return self.tokenizer.decode(ids[:place]) + spelled + self._decode(ids[place + 1 :])

    def push(self, token: int) -> str:
        """The text that this token makes certain."""
        if token in self.special and (not self.window or self.window[-1] in self.special):
            return self._release("")
        self.window.append(token)
        decoded = self._decode(self.window)
        unfinished = min(len(decoded) - len(decoded.rstrip(TORN)), UNFINISHED)
        whole = decoded[: len(decoded) - unfinished]
        fresh, self.read = whole[self.read :], max(self.read, len(whole))
        if len(self.window) >= WINDOW:
            self._move(decoded)
        return self._release(fresh)

    def _move(self, decoded: str) -> None:
        """Forget the first tokens of the window, where what is left decodes to the end of `decoded`."""
        size = shown = 0
        for size, token in enumerate(reversed(self.window[1:]), 1):
            shown += token not in self.special
            if shown < OVERLAP:
                continue
            text = self._decode(self.window[-size:])
            read = self.read - (len(decoded) - len(text))
            if text and read >= 0 and decoded.endswith(text):
                self.window, self.read = self.window[-size:], read
                return

    def finish(self) -> str:
        """The rest, once no token follows."""
        if self.stopped:
            return ""
        rest = self._release(self._decode(self.window)[self.read :])
        if not self.stopped:
            rest, self.text, self.held = rest + self.held, self.text + self.held, ""
        return rest

    def _release(self, fresh: str) -> str:
        self.held += fresh
        ends = [place for place in (self.held.find(s) for s in self.stop) if place >= 0]
        if ends:
            out, self.held, self.stopped = self.held[: min(ends)], "", True
        else:
            keep = max((overlap(self.held, s) for s in self.stop), default=0)
            out, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        self.text += out
        return out


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
