"""Forwards of single tokens that are submitted before the host knows the tokens that they read.

A step's tokens are drawn on the device and stay there: the next forward reads them where they lie, and the host looks at
them while it runs. What the next forward needs beside them is known: which sequences go on (all but those that reach their
longest answer), and which slots they write. What isn't known is which of them end by what was drawn (an end token, a stop
string): those have one token more read than they need, which is discarded, and their blocks are free once they have left,
since whatever is written there later is written after that forward.

B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from luban.generate.session import NO_TOKEN, draw_on_device
from luban.generate.session import Sequence as Growing
from luban.nn.host_copies import sent
from luban.serve.batch import LostProcess, Token
from luban.serve.model_runner import ModelRunner
from luban.serve.scheduler import Chunk, Scheduler, SequenceState

UNKNOWN = -1  # in the place of a token that the host doesn't know yet


@dataclass
class InFlight:
    """A forward that was submitted, and the tokens drawn from its logits."""

    chunks: Sequence[Chunk]
    tokens_B: Tensor  # on the device
    host_B: Tensor  # the same on the host, NO_TOKEN where none can be chosen, once `copied` has been reached
    copied: torch.cuda.Event | None  # None: it is there
    advanced: bool = False  # whether the scheduler knows that it has been submitted
    unknown: set[SequenceState] = field(
        default_factory=set
    )  # sequences whose last token stands for what was drawn here

    def wait(self) -> list[int]:
        """The tokens."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.host_B.tolist()


class DecodeAhead:
    """Submits the forward behind one that is in flight.

    Args:
        growing: the sequence of each state that hasn't left.
        max_new_tokens: tokens that the context leaves for an answer to a prompt.
    """

    def __init__(self, growing: Mapping[SequenceState, Growing], max_new_tokens: Callable[[list[int]], int]):
        self.growing, self.max_new_tokens = growing, max_new_tokens

    def serves(self, chunks: Sequence[Chunk]) -> bool:
        """Whether the tokens behind these chunks can be drawn without the host: all are single tokens of sequences whose settings
        ask for nothing that depends on the tokens before."""
        return bool(chunks) and all(
            chunk.count == 1 and chunk.last and not chunk.state.siblings and _simple(self.growing[chunk.state])
            for chunk in chunks
        )

    @torch.inference_mode()
    def draw(self, chunks: Sequence[Chunk], logits_BV: Tensor, ahead: int = 0) -> InFlight:
        """Draw a token for each chunk, without waiting.

        Args:
            ahead: tokens of each sequence that the host doesn't know yet.
        """
        growing = [self.growing[chunk.state] for chunk in chunks]
        tokens_B, reported_B = draw_on_device(logits_BV, growing, ahead)
        if not logits_BV.is_cuda:
            return InFlight(chunks, tokens_B, reported_B, None)
        host_B = torch.empty(reported_B.shape, dtype=reported_B.dtype, pin_memory=True)
        host_B.copy_(reported_B, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return InFlight(chunks, tokens_B, host_B, copied)

    @torch.inference_mode()
    def submit_next(self, flight: InFlight, scheduler: Scheduler, runner: ModelRunner) -> InFlight | None:
        """Submit the forward that reads the tokens of one in flight; None where something else has to be done first: a prompt
        to be read, a sequence to be preempted."""
        rows = {chunk.state: row for row, chunk in enumerate(flight.chunks) if chunk.state in self.growing}
        for chunk in flight.chunks:
            if chunk.state in rows:
                scheduler.advance(chunk)
        flight.advanced = True
        going_on = [state for state in rows if not self._reaches_its_end(self.growing[state])]
        if not going_on or not scheduler.only_decodes(going_on):
            return None
        for state in going_on:
            scheduler.take(state, [UNKNOWN])
        flight.unknown = set(going_on)
        chunks = scheduler.schedule().chunks
        tokens_B = _picked(flight.tokens_B, [rows[chunk.state] for chunk in chunks])
        try:
            logits_BV = runner.run(chunks, tokens_N=tokens_B)
        except LostProcess:
            raise
        except Exception:  # it comes again, and is dealt with, where these tokens are read once they are known
            return None
        return self.draw(chunks, logits_BV, ahead=1)

    def synchronize(self, flight: InFlight, scheduler: Scheduler) -> list[tuple[Growing, list[Token]]]:
        """Wait for the tokens of a forward, and append them to the sequences that haven't left."""
        found: list[tuple[Growing, list[Token]]] = []
        for chunk, token in zip(flight.chunks, flight.wait(), strict=True):
            state, growing = chunk.state, self.growing.get(chunk.state)
            if growing is None:
                continue
            growing.tokens.append(token)
            found.append((growing, [None if token == NO_TOKEN else token]))
            if state in flight.unknown:
                state.tokens[-1] = token
                continue
            if not flight.advanced:
                scheduler.advance(chunk)
            scheduler.take(state, [] if token == NO_TOKEN else [token])
        return found

    def _reaches_its_end(self, growing: Growing) -> bool:
        """Whether the token in flight is the last that a sequence may have."""
        most = min(growing.sampling.max_tokens, self.max_new_tokens(growing.prompt))
        return len(growing.tokens) + 1 >= most


def _simple(growing: Growing) -> bool:
    """Whether a sequence's token is a function of logits, settings and position alone, and nothing but it is asked for."""
    sampling = growing.sampling
    return growing.matcher is None and not sampling.alters_logits and sampling.logprobs is None and sampling.beams == 1


def _picked(tokens_B: Tensor, rows: list[int]) -> Tensor:
    """The tokens of some rows, on the device."""
    if rows == list(range(len(tokens_B))):
        return tokens_B
    return tokens_B[sent(rows, tokens_B.device)]
