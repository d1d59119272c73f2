"""`load_model`: a run, a checkpoint, a Hugging Face directory or a GGUF file → model, tokenizer, lineage checked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from luban.adapters.base import weight_reader
from luban.checkpoint.index import INDEX
from luban.checkpoint.reader import CheckpointReader, StoredTensors
from luban.core.artifact import MANIFEST, Manifest, open_artifact, read_manifest, read_table
from luban.core.errors import ArtifactError, ConfigError, DataError, UnsupportedError, nearest
from luban.core.lineage import ancestor, require_same
from luban.core.log import warn
from luban.core.whole_directory import incomplete_path
from luban.load.adapted import ActiveAdapter, find_adapter, is_adapter, with_adapter
from luban.load.generation import DEFAULTS as GENERATION_FIELDS
from luban.load.generation import FILE as GENERATION
from luban.load.generation import Generation, read_generation
from luban.load.gguf import read_gguf
from luban.load.packaged import PACKAGED, packaged_file
from luban.load.tensors import PICKLED, WEIGHTS, filled, pickle_refusal, read_folder, read_tensors
from luban.models.base import Model
from luban.models.build import DTYPES
from luban.models.convert.base import as_stored, format_of, named_as_now, their_names, to_ours
from luban.models.convert.fields import ReadTable, unread_fields
from luban.models.convert.gguf_file import is_gguf
from luban.models.head.rows import Value
from luban.models.spec import SPEC, ModelSpec, read_spec
from luban.nn.float8 import require_float8
from luban.nn.int8 import pack_for_inference
from luban.nn.linear import store_column_major
from luban.tokenizer.importing.folder import unknown_use, vocabulary_file
from luban.tokenizer.tokenizer import Tokenizer, load_tokenizer

PACKED = "int8", "fp8"  # dense layers in 8 bits, for inference
START_FIELDS = ("decoder_start_token_id", "forced_bos_token_id")  # in generation_config.json of newer transformers
STEP = re.compile(r"step_(\d+)")


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready to be used."""

    spec: ModelSpec
    module: Model  # in evaluation mode
    tokenizer: Tokenizer | None  # none where the directory holds none
    name: str  # for people: the directory's name
    path: Path  # the directory (for GGUF the file) that holds the weights
    manifest: Manifest | None  # of the run or checkpoint; none for foreign directories
    generation: Generation = field(default_factory=Generation)  # generation settings from generation_config.json
    stop_ids: tuple[int, ...] = ()  # tokens that end a generation
    begins_with_bos: bool = False  # whether the model's texts begin with the begin token
    labels: tuple[str, ...] = ()  # names of the head's classes, where a foreign configuration gives them
    unread: tuple[str, ...] = ()  # fields of a foreign configuration that had no meaning here, as "name = value"
    ends_with_eos: bool = False  # whether whole texts, such as an encoder reads, end with the end token
    stored: StoredTensors | None = None  # the weights on disk, of a model on the meta device
    adapter: ActiveAdapter | None = None  # the adapter in the module, and the model under it

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises DataError where the directory held none."""
        if self.tokenizer is None:
            raise DataError(
                f"{self.path} holds no tokenizer (tokenizer.json), which text needs{unknown_use(self.path)}"
            )
        return self.tokenizer


def load_model(
    path_or_name: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    adapter: str | Path | None = None,
) -> LoadedModel:
    """Load a model.

    Args:
        path_or_name: a run (its best checkpoint on held-out text; unfinished: its last), a checkpoint, a Hugging Face directory
            with or without tokenizer files, a GGUF file, or the name of a model that a package carries (smollm2).
        device: such as "cpu" or "cuda"; "meta": of a checkpoint with an index, whose weights stay on the disk (`open_model`).
        dtype: precision of the weights, by torch's name: float32, bfloat16, float16; or, for inference, int8 and on CUDA fp8: dense
            layers in 8 bits with a scale an output, the rest in float32 on a CPU and in bfloat16 on CUDA.
        adapter: a run of adapters or a PEFT directory, to be put over this model. A run of adapters as `path_or_name` is
            loaded over the model that it was trained over.

    Raises:
        ConfigError: a precision that there is not.
        ArtifactError: what the path holds instead, or which file or tensor is missing, damaged or misshapen.
        LineageError: the tokenizer isn't the one that the model was trained with.
    """
    device, dtype = str(device), str(dtype).removeprefix("torch.")
    _require_device(device)
    if dtype not in (*DTYPES, *PACKED):
        raise ConfigError(f"unknown precision '{dtype}'{nearest(dtype, (*DTYPES, *PACKED))}")
    if dtype in PACKED:
        if dtype == "fp8":
            require_float8(torch.device(device), "use --dtype int8 or bfloat16")
        m = load_model(path_or_name, device, "bfloat16" if device.startswith("cuda") else "float32", adapter)
        if m.adapter is not None and m.adapter.config.base != "float":
            raise UnsupportedError(
                f"the base of {m.name} is in {m.adapter.config.base} already: leave --dtype {dtype} out"
            )
        if reader := weight_reader(m.module):
            raise UnsupportedError(
                f"the adapter of {m.name} at {reader} reads the weight that it adapts: leave --dtype {dtype} out, or merge it "
                "first (luban export --merge)"
            )
        pack_for_inference(m.module, dtype)
        return m
    path = Path(path_or_name)
    if adapter is not None or is_adapter(path):
        return _load_adapted(path_or_name, adapter, device, dtype)
    if str(path_or_name) in PACKAGED and not path.exists():
        return _load_gguf(packaged_file(str(path_or_name)), str(path_or_name), device, dtype)
    if is_gguf(path):
        return _load_gguf(path, path.stem, device, dtype)
    if path.is_file() and path.suffix in PICKLED:
        raise ArtifactError(pickle_refusal(path))
    if path.is_dir() and (path / SPEC).is_file():
        return _load_checkpoint(path, device, dtype)
    run = path if path.is_dir() else incomplete_path(path)
    if (run / "checkpoints").is_dir():
        return _load_run(run, path.name, device, dtype)
    if (path / "config.json").is_file():
        return _load_foreign(path, device, dtype)
    if not path.exists():
        if run.is_dir():
            raise ArtifactError(f"{path_or_name} is unfinished ({run}), and has no checkpoint yet")
        raise ArtifactError(
            f"{path_or_name} does not exist: a model is a run, a checkpoint, a Hugging Face directory, a GGUF file "
            f"or one of {', '.join(PACKAGED)}"
        )
    what = (
        f"a {read_manifest(path).kind}" if (path / MANIFEST).is_file() else "no run, checkpoint or Hugging Face model"
    )
    raise ArtifactError(f"{path} holds {what}: a model needs {SPEC} or config.json with {WEIGHTS}")


def _load_adapted(path_or_name: str | Path, adapter: str | Path | None, device: str, dtype: str) -> LoadedModel:
    """A model with an adapter, or a run of adapters over the model that it was trained over. Weights are read in float32,
    in which the hash that tells whether they belong together is known."""
    stored = find_adapter(Path(path_or_name) if adapter is None else Path(adapter))
    base = path_or_name
    if adapter is None:
        base = stored.base
        if not base or not (base in PACKAGED or Path(base).exists()):
            raise ArtifactError(
                f"{path_or_name} is an adapter, and the model that it was trained over{f', {base},' * bool(base)} isn't "
                f"there: load MODEL with --adapter {path_or_name}"
            )
    elif is_adapter(Path(path_or_name)):
        raise ArtifactError(f"{path_or_name} is an adapter itself: give the model under it, or its merged weights")
    m = with_adapter(load_model(base, "cpu"), stored, base=str(base))
    if stored.home is not None:
        m = replace(m, manifest=stored.manifest)
        if (stored.home / "tokenizer").is_dir():
            assert stored.manifest is not None
            _require_tokenizer(stored.home, stored.manifest)
            m = replace(m, tokenizer=load_tokenizer(stored.home / "tokenizer"))
    name = Path(path_or_name if adapter is None else adapter).name
    module = m.module.to(device=device, dtype=DTYPES[dtype])
    if m.adapter is not None:
        m.adapter.config.pack_base(module)
    return replace(m, name=name, path=m.path if adapter is not None else Path(path_or_name), module=module)


def open_model(path_or_name: str | Path, dtype: str | torch.dtype = "float32") -> LoadedModel:
    """`load_model`, but of runs and checkpoints whose tensors can be read one by one the weights stay on the disk, as `stored`,
    and the module is on the meta device."""
    path = Path(path_or_name)
    run, place = path if path.is_dir() else incomplete_path(path), path
    if not (path / SPEC).is_file() and (run / "checkpoints").is_dir():
        place = chosen_checkpoint(run, read_manifest(run))
    indexed = (place / SPEC).is_file() and (place / INDEX).is_file()
    return load_model(path_or_name, "meta" if indexed and not is_adapter(path) else "cpu", dtype)


def _require_device(device: str) -> None:
    """Raise UnsupportedError for a device that this machine hasn't."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise UnsupportedError(f"the device '{device}' can't be used here ({reason}): use --device cpu") from None


