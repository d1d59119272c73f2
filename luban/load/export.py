"""Out of Luban: a Hugging Face directory; and into it: a checkpoint of our own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import tokenizers
import torch
from tokenizers import processors
from torch import Tensor, nn

from luban.checkpoint.storage import write_safetensors
from luban.core.artifact import MANIFEST, ArtifactWriter, as_parent, free_bytes, read_table, write_json
from luban.core.errors import ArtifactError, DataError, UnsupportedError
from luban.core.terms import require_exportable
from luban.core.whole_directory import require_vacant, whole_directory
from luban.load.model import LoadedModel, begins_with_bos, ends_with_eos
from luban.load.tensors import INDEX, WEIGHTS, require_fits
from luban.models.build import state_of
from luban.models.convert.base import Format, Fused, Pair, Stacked, format_for, to_theirs
from luban.models.spec import write_spec
from luban.tokenizer.chat import render
from luban.tokenizer.settings import CONFIG
from luban.tokenizer.tokenizer import load_tokenizer

NO_LENGTH = 10**20
FILE_BYTES = 5 * 10**9  # of one file of weights, at most, unless a single tensor is larger
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def export_model(m: LoadedModel, hf_dir: str | Path) -> Path:
    """Write config.json, model.safetensors and the tokenizer's files, as `transformers` reads them.

    Weights above 5 GB are written as several files with an index; of a model that `open_model` left on the disk no more than
    one of them is in memory. The directory appears whole or not at all. Raises UnsupportedError when no Hugging Face architecture
    expresses the model, ArtifactError when `hf_dir` is already there, LineageError when a licence forbids it.
    """
    if m.adapter is not None:  # else the base alone would be written
        raise UnsupportedError(
            f"{m.name} is an adapter over {m.adapter.base}: export_adapter writes the adapter, and merged(m) has it in its weights"
        )
    if m.manifest:
        require_exportable(m.manifest, m.name)
    form, config = format_for(m.spec)
    out = Path(hf_dir)
    require_vacant(out)
    weights = parameters(m.module) if m.stored is None else ReadyWeights(m)
    files = list(_files(form, m))
    _require_room(out, sum(size for _, size in files))
    config |= {"dtype": str(next(iter(state_of(m.module).values())).dtype).removeprefix("torch.")}
    if m.labels and len(m.labels) == len(config.get("id2label", ())):
        config |= {
            "id2label": dict(zip(config["id2label"], m.labels, strict=True)),
            "label2id": {name: i for i, name in enumerate(m.labels)},
        }
    config |= (
        {"bos_token_id": m.tokenizer.bos_id, "eos_token_id": m.tokenizer.eos_id, "pad_token_id": m.tokenizer.pad_id}
        if m.tokenizer
        else {}
    )
    with whole_directory(out) as folder:
        _write_weights(files, weights, folder)
        write_json(folder / "config.json", config)
        if m.tokenizer:
            copy_tokenizer(m, folder)
            _say_context(folder / CONFIG, m.spec.context)
        _write_generation(m, folder)
    return out


def import_model(m: LoadedModel, out: str | Path) -> Path:
    """Write a loaded model as a checkpoint of Luban's: spec.json, model.safetensors, tokenizer/."""
    tensors = parameters(m.module)
    _require_room(Path(out), sum(t.numel() * t.element_size() for t in tensors.values()))
    parents = (as_parent("model", m.path),) if (m.path / MANIFEST).is_file() else ()
    config = {"imported": m.name, **({"labels": list(m.labels)} if m.labels else {})}
    with ArtifactWriter(out, kind="checkpoint", config=config, parents=parents) as artifact:
        write_spec(m.spec, artifact.path)
        _write_generation(m, artifact.path)
        write_safetensors(tensors, artifact.path / WEIGHTS)
        if m.tokenizer is not None:
            (artifact.path / "tokenizer").mkdir()
            copy_tokenizer(m, artifact.path / "tokenizer", everything=True)
    return Path(out)


