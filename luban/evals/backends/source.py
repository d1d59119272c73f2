"""An encoder–decoder in this process: a prompt is what its encoder reads, a continuation or an answer what its decoder writes.

B rows in a batch, S source tokens, T decoder tokens, E model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from luban.core.errors import DataError, UnsupportedError
from luban.evals.backends.local import LocalBackend
from luban.evals.likelihood import padded
from luban.evals.requests import Prompt, Response, Roll, Score, Scored, Write
from luban.generate.prompts import SourcePrompts
from luban.load.model import LoadedModel
from luban.tokenizer.chat import render
from luban.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class SourceWindow:
    """A source, what the decoder reads behind it, and its targets, of which the last `scored` count."""

    source: list[int]
    tokens: list[int]
    targets: list[int]
    scored: int


class SourceBackend(LocalBackend):
    """A loaded encoder–decoder. See `LocalBackend`."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's. UnsupportedError where it writes no text, or doesn't say what its decoder begins with."""
        SourcePrompts(self.model.spec)
        return self.model.need_tokenizer()

    def tokens_of(self, prompt: Prompt) -> list[int]:
        """A source as token ids, begun and ended as the model's whole texts are."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, bos=self.model.begins_with_bos, eos=self.model.ends_with_eos)
        return render(prompt, self.tokenizer, add_generation_prompt=True).token_ids

    def pair(self, context: Prompt, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of a source and of what the decoder writes; spaces at the context's end count to the continuation, as in
        lm-evaluation-harness. Without a source the encoder reads what an empty text is, or the token before texts."""
        if isinstance(context, str):
            bare = context.rstrip()
            continuation, context = context[len(bare) :] + continuation, bare
        return self.tokens_of(context) or [self._first()], self.tokenizer.encode(continuation)

    def _fitting(self, request: Write) -> tuple[list[int], int]:
        """Source tokens that the encoder holds, and how many were cut off from the left; the answer has a context of its own."""
        ids = self.tokens_of(request.prompt) or [self._first()]
        return self._cut(ids)

    def _cut(self, ids: list[int]) -> tuple[list[int], int]:
        """A source's last tokens, behind its first one where texts begin with BOS."""
        over = max(0, len(ids) - self.model.spec.context)
        if over and self.model.begins_with_bos:
            return [ids[0], *ids[over + 1 :]], over
        return ids[over:], over

    def _score(self, requests: Sequence[Score]) -> list[Response]:
        windows, cut = [], []
        begin = list(self.model.spec.body.decoder_start_ids() or ())
        for request in requests:
            source, tail = self.pair(request.context, request.continuation)
            if not tail:
                raise DataError(f"the continuation {request.continuation!r} has no token of its own")
            ids = [*begin, *tail]
            if len(ids) - 1 > self.model.spec.context:
                raise DataError(
                    f"a continuation of {len(tail)} tokens doesn't fit {self.name}'s context of {self.model.spec.context}"
                )
            source, over = self._cut(source)
            cut.append(over)
            windows.append(SourceWindow(source, ids[:-1], ids[1:], len(tail)))
        found: list[Response] = []
        for (logprob, greedy), window, over in zip(self._decoded(windows), windows, cut, strict=True):
            read = len(window.source)
            found.append(
                Scored(logprob=logprob, greedy=greedy, tokens=window.scored, truncated=over, prompt_tokens=read)
            )
        self.counts["truncated"] += sum(map(bool, cut))
        return found

    @torch.inference_mode()
    def _decoded(self, windows: Sequence[SourceWindow]) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether every token is the likeliest) of the scored targets of each window."""
        module, device = self.model.module, next(self.model.module.parameters()).device
        module.eval()
        found = [(0.0, False)] * len(windows)
        autocast = torch.autocast(device.type, getattr(torch, self.precision), enabled=self.precision != "float32")
        for rows in self._batches(windows):
            taken = [windows[i] for i in rows]
            tokens_BS, mask_BS = _padded([each.source for each in taken], device)
            decoder_BT, mask_BT = _padded([each.tokens for each in taken], device)
            places = [
                (b, t, each.targets[t])
                for b, each in enumerate(taken)
                for t in range(len(each.targets) - each.scored, len(each.targets))
            ]
            with autocast:
                hidden_BTE = module(tokens_BS, decoder_BT, mask_BS, decoder_mask=mask_BT, output="hidden")
                logprobs, likeliest = self._targets(hidden_BTE, places)
            for i, each in zip(rows, taken, strict=True):
                found[i] = sum(logprobs[: each.scored]), all(likeliest[: each.scored])
                logprobs, likeliest = logprobs[each.scored :], likeliest[each.scored :]
        return found

    def _batches(self, windows: Sequence[SourceWindow]) -> Iterator[list[int]]:
        """Places of windows that are read together, longest first: at most `batch_tokens` with padding, but at least one."""
        order = sorted(range(len(windows)), key=lambda i: (-len(windows[i].source), -len(windows[i].tokens)))
        while order:
            rows, longest = [order[0]], len(windows[order[0]].tokens)
            for i in order[1:]:
                longest = max(longest, len(windows[i].tokens))
                width = len(windows[order[0]].source) + longest
                if self.batch_invariant or width * (len(rows) + 1) > self.batch_tokens:
                    break
                rows.append(i)
            order = order[len(rows) :]
            yield rows

    def _roll(self, requests: Sequence[Roll]) -> list[Response]:
        raise UnsupportedError(
            f"{self.name} is an encoder–decoder, which predicts no text of its own accord: rolling tasks need a decoder"
        )


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """((rows, longest) int64, zeros on the right; mask of the same shape, None where nothing is padded)."""
    width = max(map(len, rows))
    mask = padded([[1] * len(row) for row in rows], width, device).bool()
    return padded(rows, width, device), None if bool(mask.all()) else mask


def local_backend(
    model: LoadedModel,
    *,
    precision: str = "float32",
    batch_tokens: int = 8192,
    batch_invariant: bool = False,
    cache_bytes: int | None = None,
) -> LocalBackend:
    """The backend of a loaded model, with the arguments of `LocalBackend`."""
    kind = SourceBackend if model.spec.body.two_sided else LocalBackend
    return kind(
        model, precision=precision, batch_tokens=batch_tokens, batch_invariant=batch_invariant, cache_bytes=cache_bytes
    )