def _load_run(run: Path, name: str, device: str, dtype: str) -> LoadedModel:
    manifest = read_manifest(run)
    checkpoint = chosen_checkpoint(run, manifest)
    return _load_checkpoint(checkpoint, device, dtype, name=name, run=(run, manifest))


def chosen_checkpoint(run: Path, manifest: Manifest) -> Path:
    """The checkpoint that a run stands for: of a finished one that which is best on held-out text, where that was
    measured, else the last. Of an unfinished one, a model or an adapter, the last, with a warning that says so.

    Raises:
        ArtifactError: it has none yet.
    """
    place = _chosen_checkpoint(run, manifest)
    if manifest.status != "finished":
        warn(f"{run} is an unfinished run: its last checkpoint so far, {place.name}, is used")
    return place


def _chosen_checkpoint(run: Path, manifest: Manifest) -> Path:
    named = manifest.figures.get("checkpoints") or {}
    for which in ("best", "last") if manifest.status == "finished" else ("last",):
        place = run / "checkpoints" / Path(str(named.get(which))).name
        if named.get(which) and place.is_dir():
            return place
    steps = [
        (int(m[1]), entry)
        for entry in (run / "checkpoints").iterdir()
        if (m := STEP.fullmatch(entry.name)) and (entry / MANIFEST).is_file()
    ]
    if not steps:
        raise ArtifactError(f"{run} has no finished checkpoint yet")
    return max(steps)[1]


