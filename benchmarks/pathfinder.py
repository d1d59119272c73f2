"""Block-sparse layouts beside dense attention on images of paths, 1,024 and 4,096 pixels a row: accuracy and time.

    python benchmarks/pathfinder.py --device cuda --side 32 64 --steps 12000 --batch 64 --images 64000   # one GPU
    python benchmarks/pathfinder.py --side 16 --levels 2:0 --only dense --width 64 --layers 2 --images 6400 --steps 600 --heldout 500   # a CPU

Images in the manner of Pathfinder (Linsley et al. 2018) and Path-X (Tay et al. 2021), drawn here: two dashed smooth curves and shorter ones as
distractors, two discs. The discs are the ends of one curve (class joined) or ends of two (apart), equally far from each other; everything
else about both classes is alike. Images become harder: the steps are divided equally among --levels, and each begins with what the one before
has learned. An image is a row of side² pixels of 16 grey levels; an encoder reads it, its mean state gives the class. Row and column of a
pixel are its positions (two-dimensional RoPE).
Layouts: dense; local blocks; local blocks with strided ones; global, local and random blocks (BigBird). Every layout
trains on the same images; prints accuracy on held-out ones, its standard error, that on images that were trained on, milliseconds a step and
the share of blocks that are computed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from byte_models import clock, make_engine

from luban.data.collate.labelled import LabelledBatch
from luban.kernels.limits import BLOCK_SIDES
from luban.models.encoder import EncoderBody
from luban.models.head.rows import Classes
from luban.models.spec import ModelSpec, uniform
from luban.nn.feedforward.plain import GELU
from luban.nn.mixer.grouped import Grouped
from luban.nn.mixer.layout import GlobalRandom, Layout, Local, Strided
from luban.nn.position.two_dimensional import Rope2D
from luban.objectives.labelled import Labelled
from luban.optim.adamw import AdamW
from luban.parallel.engine import TrainEngine

GREYS, LABELS = 16, ("apart", "joined")
HELD_ROWS = 50  # held-out images of a batch
TRIES, DRAWN_ANEW = 120, 200  # curves drawn for an image until all have a place; times that an image is begun
NEAR = 0.1  # relative difference of distances that count as equal


class Level(NamedTuple):
    """How hard images are."""

    dashes: int = 6  # of a long curve
    distractors: int = 3  # short curves, fewer where no place is found for them


LEVELS = [Level(2, 0), Level(3, 1), Level(4, 2), Level(6, 3)]
UNTIMED, MEAN_OF = 5, 50  # steps before the clock runs; steps that a loss is the mean of


class Images(NamedTuple):
    """Batches of one level."""

    train: list[LabelledBatch]
    held: list[LabelledBatch]


def sizes(side: int) -> tuple[float, float, float]:
    """(length of a dash, gap behind it, radius of a disc) in pixels."""
    dash = max(side / 16, 1.6)
    return dash, 0.6 * dash, max(side / 24, 1.0)


def curve(draw: np.random.Generator, side: int, dashes: int) -> list[np.ndarray] | None:
    """Dashes of a smooth curve, each (points, 2) in pixels; None where it leaves the image or crosses itself."""
    dash, gap, _ = sizes(side)
    place = draw.uniform(0.1, 0.9, 2) * side
    inwards = math.atan2(side / 2 - place[1], side / 2 - place[0])
    angle, bend, found = inwards + draw.normal(0, 0.6), 0.0, list[np.ndarray]()
    for _ in range(dashes):
        bend = 0.5 * bend + draw.normal(0, 0.18)
        angle += bend
        along = np.linspace(0, dash, max(int(3 * dash), 4))[:, None]
        points = place + along * np.array([math.cos(angle), math.sin(angle)])
        if points.min() < 1 or points.max() > side - 2:
            return None
        if any(np.abs(points[:, None] - other[None, :]).sum(-1).min() < 2 for other in found[:-1]):
            return None
        found.append(points)
        place = points[-1] + gap * np.array([math.cos(angle), math.sin(angle)])
    return found


def image(draw: np.random.Generator, side: int, joined: bool, level: Level) -> np.ndarray:
    """(side, side) uint8 below GREYS. Of the pairs of ends of one curve and of two, the discs stand at such that are as far apart, so
    that the distance says nothing about the class."""
    for _ in range(DRAWN_ANEW):
        curves = _curves(draw, side, level)
        if curves is None:
            continue
        ends = [(path[0][0], path[-1][-1]) for path in curves[:2]]
        same, other = list(ends), list(product(*ends))
        near = [
            pair
            for pair in product(same, other)
            if abs(math.dist(*pair[0]) - math.dist(*pair[1])) <= NEAR * math.dist(*pair[0])
        ]
        if near:
            break
    else:
        raise SystemExit(f"{side}² pixels have no place for curves of {level.dashes} dashes: use others (--levels)")
    canvas = np.zeros((side, side))
    places = np.rint(np.concatenate([dash for path in curves for dash in path])).astype(int)
    canvas[places[:, 1], places[:, 0]] = 0.7
    ys, xs = np.mgrid[:side, :side]
    radius = sizes(side)[2]
    for x, y in near[draw.integers(len(near))][0 if joined else 1]:
        canvas[(xs - x) ** 2 + (ys - y) ** 2 <= radius**2] = 1.0
    return np.rint(canvas * (GREYS - 1)).astype(np.uint8)


def _curves(draw: np.random.Generator, side: int, level: Level) -> list[list[np.ndarray]] | None:
    """The two long curves, and the distractors that found a place; None where no place was found for both. Pixels of two curves are
    farther apart than neighbouring dashes of one, discs included."""
    apart = sum(sizes(side)[1:]) + 2
    found, taken = list[list[np.ndarray]](), np.zeros((0, 2))
    wanted = [level.dashes, level.dashes, *([max(level.dashes // 2, 1)] * level.distractors)]
    for _ in range(TRIES):
        if not wanted:
            break
        path = curve(draw, side, wanted[0])
        points = None if path is None else np.concatenate(path)
        if points is None or (len(taken) and np.abs(points[:, None] - taken[None]).max(-1).min() < apart):
            continue
        assert path is not None
        found.append(path)
        taken = np.concatenate([taken, points])
        wanted.pop(0)
    return found if len(found) >= 2 else None


def batch_of(seed: int, side: int, rows: int, level: Level) -> LabelledBatch:
    """Images as rows of pixels; T = side²."""
    draw = np.random.default_rng([seed, side])
    labels = draw.integers(2, size=rows)
    tokens = np.stack([image(draw, side, bool(label), level).reshape(-1) for label in labels]).astype(np.int64)
    places = np.indices((side, side), dtype=np.int32).reshape(1, 2, -1)
    last = np.zeros(tokens.shape, dtype=bool)
    last[:, -1] = True
    return LabelledBatch(
        tokens=tokens,
        targets=tokens,
        loss_mask=last,
        documents=np.zeros(tokens.shape, dtype=np.int32),
        positions=places.repeat(rows, 0),
        follows=~last,
        labels=labels,
        weights=np.zeros(rows, dtype=np.float32),
    )


def layouts(side: int) -> dict[str, Layout | None]:
    """Name → layout; blocks are as wide as two rows of pixels, if kernels have such."""
    block = min(max(2 * side, min(BLOCK_SIDES)), max(BLOCK_SIDES))
    return {
        "dense": None,
        "local": Local(block=block, window=2 * block),
        "strided": Strided(block=block, window=block, stride=4),
        "global-random": GlobalRandom(block=block, window=block),
    }


def spec_of(side: int, width: int, layers: int, layout: Layout | None) -> ModelSpec:
    """An encoder with two classes."""
    return uniform(
        vocab_size=GREYS,
        width=width,
        layers=layers,
        context=side**2,
        position=Rope2D(base=float(side)),
        mixer=Grouped(heads=4, kv_heads=4, layout=layout),
        feedforward=GELU(width=4 * width),
        body=EncoderBody(),
        head=Classes(count=2, pooling="mean", dense=False),
    )


def accuracy(engine: TrainEngine, batches: Sequence[LabelledBatch]) -> tuple[float, int]:
    """(share of images whose class is found, images)."""
    device, right = engine.device, []
    for batch in batches:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            tokens, positions = (torch.from_numpy(each).to(device) for each in (batch.tokens, batch.positions))
            logits = engine.model(tokens, positions=positions)
        right += (logits.argmax(-1).cpu().numpy() == batch.labels).tolist()
    return statistics.mean(map(float, right)), len(right)


def run(given: argparse.Namespace, side: int, name: str, images: dict[Level, Images]) -> dict[str, Any]:
    """One layout: its accuracy on the last level's images, on those that it was trained on, and time of a step."""
    layout = layouts(side)[name]
    spec = spec_of(side, given.width, given.layers, layout)
    engine = make_engine(spec, AdamW(lr=given.lr), device=given.device, seed=0, objective=Labelled(labels=LABELS))
    step, seconds, timed, share, count, seen = 0, 0.0, 0, 0.0, 1, 0.0
    for number, (level, of_level) in enumerate(images.items(), 1):
        losses, began = [], clock(given.device)
        while step < given.steps * number // len(images):
            if step == UNTIMED:
                seconds, timed, began = 0.0, step, clock(given.device)
            result = engine.step(
                of_level.train[step % len(of_level.train)], min((step + 1) / max(given.warmup, 1), 1.0)
            )
            losses.append(result.loss)
            step += 1
        seconds += clock(given.device) - began
        share, count = accuracy(engine, of_level.held)
        seen, _ = accuracy(engine, of_level.train[: len(of_level.held)])
        print(
            f"{name}, {step} steps, {level.dashes} dashes, {level.distractors} distractors: loss "
            f"{statistics.mean(losses[-MEAN_OF:]):.3f}, accuracy {share:.1%}, of images that were trained on {seen:.1%}",
            flush=True,
        )
    density = 1.0 if layout is None else layout.density(side**2, heads=4, causal=False)
    error = (share * (1 - share) / count) ** 0.5
    ms = 1e3 * seconds / max(step - timed, 1)
    return {"side": side, "layout": name, "accuracy": share, "error": error, "seen": seen, "ms": ms, "density": density}


