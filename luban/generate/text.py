"""Token ids → text as it streams: no torn character, no part of a stop string."""

from __future__ import annotations

from luban.tokenizer.tokenizer import Tokenizer

TORN = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet one
WINDOW = 16  # tokens decoded again at each step, so that a long text costs no more a token than a short one
OVERLAP = 4  # tokens kept when the window moves: a character has at most four bytes


class TextStream:
    """Text of a growing list of tokens. `push` returns what can be shown; `stopped` says that a stop string came.

    Args:
        tokenizer: gives `decode`.
        stop: strings that end the text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.window: list[int] = []
        self.read = 0  # characters of the window's text already taken
        self.held = ""  # text that may be the beginning of a stop string
        self.text = ""  # all text returned so far
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token makes certain."""
        self.window.append(token)
        decoded = self.tokenizer.decode(self.window)
        whole = decoded[:-1] if decoded.endswith(TORN) else decoded
        fresh, self.read = whole[self.read :], max(self.read, len(whole))
        if len(self.window) >= WINDOW and whole is decoded:
            self.window = self.window[-OVERLAP:]
            self.read = len(self.tokenizer.decode(self.window))
        return self._release(fresh)

    def finish(self) -> str:
        """The rest, once no token follows."""
        if self.stopped:
            return ""
        rest = self._release(self.tokenizer.decode(self.window)[self.read :])
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
