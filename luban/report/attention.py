"""What a model attends to in a text: one page with the weights of every layer and head, their entropy and distance.

H heads, T tokens of queries, S tokens of keys.
"""

from __future__ import annotations

import base64
import json
import math
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from luban.core.errors import DataError, UnsupportedError
from luban.generate.sampling import Sampling
from luban.load.model import LoadedModel
from luban.nn.attention.recording import CROSS, LayerWeights, recording
from luban.serve.engine import Engine

LONGEST = 512  # tokens of a text: a page holds T² bytes a head
WRITTEN = 64  # tokens that an encoder–decoder writes where no target is given
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; background: #fff; color: #222 }
.heads { display: flex; flex-wrap: wrap; gap: .8rem } figure { margin: 0 } figcaption { font-size: 12px; color: #666 }
canvas { width: 9.5rem; height: 9.5rem; image-rendering: pixelated; border: 1px solid #ddd; cursor: crosshair }
canvas.large { width: 34rem; height: 34rem } #seen { position: sticky; top: 0; background: inherit; min-height: 1.6em; font-family: monospace }
table { border-collapse: collapse } td, th { padding: .1rem .7rem; text-align: right; font-variant-numeric: tabular-nums }
@media (prefers-color-scheme: dark) { body { background: #111; color: #ddd } canvas { border-color: #444 } }
"""
SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent), seen = document.getElementById("seen");
for (const canvas of document.querySelectorAll("canvas")) {
  const raw = Uint8Array.from(atob(data.heads[canvas.dataset.head]), c => c.charCodeAt(0));
  const queries = data[canvas.dataset.queries], keys = data[canvas.dataset.keys];
  [canvas.width, canvas.height] = [keys.length, queries.length];
  const paint = canvas.getContext("2d"), image = paint.createImageData(keys.length, queries.length);
  raw.forEach((value, i) => image.data.set([200 - value * 170 / 255, 215 - value * 160 / 255, 235 - value * 60 / 255, value ? 255 : 0], 4 * i));
  paint.putImageData(image, 0, 0);
  canvas.onclick = () => canvas.classList.toggle("large");
  canvas.onmousemove = event => {
    const box = canvas.getBoundingClientRect();
    const [key, query] = [[event.clientX, box.left, box.width, keys.length], [event.clientY, box.top, box.height, queries.length]]
      .map(([at, from, size, n]) => Math.min(n - 1, Math.max(0, Math.floor((at - from) / size * n))));
    const weight = (raw[query * keys.length + key] / 255) ** 2;
    seen.textContent = `${query} ${JSON.stringify(queries[query])} → ${key} ${JSON.stringify(keys[key])}: ${weight.toFixed(3)}`;
  };
}
"""


@dataclass(frozen=True)
class HeadFigures:
    """Of one head, means over the queries."""

    layer: int
    head: int
    kind: str
    entropy: float  # in bits
    distance: float | None  # tokens between query and key, weighted; None: they are of different texts
    on_first: float  # weight on the first token
    on_itself: float | None  # weight on the query's own token; None: it isn't among the keys
    stack: str = ""


def attention_of(model: LoadedModel, text: str) -> tuple[list[str], list[LayerWeights]]:
    """(the tokens of a text, the weights of every layer that has some).

    Raises:
        UnsupportedError: a model without layers that attend, or an encoder–decoder (`attention_between`).
        DataError: an empty text, or one that is too long.
    """
    body = model.spec.body
    kind = body.registry.name_of(type(body))
    if body.two_sided or not body.stacked:
        raise UnsupportedError(f"attention in one text is shown of decoders and encoders; this model's body is {kind}")
    ids = _tokens(model, text, "--attention")
    stack = model.module.get_submodule("decoder" if body.causal else "encoder")
    device = next(model.module.parameters()).device
    with torch.inference_mode(), recording(_blocks(stack)) as backend:
        model.module(torch.tensor([ids], device=device), attention=backend, output="hidden")
    if not backend.found:
        names = {layer.mixer.registry.name_of(type(layer.mixer)) for layer in model.spec.layers}
        raise UnsupportedError(
            f"no layer of this model has attention weights: its mixers are {', '.join(sorted(names))}"
        )
    return _spelled(model, ids), backend.found


def attention_between(
    model: LoadedModel, text: str, target: str = ""
) -> tuple[list[str], list[str], list[LayerWeights]]:
    """(the source's tokens, the tokens that the decoder reads, the weights of every layer of both stacks) of an encoder–decoder.

    Args:
        target: what the decoder reads; empty: what the model writes, up to `WRITTEN` tokens, the likeliest each time.

    Raises:
        UnsupportedError: another model.
        DataError: an empty text, one that is too long, or a model that doesn't say what its targets begin with.
    """
    body = model.spec.body
    if not body.two_sided:
        raise UnsupportedError("a target is read by encoder–decoders alone: leave --attention-target out")
    source = _tokens(model, text, "--attention")
    start = body.decoder_start_ids()
    if start is None:
        raise DataError("this model doesn't say what its decoder begins with (model.body.decoder_start)")
    if target:
        read = [*start, *model.need_tokenizer().encode(target)]
        if len(read) > (most := min(LONGEST, model.spec.context)):
            raise DataError(f"the target has {len(read)} tokens, and a page shows at most {most}: give a shorter one")
    else:
        sampling = Sampling(max_tokens=min(WRITTEN, model.spec.context - len(start)), temperature=0)
        read = [*start, *Engine(model).generate([source], sampling)[0].token_ids]
    stacks = {name: model.module.get_submodule(name) for name in ("encoder", "decoder")}
    blocks = {name: _blocks(stack) for name, stack in stacks.items()}
    device = next(model.module.parameters()).device
    with torch.inference_mode(), recording([*blocks["encoder"], *blocks["decoder"]]) as backend:
        tokens, answer = (torch.tensor([ids], device=device) for ids in (source, read))
        model.module(tokens, answer, attention=backend, output="hidden")
    depth = len(blocks["encoder"])
    found = [
        replace(each, layer=each.layer - (0 if each.layer < depth else depth), stack=name)
        for each in backend.found
        for name in ["encoder" if each.layer < depth else "decoder"]
    ]
    return _spelled(model, source), _spelled(model, read), found


def _tokens(model: LoadedModel, text: str, option: str) -> list[int]:
    """A text as the model reads it. Raises DataError for none, or too many."""
    ends = model.spec.body.two_sided and model.ends_with_eos
    ids = model.need_tokenizer().encode(text, bos=model.begins_with_bos, eos=ends)
    most = min(LONGEST, model.spec.context)
    if not text or not ids:
        raise DataError(f"the text has no tokens: give {option} a text")
    if len(ids) > most:
        raise DataError(f"the text has {len(ids)} tokens, and a page shows at most {most}: give a shorter one")
    return ids


def _blocks(stack: Any) -> list[nn.Module]:
    """In the order in which they run."""
    return [stack.get_submodule(f"blocks.{name}") for name in stack.block_of.values()]


def _spelled(model: LoadedModel, ids: list[int]) -> list[str]:
    return [model.need_tokenizer().decode([token], skip_special=False) for token in ids]


def head_figures(found: list[LayerWeights]) -> list[HeadFigures]:
    """Entropy and distance of every head."""
    figures = []
    for layer in found:
        for head, weights_TS in enumerate(layer.weights_HTS):
            shares, crosses = weights_TS / weights_TS.sum(-1, keepdim=True).clamp_min(1e-12), layer.kind == CROSS
            queries, keys = (torch.arange(size) for size in shares.shape)
            distance = (queries[:, None] - keys).abs().float()
            figures.append(
                HeadFigures(
                    layer=layer.layer,
                    head=head,
                    kind=layer.kind,
                    entropy=float(-(shares * shares.clamp_min(1e-30).log2()).sum(-1).mean()),
                    distance=None if crosses else float((shares * distance).sum(-1).mean()),
                    on_first=float(shares[:, 0].mean()),
                    on_itself=None if crosses else float(shares.diagonal().mean()),
                    stack=layer.stack,
                )
            )
    return figures


def attention_page(model: LoadedModel, text: str, target: str = "") -> str:
    """A page that needs nothing but itself; weights are shown by their square roots, so that small ones can be seen.

    Args:
        target: of an encoder–decoder, as in `attention_between`.
    """
    read: list[str] = []
    if model.spec.body.two_sided or target:
        tokens, read, found = attention_between(model, text, target)
    else:
        tokens, found = attention_of(model, text)
    heads, parts = [], []
    for layer in found:
        queries = "target" if layer.stack == "decoder" else "tokens"
        keys = "tokens" if layer.kind == CROSS else queries
        shown = []
        for head, weights_TS in enumerate(layer.weights_HTS):
            canvas = f'<canvas data-head="{len(heads)}" data-queries="{queries}" data-keys="{keys}"></canvas>'
            shown.append(f"<figure>{canvas}<figcaption>head {head}</figcaption></figure>")
            heads.append(_packed(weights_TS))
        parts.append(f"<h2>{_named(layer)}: {escape(layer.kind)}</h2><div class=heads>{''.join(shown)}</div>")
    attended = {layer.layer for layer in found}
    without = sorted(set(range(len(model.spec.layers))) - attended)
    note = f"<p>Layers without attention weights: {', '.join(map(str, without))}.</p>" if without else ""
    if read:
        note += f"<p>The decoder reads: {escape(''.join(read))}</p>"
    data = json.dumps({"tokens": tokens, "target": read, "heads": heads}).replace("<", "\\u003c")
    most, counted = math.log2(len(tokens)), f"{len(tokens)} tokens" + (f", target {len(read)}" if read else "")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Attention of {escape(model.name)}</title>'
        f"<style>{STYLE}</style><h1>Attention of {escape(model.name)}</h1><p>{escape(text)}</p>"
        f"<p>Queries from top to bottom, keys from left to right; {counted}. Point at a square to read it, click to "
        f"enlarge. Entropy in bits (at most {most:.2f} over the text), distance in tokens, means over the queries.</p>{note}"
        f"<p id=seen></p>{''.join(parts)}<h2>Heads</h2><table><tr><th>layer<th>head<th>kind<th>entropy<th>distance"
        f"<th>on the first<th>on itself</tr>{''.join(map(_row, head_figures(found)))}</table>"
        f'<script type="application/json" id="data">{data}</script><script>{SCRIPT}</script></html>'
    )


def _named(layer: LayerWeights | HeadFigures) -> str:
    return f"{layer.stack.capitalize()} layer {layer.layer}" if layer.stack else f"Layer {layer.layer}"


def _row(figures: HeadFigures) -> str:
    """A row of the table of heads."""
    values = (figures.entropy, figures.distance, figures.on_first, figures.on_itself)
    cells = "".join(f"<td>{'–' if value is None else f'{value:.3f}'}</td>" for value in values)
    name = f"{figures.stack} {figures.layer}".strip()
    return f"<tr><td>{name}</td><td>{figures.head}</td><td>{escape(figures.kind)}</td>{cells}</tr>"


def _packed(weights_TS: Tensor) -> str:
    """Square roots as bytes, in base64."""
    return base64.b64encode((weights_TS.clamp(0, 1).sqrt() * 255).round().byte().numpy().tobytes()).decode()


def write_attention(model: LoadedModel, text: str, out: Path, target: str = "") -> None:
    """Write the page."""
    out.write_text(attention_page(model, text, target), encoding="utf-8")