def _load_checkpoint(
    path: Path, device: str, dtype: str, *, name: str = "", run: tuple[Path, Manifest] | None = None
) -> LoadedModel:
    verify = not (path / INDEX).is_file()  # else each tensor is hashed when it is read
    manifest = open_artifact(path, verify=verify) if (path / MANIFEST).is_file() else None
    if run is None and path.parent.name == "checkpoints" and (path.parent.parent / MANIFEST).is_file():
        run = path.parent.parent, read_manifest(path.parent.parent)
    home = path if (path / "tokenizer").is_dir() or run is None else run[0]
    tokenizer = load_tokenizer(home / "tokenizer") if (home / "tokenizer").is_dir() else None
    if run is not None and tokenizer is not None:
        _require_tokenizer(*run)
    spec = read_spec(path)
    stored = CheckpointReader.open(path).tensors("model") if (path / INDEX).is_file() else None
    tensors, source = (read_tensors(path / WEIGHTS), path / WEIGHTS) if stored is None else (stored, path)
    module = filled(spec, tensors, source, device=device, dtype=dtype)
    named = tuple((manifest.config if manifest else {}).get("labels", ()))
    m = _loaded(
        spec, module, tokenizer, name or path.name, path, run[1] if run else manifest, _generation(path, {}, spec)
    )
    return replace(m, labels=named, stored=stored if device == "meta" else None)


def _require_tokenizer(run: Path, manifest: Manifest) -> None:
    trained_with = ancestor(manifest, "tokenizer")
    if trained_with is not None and (run / "tokenizer" / MANIFEST).is_file():
        held = read_manifest(run / "tokenizer").content_hash
        require_same(
            "tokenizer",
            f"the model of {run}",
            trained_with.content_hash,
            f"{run / 'tokenizer'}",
            held,
            "put back the tokenizer that the run was trained with",
        )


def _load_foreign(path: Path, device: str, dtype: str) -> LoadedModel:
    config = read_table(path / "config.json")
    generation = read_table(path / GENERATION) if (path / GENERATION).is_file() else {}
    config |= {name: generation[name] for name in START_FIELDS if generation.get(name) is not None}
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "some method") if isinstance(quantised, dict) else quantised
        raise UnsupportedError(
            f"the weights of {path} are quantised ({method}), which isn't read: use the model's float "
            "weights, or a GGUF file"
        )
    form, fields = format_of(config), ReadTable(config)
    spec = form.spec(fields)
    unread = unread_fields(fields, frozenset(GENERATION_FIELDS))
    _warn_unread(path / "config.json", unread)
    theirs = named_as_now(form, spec, read_folder(path))
    spec = as_stored(form, spec, theirs)
    tensors = to_ours(form, spec, theirs)
    module = filled(spec, tensors, path, device=device, dtype=dtype, named=their_names(form, spec))
    held = (path / "tokenizer.json").is_file() or vocabulary_file(path) is not None
    tokenizer = load_tokenizer(path) if held else None
    m = _loaded(spec, module, tokenizer, path.name, path, None, _generation(path, config, spec))
    return replace(m, labels=_labels(config, spec), unread=unread)