def parameters(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer, shared ones once, contiguous on the CPU.

    Raises:
        UnsupportedError: 8-bit weights.
        ArtifactError: a tensor that holds NaN or infinity.
    """
    if any(p.dtype == torch.int8 for p in module.parameters()):
        raise UnsupportedError("a model with int8 weights is for inference alone: load it in float32 to write it")
    found = {name: tensor.to("cpu", copy=False).contiguous() for name, tensor in state_of(module).items()}
    for name, tensor in found.items():
        _require_finite(name, tensor)
    return found


def _require_finite(name: str, tensor: Tensor) -> None:
    if not tensor.isfinite().all():
        raise ArtifactError(f"the tensor {name} holds NaN or infinity: such a model isn't written")


class ReadyWeights(Mapping[str, Tensor]):
    """The weights of a model on the disk, each read, checked and cast to the module's dtype when it is asked for."""

    def __init__(self, m: LoadedModel):
        assert m.stored is not None
        self.stored, self.dtypes, self.path = m.stored, {n: t.dtype for n, t in state_of(m.module).items()}, m.path

    def __getitem__(self, name: str) -> Tensor:
        given = self.stored[name]
        _require_finite(name, given)
        cast = given.to(self.dtypes[name])
        require_fits(given, cast, f"{self.path}: the tensor {name}")
        return cast

    def __iter__(self) -> Iterator[str]:
        return iter(self.dtypes)

    def __len__(self) -> int:
        return len(self.dtypes)


def _files(form: Format, m: LoadedModel) -> Iterator[tuple[list[Pair | Fused | Stacked], int]]:
    """What each file of weights holds, and its bytes."""
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in state_of(m.module).items()}
    held: list[Pair | Fused | Stacked] = []
    size = 0
    for pair in form.pairs(m.spec):
        tensor = pair.join(shapes)
        if held and size + tensor.nbytes > FILE_BYTES:
            yield held, size
            held, size = [], 0
        held.append(pair)
        size += tensor.nbytes
    yield held, size


def _write_weights(
    files: list[tuple[list[Pair | Fused | Stacked], int]], weights: Mapping[str, Tensor], folder: Path
) -> None:
    if len(files) == 1:
        write_safetensors(to_theirs(files[0][0], weights), folder / WEIGHTS)
        return
    where = {}
    for number, (pairs, _) in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_safetensors(to_theirs(pairs, weights), folder / name)
        where |= {pair.theirs: name for pair in pairs}
    write_json(folder / INDEX, {"metadata": {"total_size": sum(size for _, size in files)}, "weight_map": where})


def copy_tokenizer(m: LoadedModel, folder: Path, *, everything: bool = False) -> None:
    """Copy the tokenizer's files (written where it came from none); its manifest too where the copy stays Luban's."""
    tokenizer = m.need_tokenizer()
    if tokenizer.path is None:
        tokenizer.save(folder)
    else:
        source = Path(tokenizer.path)
        source = source if source.is_dir() else source.parent
        for name in (*TOKENIZER_FILES, *((MANIFEST,) if everything else ())):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    _mark_ends(m, folder)


def template_begins_text(m: LoadedModel) -> bool:
    """True if the chat template writes the begin token that the tokenizer puts before every text, too."""
    tokenizer = m.tokenizer
    if tokenizer is None or tokenizer.chat_template is None or tokenizer.bos_id is None or not m.begins_with_bos:
        return False
    try:
        return render([{"role": "user", "content": "x"}], tokenizer).token_ids[:1] == [tokenizer.bos_id]
    except DataError:  # a template that refuses this conversation
        return "bos_token" in tokenizer.chat_template


def _mark_ends(m: LoadedModel, folder: Path) -> None:
    """Where the model's texts begin with the begin token (and sources end with the end token) and the files don't say so,
    let `tokenizer.json` put them there, so that the copy reads texts as the model does, in transformers too."""
    copied = load_tokenizer(folder)
    head = m.begins_with_bos and not begins_with_bos(copied)
    tail = m.ends_with_eos and m.spec.body.two_sided and not ends_with_eos(copied)
    if not head and not tail:
        return
    file = folder / TOKENIZER_FILES[0]
    model = tokenizers.Tokenizer.from_file(str(file))
    ids = (copied.bos_id if head else None, copied.eos_id if tail else None)
    marks = {copied.token(i) or "": i for i in ids if i is not None}
    single = " ".join([*list(marks)[:head], "$A", *list(marks)[head:]])
    ends = processors.TemplateProcessing(
        single=single, pair=f"{single} {single.replace('$A', '$B')}", special_tokens=list(marks.items())
    )
    model.post_processor = ends if model.post_processor is None else processors.Sequence([model.post_processor, ends])
    model.save(str(file))


def _say_context(file: Path, context: int) -> None:
    """The model's context as `model_max_length` where the file names no length, or the one that transformers writes for
    none (1e30)."""
    settings = read_table(file) if file.is_file() else {}
    length = settings.get("model_max_length")
    if not isinstance(length, (int, float)) or length > NO_LENGTH:
        write_json(file, {**settings, "model_max_length": context})


def _write_generation(m: LoadedModel, folder: Path) -> None:
    stops = list(m.stop_ids)
    begin = {"bos_token_id": m.tokenizer.bos_id} if m.tokenizer else {}
    m.generation.write(folder, eos_token_id=stops[0] if len(stops) == 1 else stops or None, **begin)


def _require_room(out: Path, needed: int) -> None:
    if needed > free_bytes(out):
        raise DataError(
            f"the model needs {needed / 1e6:.0f} MB at {out}, and only {free_bytes(out) / 1e6:.0f} MB are free"
        )
