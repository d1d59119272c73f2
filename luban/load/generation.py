"""Generation settings from a model's `generation_config.json` (Hugging Face), and what of them isn't built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luban.core.artifact import read_table, write_json
from luban.core.errors import ArtifactError, ConfigError, problem
from luban.generate.sampling import Sampling

FILE = "generation_config.json"
DRAWING = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None}  # read where do_sample is true, as theirs
NEUTRAL: dict[str, Any] = {  # settings that change the text and aren't built, with the values that change nothing
    "num_beams": 1,
    "num_beam_groups": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "typical_p": 1.0,
    "top_h": None,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "penalty_alpha": 0.0,
    "dola_layers": None,
    "guidance_scale": 1.0,
    "forced_eos_token_id": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "bad_words_ids": None,
    "force_words_ids": None,
    "constraints": None,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
    "token_healing": False,
    "watermarking_config": None,
    "max_time": None,
    "num_return_sequences": 1,
}
DEFAULTS = {
    **DRAWING,
    **NEUTRAL,
    "do_sample": False,
    "repetition_penalty": 1.0,
    "max_length": 20,
    "max_new_tokens": None,
    "stop_strings": None,
}


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Generation settings of a model's directory."""

    sampling: Mapping[str, Any] = field(default_factory=dict)  # fields of `Sampling` that generation_config.json sets
    stop_ids: tuple[int, ...] = ()  # tokens that end a text
    unbuilt: tuple[str, ...] = ()  # settings that aren't followed, as "num_beams = 4"
    stored: Mapping[str, Any] = field(default_factory=dict)  # the file's content

    def sample(self, asked: Mapping[str, Any], **otherwise: Any) -> Sampling:
        """`asked` for first (None: not asked), then as generation_config.json sets it, then `otherwise`, then `Sampling`'s defaults."""
        return Sampling(**{**otherwise, **self.sampling, **{k: v for k, v in asked.items() if v is not None}})

    def write(self, folder: Path, **changes: Any) -> None:
        """Write the file into `folder`, these fields changed (None: left out)."""
        content = {name: value for name, value in {**self.stored, **changes}.items() if value is not None}
        if content:
            write_json(folder / FILE, content)


def read_generation(folder: Path, config: Mapping[str, Any], *, context: int, two_sided: bool) -> Generation:
    """Settings from generation_config.json in `folder` or, in old directories, from the model's own `config`.

    Args:
        context: of the model, in tokens; longer limits change nothing.
        two_sided: whether it is an encoder–decoder, whose limits count the answer alone.

    Raises:
        ArtifactError: a value that can't be.
    """
    file = folder / FILE
    stored = read_table(file) if file.is_file() else _from_config(config)
    sampling = dict(_sampling(stored, two_sided=two_sided))
    try:
        Sampling(**sampling)
    except (ConfigError, TypeError) as error:
        raise ArtifactError(f"{file if file.is_file() else folder / 'config.json'}: {problem(error)}") from None
    unbuilt = [
        f"{name} = {stored[name]}" for name, neutral in NEUTRAL.items() if stored.get(name) not in (None, neutral)
    ]
    limit = stored.get("max_length")
    if limit is not None and limit < context and "max_tokens" not in sampling:
        unbuilt.append(f"max_length = {limit}")
    ends = stored.get("eos_token_id", config.get("eos_token_id"))
    ends = tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)
    if not all(isinstance(end, int) for end in ends):
        raise ArtifactError(f"{folder}: eos_token_id must be a token id or a list of them, {list(ends)} given")
    return Generation(sampling=sampling, stop_ids=ends, unbuilt=tuple(unbuilt), stored=stored)


def _from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Old configurations list every default, so that only what differs was meant."""
    return {name: config[name] for name, usual in DEFAULTS.items() if config.get(name) not in (None, usual)}


def _sampling(stored: Mapping[str, Any], *, two_sided: bool) -> Iterator[tuple[str, Any]]:
    drawn = stored.get("do_sample")
    if drawn:
        yield from ((name, stored[name]) for name in DRAWING if stored.get(name) is not None)
    elif drawn is not None:
        yield "temperature", 0.0
    if stored.get("repetition_penalty") is not None:
        yield "repetition_penalty", stored["repetition_penalty"]
    if stored.get("stop_strings"):
        yield "stop", stored["stop_strings"]
    if stored.get("max_new_tokens") is not None:
        yield "max_tokens", stored["max_new_tokens"]
    elif two_sided and stored.get("max_length") is not None:
        yield "max_tokens", stored["max_length"] - 1  # the start token counts there
