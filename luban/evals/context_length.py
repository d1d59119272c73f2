"""What a model makes of its context: the loss by position, and time and memory by length.

Rows are held-out documents one after another, as long as the model's context.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import torch

from luban.core.errors import DataError
from luban.evals.altered_sentence import surprises
from luban.evals.task import Material, Outcome
from luban.load.model import LoadedModel
from luban.models.base import require_next_token

ROWS = 8  # read, unless a limit is given
FIRST = 16  # tokens of the first range of positions; each later one is twice as long
SHORTEST = 128  # tokens of the shortest timed row
TIMED = 3  # forwards of a length; the fastest counts


def position_ranges(context: int) -> list[tuple[int, int]]:
    """Ranges [begin, end) of positions, from 0: FIRST, then each as long as all before it, the last cut at the context."""
    found, end = [(0, min(FIRST, context))], FIRST
    while end < context:
        found.append((end, min(2 * end, context)))
        end *= 2
    return found


class ContextLength:
    """`luban eval MODEL context_length --corpus CORPUS`; `--limit` is the number of rows."""

    needs = "text"

    def run(self, model: LoadedModel, material: Material, *, limit: int, precision: str) -> Outcome:
        """Loss in nats by position (`loss_to_N`: of positions up to N, from half of it), seconds and bytes by length."""
        require_next_token(model.spec, "context_length")
        context = model.spec.context
        ids = stream_of(model, material)
        count = min(limit or ROWS, (len(ids) - 1) // context)
        if not count:
            raise DataError(
                f"context_length needs {context + 1} tokens of held-out text, a whole context, and {len(ids)} are there"
            )
        losses = np.array([surprises(model, ids[i * context : (i + 1) * context + 1], context) for i in range(count)])
        rows: list[dict[str, object]] = []
        figures: dict[str, float] = {}
        for begin, end in position_ranges(context):
            nats = float(losses[:, begin:end].mean())
            figures[f"loss_to_{end}"] = nats
            perplexity = math.exp(min(nats, 700.0))
            rows.append(
                {"begin": begin, "end": end, "loss": nats, "perplexity": perplexity, "tokens": count * (end - begin)}
            )
        length = min(SHORTEST, context)
        while length <= context:
            rows.append({"length": length, **cost_of(model, ids[:length], precision)})
            figures[f"seconds_{length}"] = float(rows[-1]["seconds"])  # type: ignore[arg-type]
            length = context if length < context < 2 * length else 2 * length
        return Outcome(figures, rows)


def stream_of(model: LoadedModel, material: Material) -> list[int]:
    """The tokens of all documents, each begun and ended as the model's documents are."""
    tokenizer, found = model.need_tokenizer(), []
    for document in material.text:
        found += tokenizer.encode(document.text, bos=model.begins_with_bos, eos=model.ends_with_eos)
    return found


@torch.inference_mode()
def cost_of(model: LoadedModel, ids: Sequence[int], precision: str) -> dict[str, float | None]:
    """Seconds of a forward over one row, logits of its last token included, and on CUDA the bytes it takes beside the weights."""
    module = model.module
    device = next(module.parameters()).device
    tokens = torch.tensor([ids], device=device)
    cuda = device.type == "cuda"
    best, peak = math.inf, None
    for _ in range(TIMED):
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        began = time.perf_counter()
        with torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32"):
            module.read(module(tokens, output="hidden")[:, -1:])
        if cuda:
            torch.cuda.synchronize()
            peak = float(torch.cuda.max_memory_allocated() - before)
        best = min(best, time.perf_counter() - began)
    return {"seconds": best, "bytes": peak}