def level_of(text: str) -> Level:
    """DASHES:DISTRACTORS."""
    dashes, distractors = map(int, text.split(":"))
    if dashes < 1 or distractors < 0:
        raise ValueError(text)
    return Level(dashes, distractors)


def drawn(given: argparse.Namespace, pool: ProcessPoolExecutor, side: int) -> dict[Level, Images]:
    """The images of every level: at most --images to train on, fewer where fewer are shown."""
    found, steps = {}, -(-given.steps // len(given.levels))
    for number, level in enumerate(given.levels):

        def batches(first: int, count: int, rows: int, level: Level = level) -> list[LabelledBatch]:
            of = partial(batch_of, side=side, rows=rows, level=level)
            return list(pool.map(of, range(first, first + count), chunksize=8))

        begin = 2 * number * 10**6
        train = batches(begin, min(given.images // given.batch, max(steps, 1)), given.batch)
        found[level] = Images(train, batches(begin + 10**6, given.heldout // HELD_ROWS, HELD_ROWS))
    return found


def main() -> None:
    """Draw the images, train every layout, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--side", type=int, nargs="*", default=[32, 64])
    parser.add_argument("--steps", type=int, default=4000, help="of all levels together")
    parser.add_argument("--warmup", type=int, default=200, help="steps in which the rate rises")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--images", type=int, default=20_000, help="training images of a level; drawn once, shown again"
    )
    parser.add_argument(
        "--levels", type=level_of, nargs="+", default=LEVELS, help="DASHES:DISTRACTORS, one after the other"
    )
    parser.add_argument("--heldout", type=int, default=1000, help="images of a level")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--only", nargs="+", choices=list(layouts(32)), help="layouts")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that draw images")
    parser.add_argument("--out", type=Path)
    given, found = parser.parse_args(), list[dict[str, Any]]()
    if given.heldout < HELD_ROWS or given.images < given.batch:
        parser.error(f"--heldout must be at least {HELD_ROWS} and --images at least --batch")
    given.levels = list(dict.fromkeys(given.levels))
    for side in given.side:
        began = time.perf_counter()
        with ProcessPoolExecutor(given.workers) as pool:
            images = drawn(given, pool, side)
        count = sum(len(each.train) for each in images.values()) * given.batch
        print(f"{count:,} images of {side}² in {time.perf_counter() - began:.0f} s", flush=True)
        for name in given.only or layouts(side):
            found.append(run(given, side, name, images))
            print(json.dumps(found[-1]), flush=True)
    print("| pixels | layout | blocks computed | accuracy | trained on | ms a step |\n|-|-|-|-|-|-|")
    for row in found:
        print(
            f"| {row['side'] ** 2:,} | {row['layout']} | {row['density']:.0%} | {row['accuracy']:.1%} ± {row['error']:.1%} | "
            f"{row['seen']:.1%} | {row['ms']:.1f} |"
        )
    if given.out:
        given.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
