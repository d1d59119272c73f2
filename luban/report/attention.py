"""What a model attends to in a text: one page with the weights of every layer and head, their entropy and distance.

H heads, T tokens.
"""

from __future__ import annotations

import base64
import json
import math
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from luban.core.errors import DataError, UnsupportedError
from luban.load.model import LoadedModel
from luban.nn.attention.recording import LayerWeights, recording

LONGEST = 512  # tokens of a text: a page holds T² bytes a head
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
  const raw = Uint8Array.from(atob(data.heads[canvas.dataset.head]), c => c.charCodeAt(0)), n = data.tokens.length;
  canvas.width = canvas.height = n;
  const paint = canvas.getContext("2d"), image = paint.createImageData(n, n);
  raw.forEach((value, i) => image.data.set([200 - value * 170 / 255, 215 - value * 160 / 255, 235 - value * 60 / 255, value ? 255 : 0], 4 * i));
  paint.putImageData(image, 0, 0);
  canvas.onclick = () => canvas.classList.toggle("large");
  canvas.onmousemove = event => {
    const box = canvas.getBoundingClientRect();
    const [key, query] = [[event.clientX, box.left, box.width], [event.clientY, box.top, box.height]]
      .map(([at, from, size]) => Math.min(n - 1, Math.max(0, Math.floor((at - from) / size * n))));
    const weight = (raw[query * n + key] / 255) ** 2;
    seen.textContent = `${query} ${JSON.stringify(data.tokens[query])} → ${key} ${JSON.stringify(data.tokens[key])}: ${weight.toFixed(3)}`;
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
    distance: float  # tokens between query and key, weighted
    on_first: float  # weight on the first token
    on_itself: float  # weight on the query's own token


def attention_of(model: LoadedModel, text: str) -> tuple[list[str], list[LayerWeights]]:
    """(the tokens of a text, the weights of every layer that has some).

    Raises:
        UnsupportedError: a model without layers that attend, or an encoder–decoder.
        DataError: an empty text, or one that is too long.
    """
    body = model.spec.body
    kind = body.registry.name_of(type(body))
    if body.two_sided or not body.stacked:
        raise UnsupportedError(f"attention is shown of decoders and encoders; this model's body is {kind}")
    tokenizer = model.need_tokenizer()
    ids = tokenizer.encode(text, bos=model.begins_with_bos)
    most = min(LONGEST, model.spec.context)
    if not ids:
        raise DataError("the text has no tokens: give --attention a text")
    if len(ids) > most:
        raise DataError(f"the text has {len(ids)} tokens, and a page shows at most {most}: give a shorter one")
    stack = model.module.get_submodule("decoder" if body.causal else "encoder")
    blocks = [stack.get_submodule(f"blocks.{name}") for name in stack.block_of.values()]  # type: ignore[union-attr, index, operator]
    device = next(model.module.parameters()).device
    with torch.inference_mode(), recording(blocks) as backend:
        model.module(torch.tensor([ids], device=device), attention=backend, output="hidden")
    if not backend.found:
        names = {layer.mixer.registry.name_of(type(layer.mixer)) for layer in model.spec.layers}
        raise UnsupportedError(
            f"no layer of this model has attention weights: its mixers are {', '.join(sorted(names))}"
        )
    return [tokenizer.decode([token], skip_special=False) for token in ids], backend.found


def head_figures(found: list[LayerWeights]) -> list[HeadFigures]:
    """Entropy and distance of every head."""
    figures = []
    for layer in found:
        for head, weights_TT in enumerate(layer.weights_HTS):
            shares = weights_TT / weights_TT.sum(-1, keepdim=True).clamp_min(1e-12)
            at = torch.arange(shares.shape[0])
            distance = (at[:, None] - at).abs().float()
            figures.append(
                HeadFigures(
                    layer=layer.layer,
                    head=head,
                    kind=layer.kind,
                    entropy=float(-(shares * shares.clamp_min(1e-30).log2()).sum(-1).mean()),
                    distance=float((shares * distance).sum(-1).mean()),
                    on_first=float(shares[:, 0].mean()),
                    on_itself=float(shares.diagonal().mean()),
                )
            )
    return figures


def attention_page(model: LoadedModel, text: str) -> str:
    """A page that needs nothing but itself; weights are shown by their square roots, so that small ones can be seen."""
    tokens, found = attention_of(model, text)
    figures = head_figures(found)
    heads, parts, rows = [], [], []
    for layer in found:
        shown = []
        for head, weights_TT in enumerate(layer.weights_HTS):
            shown.append(
                f'<figure><canvas data-head="{len(heads)}"></canvas><figcaption>head {head}</figcaption></figure>'
            )
            heads.append(_packed(weights_TT))
        parts.append(f"<h2>Layer {layer.layer}: {escape(layer.kind)}</h2><div class=heads>{''.join(shown)}</div>")
    for each in figures:
        values = (each.entropy, each.distance, each.on_first, each.on_itself)
        cells = "".join(f"<td>{value:.3f}</td>" for value in values)
        rows.append(f"<tr><td>{each.layer}</td><td>{each.head}</td><td>{escape(each.kind)}</td>{cells}</tr>")
    without = sorted(set(range(len(model.spec.layers))) - {layer.layer for layer in found})
    note = f"<p>Layers without attention weights: {', '.join(map(str, without))}.</p>" if without else ""
    data = json.dumps({"tokens": tokens, "heads": heads}).replace("<", "\\u003c")
    most = math.log2(len(tokens))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Attention of {escape(model.name)}</title>'
        f"<style>{STYLE}</style><h1>Attention of {escape(model.name)}</h1><p>{escape(text)}</p>"
        f"<p>Queries from top to bottom, keys from left to right; {len(tokens)} tokens. Point at a square to read it, click to "
        f"enlarge. Entropy in bits (at most {most:.2f}), distance in tokens, means over the queries.</p>{note}"
        f"<p id=seen></p>{''.join(parts)}<h2>Heads</h2><table><tr><th>layer<th>head<th>kind<th>entropy<th>distance"
        f"<th>on the first<th>on itself</tr>{''.join(rows)}</table>"
        f'<script type="application/json" id="data">{data}</script><script>{SCRIPT}</script></html>'
    )


def _packed(weights_TT: Tensor) -> str:
    """Square roots as bytes, in base64."""
    return base64.b64encode((weights_TT.clamp(0, 1).sqrt() * 255).round().byte().numpy().tobytes()).decode()


def write_attention(model: LoadedModel, text: str, out: Path) -> None:
    """Write the page."""
    out.write_text(attention_page(model, text), encoding="utf-8")