def _labels(config: Mapping[str, Any], spec: ModelSpec) -> tuple[str, ...]:
    """The names of the classes in their order; none where they aren't exactly those of the head."""
    named = config.get("id2label") or {}
    places = [str(i) for i in range(getattr(spec.head, "count", isinstance(spec.head, Value)))]
    return tuple(str(named[place]) for place in places) if sorted(named) == sorted(places) else ()


def _generation(folder: Path, config: Mapping[str, Any], spec: ModelSpec) -> Generation:
    return read_generation(folder, config, context=spec.context, two_sided=spec.body.two_sided)


def _load_gguf(path: Path, name: str, device: str, dtype: str) -> LoadedModel:
    held = read_gguf(path, device, dtype)
    _warn_unread(path, held.unread)
    m = _loaded(held.spec, held.module, held.tokenizer, name, path, None)
    return replace(m, begins_with_bos=held.begins_with_bos, unread=held.unread)


def _warn_unread(where: Path, unread: tuple[str, ...]) -> None:
    if unread:
        warn(f"{where}: not read, so the output is wrong if it depends on it: {', '.join(unread)}")


def _loaded(
    spec: ModelSpec,
    module: Model,
    tokenizer: Tokenizer | None,
    name: str,
    path: Path,
    manifest: Manifest | None,
    generation: Generation | None = None,
) -> LoadedModel:
    if tokenizer is not None and tokenizer.vocab_size > spec.vocab_size:
        tokenizer = _without_surplus(tokenizer, spec.vocab_size, path)
    store_column_major(module)
    generation = generation or Generation()
    ends = dict.fromkeys((*(tokenizer.stop_ids if tokenizer else ()), *generation.stop_ids))
    return LoadedModel(
        spec=spec,
        module=module.eval(),
        tokenizer=tokenizer,
        name=name,
        path=path,
        manifest=manifest,
        generation=generation,
        stop_ids=tuple(ends),
        begins_with_bos=begins_with_bos(tokenizer),
        ends_with_eos=ends_with_eos(tokenizer),
    )


def _without_surplus(tokenizer: Tokenizer, vocab_size: int, path: Path) -> Tokenizer:
    """The tokenizer of a model that has no row for its padding token, which some add to the vocabulary alone: without
    that role. Raises ArtifactError where another token has no row."""
    surplus = [name for name, i in tokenizer.special.items() if i >= vocab_size and i != tokenizer.pad_id]
    if surplus or tokenizer.pad_id is None or tokenizer.vocab_size != vocab_size + 1 or tokenizer.pad_id < vocab_size:
        raise ArtifactError(
            f"the tokenizer of {path} has {tokenizer.vocab_size} tokens, the model's vocabulary only {vocab_size}"
            + (f": {surplus[0]} has no row" if surplus else "")
        )
    warn(f"{path}: the model has no row for its padding token {tokenizer.settings.pad_token}, which is left unused")
    settings = replace(tokenizer.settings, pad_token=None)
    return Tokenizer(tokenizer._model, settings, path=tokenizer.path, content_hash=tokenizer.content_hash)


def begins_with_bos(tokenizer: Tokenizer | None) -> bool:
    """True if texts begin with the BOS token: always with Luban's own tokenizers, for others if their files say so."""
    if tokenizer is None or tokenizer.bos_id is None:
        return False
    if tokenizer.path is not None and (tokenizer.path / MANIFEST).is_file():
        return True
    settings = tokenizer.path / "tokenizer_config.json" if tokenizer.path else None
    declared = read_table(settings).get("add_bos_token") if settings and settings.is_file() else None
    if declared is not None:
        return bool(declared)
    return _adds(tokenizer, tokenizer.bos_id)


def ends_with_eos(tokenizer: Tokenizer | None) -> bool:
    """True if whole texts end with the EOS token, determined as in `begins_with_bos`."""
    if tokenizer is None or tokenizer.eos_id is None:
        return False
    own = tokenizer.path is not None and (tokenizer.path / MANIFEST).is_file()
    return own or _adds(tokenizer, tokenizer.eos_id)


def _adds(tokenizer: Tokenizer, token: int) -> bool:
    """True if the vocabulary's post-processor puts this token beside every text."""
    after = tokenizer._model.post_processor
    state = json.loads(after.__getstate__()) if after is not None else None
    return json.dumps(tokenizer.token(token), ensure_ascii=False) in json.dumps(state, ensure_ascii=False)
