"""How likely given text is: negative log-likelihoods, in nats, of chosen tokens.

Legend: B windows in a batch, T tokens in a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from luban.core.log import progress
from luban.kernels.limits import IGNORED
from luban.load.model import LoadedModel
from luban.models.base import Model


@dataclass(frozen=True)
class Window:
    """A stretch of one document: `tokens` are read, `targets` predicted, only `scored` ones count."""

    tokens: list[int]
    targets: list[int]
    scored: list[bool]


def reading_length(model: LoadedModel) -> int:
    """Tokens a window may read: the context, or the sequences of its training where those were shorter."""
    trained = (model.manifest.config.get("train") or {}).get("seq_len") if model.manifest else None
    return min(model.spec.context, trained or model.spec.context)


def windows(token_ids: Sequence[int], scored: Sequence[bool], context: int, stride: int) -> Iterator[Window]:
    """Cut a document so that every scored token is counted exactly once.

    The first window predicts from its start; each later one starts `stride` tokens further on, and counts
    only the targets that no earlier window counted, so those see at least `context - stride` tokens.

    Args:
        token_ids: the document, its first token (BOS) included; token i is predicted from those before it.
        scored: which tokens count, aligned with token_ids; the first one never does.
        context: tokens a window may read. stride: how far the next window starts.
    """
    begin, counted = 0, 0  # counted: targets below this index are done
    last = len(token_ids) - 1
    while counted < last:
        end = min(begin + context, last)
        fresh = [scored[i + 1] and i >= counted for i in range(begin, end)]
        yield Window(list(token_ids[begin:end]), list(token_ids[begin + 1 : end + 1]), fresh)
        begin, counted = begin + stride, end


def rolling_windows(token_ids: Sequence[int], context: int) -> Iterator[Window]:
    """Cut a document into windows as lm-evaluation-harness does, so that its figures can be compared.

    Windows follow one another without overlap; the last one begins earlier, so that it is as long as the others, and counts
    only what the one before did not. Every token but the first is counted once.

    Args:
        token_ids: the document, behind a first token that isn't counted.
        context: tokens a window may read.
    """
    last, counted = len(token_ids) - 1, 0
    while counted < last:
        end = min(counted + context, last)
        begin = max(0, end - context) if counted else 0
        fresh = [i >= counted for i in range(begin, end)]
        yield Window(list(token_ids[begin:end]), list(token_ids[begin + 1 : end + 1]), fresh)
        counted = end


def batches(
    cut: Sequence[Window], batch_tokens: int, device: torch.device
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor | None]]:
    """(places of a batch's windows, tokens (B, T) int64, mask (B, T) bool or None where nothing is padded) of windows that have a
    scored target, longest first, right-padded, at most `batch_tokens` together but at least one."""
    order = sorted((i for i, w in enumerate(cut) if any(w.scored)), key=lambda i: -len(cut[i].tokens))
    while order:
        width = len(cut[order[0]].tokens)
        rows = order[: max(1, batch_tokens // width)]
        order = order[len(rows) :]
        mask = padded([[1] * len(cut[i].tokens) for i in rows], width, device).bool()
        yield rows, padded([cut[i].tokens for i in rows], width, device), None if bool(mask.all()) else mask


@torch.inference_mode()
def negative_log_likelihood(
    module: Model,
    cut: Sequence[Window],
    *,
    batch_tokens: int = 8192,
    precision: torch.dtype = torch.float32,
    title: str = "scoring",
) -> list[float]:
    """The summed negative log-likelihood (nats, float64) of the scored targets of each window.

    Windows are sorted by length and batched right-padded; the result is in the order given. Arithmetic
    runs under autocast in `precision` where that is lower than the parameters'; the softmax is float32.
    """
    device = next(module.parameters()).device
    module.eval()
    sums = [0.0] * len(cut)
    autocast = torch.autocast(device.type, precision, enabled=precision != torch.float32)
    with progress(title, sum(len(w.tokens) for w in cut if any(w.scored)), "tokens") as bar:
        for rows, tokens, mask in batches(cut, batch_tokens, device):
            targets, scored = (
                padded([getattr(cut[i], name) for i in rows], tokens.shape[1], device) for name in ("targets", "scored")
            )
            with autocast:
                hidden = module(tokens, mask, output="hidden")
                logprobs, _ = module.head(hidden, torch.where(scored.bool(), targets, IGNORED), reduce="none")
            totals = (-logprobs).sum(1, dtype=torch.float64).tolist()
            for i, total in zip(rows, totals, strict=True):
                sums[i] = total
            bar.advance(sum(len(cut[i].tokens) for i in rows))
    return sums


def padded(rows: Sequence[Sequence[int]], width: int, device: torch.device) -> torch.Tensor:
    """(rows, width) int64, zeros on the right."""
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device, dtype=torch.long)
