"""Log-probabilities of preferences under a reference model: computed once, kept beside the tokens in shards of their own."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from luban.core.artifact import MANIFEST, ArtifactWriter, Manifest, Parent, as_parent, read_manifest
from luban.core.errors import ArtifactError, DataError, LineageError
from luban.core.hashing import data_sha256
from luban.core.log import progress, say
from luban.core.whole_directory import incomplete_path
from luban.data.collate.preference import PreferenceRows
from luban.data.groups import COMPUTED, FILES, Groups
from luban.data.shards import Shards, split_file
from luban.load.model import LoadedModel, load_model
from luban.nn.attention.backend import AttentionBackend
from luban.objectives.preference import AnswerLossModule
from luban.parallel.engine import to_device
from luban.parallel.precision import COMPUTE
from luban.train.recipe import TrainConfig

ROWS = 8  # groups read at once


def load_reference(name: str, policy: LoadedModel) -> LoadedModel:
    """The model that a policy is compared with. Raises LineageError where it reads other tokens than the policy."""
    reference = load_model(name)
    if reference.need_tokenizer().content_hash != policy.need_tokenizer().content_hash:
        raise LineageError(
            f"the reference {name} has another tokenizer or chat template than {policy.name}: its log-probabilities would be "
            f"of other tokens"
        )
    return reference


def with_reference(
    path: Path, model: LoadedModel, parent: Parent, train: TrainConfig, device: torch.device, cache: Path
) -> Path:
    """Preference shards that hold the log-probabilities of `model`; made in `cache`, under a name that depends on the data,
    the model and the precision.

    Raises:
        LineageError: the shards hold those of another model or precision, or of shorter texts than the run reads.
    """
    manifest = read_manifest(path)
    if "reference" in manifest.config:
        if manifest.config["reference"] != parent.content_hash:
            raise LineageError(
                f"the reference log-probabilities in {path} are of model {manifest.config['reference'][:12]}, and "
                f"the reference is {parent.name} ({parent.content_hash[:12]}): give --data.path the .jsonl file"
            )
        _require_computed_for(manifest.config, path, train)
        return path
    out = cache / _name(manifest, parent, train)
    if (out / MANIFEST).is_file():
        return out
    say(f"computing log-probabilities under the reference {parent.name} into {out}")
    config = {
        **manifest.config,
        "reference": parent.content_hash,
        "reference_precision": train.precision,
        "reference_seq_len": train.seq_len,
    }
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
                try:
                    found = reference_logprobs(loss, Shards.open(path, split), train.seq_len, device)
                except DataError:
                    if split == "train":
                        raise
                    found = _none_of(Shards.open(path, split))  # all are too long: the run trains without validation
                for name, values in zip(COMPUTED, found, strict=True):
                    values.astype(FILES[name]).tofile(split_file(art.path, split, name))
    return out


def _name(preferences: Manifest, parent: Parent, train: TrainConfig) -> str:
    identity = data_sha256([preferences.content_hash, parent.content_hash, train.precision, train.seq_len])
    return f"reference-{identity[:12]}"


def require_same_reference(run: Path, path: Path, parent: Parent, train: TrainConfig) -> None:
    """Raise ArtifactError where the run, finished or not, was made from other log-probabilities than `with_reference` would
    compute: before it computes them, since the run would be refused after that."""
    preferences = read_manifest(path)
    place = next((each for each in (run, incomplete_path(run)) if (each / MANIFEST).is_file()), None)
    shards = read_manifest(place).parent("shards") if place else None
    if shards is None or "reference" in preferences.config or shards.name == _name(preferences, parent, train):
        return
    known = {each.content_hash for each in shards.parents}
    differs = [
        *["the preferences"] * (preferences.content_hash not in known),
        *["the reference"] * (parent.content_hash not in known),
    ] or ["train.precision or train.seq_len"]
    raise ArtifactError(
        f"{place} is a run in which {' and '.join(differs)} differed: choose another --out, or remove it"
    )


def _require_computed_for(config: Mapping[str, Any], path: Path, train: TrainConfig) -> None:
    """Raise LineageError unless the log-probabilities are of this precision and of all texts that fit `train.seq_len`."""
    precision, longest = config["reference_precision"], config.get("reference_seq_len", 0)
    if precision != train.precision or longest < train.seq_len:
        raise LineageError(
            f"the reference log-probabilities in {path} were computed in {precision} for texts of at most {longest} tokens, and "
            f"train.precision is {train.precision}, train.seq_len {train.seq_len}: give --data.path the .jsonl file"
        )


def _none_of(shards: Shards) -> tuple[np.ndarray, np.ndarray]:
    """As `reference_logprobs` where every group is too long."""
    return tuple(np.full(count, np.nan, dtype=np.float32) for count in (shards.documents, Groups.open(shards).count))  # type: ignore[return-value]


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
