"""Log-probabilities of preferences under a reference model: computed once, kept beside the tokens in shards of their own."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch

from luban.core.artifact import MANIFEST, ArtifactWriter, Parent, as_parent, read_manifest
from luban.core.errors import LineageError
from luban.core.hashing import data_sha256
from luban.core.log import progress, say
from luban.data.collate.preference import PreferenceRows
from luban.data.groups import COMPUTED, FILES
from luban.data.shards import Shards, split_file
from luban.load.model import LoadedModel
from luban.nn.attention.backend import AttentionBackend
from luban.objectives.preference import AnswerLossModule
from luban.parallel.engine import to_device
from luban.parallel.precision import COMPUTE
from luban.train.recipe import TrainConfig

ROWS = 8  # groups read at once


def with_reference(
    path: Path, model: LoadedModel, parent: Parent, train: TrainConfig, device: torch.device, cache: Path
) -> Path:
    """Preference shards that hold the log-probabilities of `model`; made in `cache`, under a name that depends on the data,
    the model and the precision.

    Raises:
        LineageError: the shards hold those of another model.
    """
    manifest = read_manifest(path)
    if "reference" in manifest.config:
        if manifest.config["reference"] != parent.content_hash:
            raise LineageError(
                f"the reference log-probabilities in {path} are of model {manifest.config['reference'][:12]}, and "
                f"the reference is {parent.name} ({parent.content_hash[:12]}): give --data.path the .jsonl file"
            )
        return path
    identity = data_sha256([manifest.content_hash, parent.content_hash, train.precision, train.seq_len])
    out = cache / f"reference-{identity[:12]}"
    if (out / MANIFEST).is_file():
        return out
    say(f"computing log-probabilities under the reference {parent.name} into {out}")
    config = {**manifest.config, "reference": parent.content_hash, "reference_precision": train.precision}
    parents = (as_parent("preferences", path), parent)
    module = model.module.to(device=device, dtype=COMPUTE[train.precision])
    loss = AnswerLossModule(module, AttentionBackend(train.kernel)).eval()
    with ArtifactWriter(out, kind="shards", config=config, parents=parents) as art:
        shutil.copytree(path / "tokenizer", art.path / "tokenizer")
        for split in ("train", "heldout"):
            figures = manifest.figures.get(split, {"documents": 0})
            for name in ("tokens", "mask", "offsets", *FILES):
                if name not in COMPUTED and split_file(path, split, name).is_file():
                    shutil.copyfile(split_file(path, split, name), split_file(art.path, split, name))
            art.figures[split] = figures
            if figures["documents"]:
                found = reference_logprobs(loss, Shards.open(path, split), train.seq_len, device)
                for name, values in zip(COMPUTED, found, strict=True):
                    values.astype(FILES[name]).tofile(split_file(art.path, split, name))
    return out


@torch.no_grad()
def reference_logprobs(
    loss: AnswerLossModule, shards: Shards, seq_len: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """(documents,) log-probabilities of the answers, (groups,) of mismatched ones; NaN for groups that are too long."""
    rows = PreferenceRows(shards, seq_len, mismatches=True)
    answers = np.full(shards.documents, np.nan, dtype=np.float32)
    mismatched = np.full(rows.groups.count, np.nan, dtype=np.float32)
    with progress("reference", total=rows.rows, unit="groups") as bar:
        for start in range(0, rows.rows, ROWS):
            taken = np.arange(start, min(start + ROWS, rows.rows))
            batch = rows.gather(taken)
            logprobs, lengths = (t.float().cpu().numpy() for t in loss.answer_logprobs(to_device(batch, device)))
            for row, group in enumerate(rows.kept[taken]):
                first, last = rows.groups.first[group], rows.groups.first[group + 1]
                answers[first:last] = logprobs[row, : last - first]
                if lengths[row, -1]:
                    mismatched[group] = logprobs[row, -1]
            bar.advance(len(taken))
    return answers, mismatched
