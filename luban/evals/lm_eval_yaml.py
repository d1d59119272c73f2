"""Tasks of lm-evaluation-harness, from their YAML: the common subset over local data; anything else is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luban.core.config import from_dict
from luban.core.errors import ConfigError, MissingExtra
from luban.evals.spec import Task, TaskSpec

KINDS = {
    "multiple_choice": "loglikelihood",
    "loglikelihood": "loglikelihood",
    "loglikelihood_rolling": "rolling",
    "generate_until": "generate",
}
READ = {  # fields that have a meaning here
    *(
        "task",
        "dataset_path",
        "dataset_kwargs",
        "output_type",
        "doc_to_text",
        "doc_to_target",
        "doc_to_choice",
        "description",
    ),
    *(
        "test_split",
        "validation_split",
        "training_split",
        "fewshot_split",
        "fewshot_config",
        "num_fewshot",
        "target_delimiter",
    ),
    *("fewshot_delimiter", "generation_kwargs", "filter_list", "repeats", "metric_list", "include"),
}
PASSED_OVER = {  # fields that change no number
    *("task_alias", "tag", "group", "group_alias", "metadata", "should_decontaminate", "doc_to_decontamination_query"),
    *("test_split_only", "dataset_name"),
}
METRICS = {
    "multiple_choice": {"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "brier_score"},
    "loglikelihood": {"acc", "perplexity"},
    "loglikelihood_rolling": {"word_perplexity", "byte_perplexity", "bits_per_byte"},
}
METRIC_FIELDS = {"metric", "aggregation", "higher_is_better"}


def read_yaml(path: Path) -> Task:
    """A task file. Raises ConfigError for one that isn't there, isn't YAML, or needs what isn't read, by its name."""
    config = _load(path)
    try:
        spec = _spec(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    # lm-evaluation-harness sees paths from the current folder; files of a task that was moved with them lie beside it
    folder = Path() if Path(spec.data).exists() else path.parent
    return Task(name=str(config.get("task", path.stem)), spec=spec, folder=folder)


def _load(path: Path) -> dict[str, Any]:
    try:
        import yaml
    except ModuleNotFoundError:
        raise MissingExtra("pyyaml", "eval", "reading a task of lm-evaluation-harness") from None

    class Loader(yaml.SafeLoader):
        """Plain YAML, with functions noted to be refused."""

    Loader.add_constructor("!function", lambda loader, node: {"!function": str(node.value)})
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no table")
    if "include" in found:
        found = {**_load(path.parent / str(found.pop("include"))), **found}
    return found


def _spec(config: dict[str, Any]) -> TaskSpec:
    for name, value in config.items():
        if isinstance(value, dict) and "!function" in value:
            raise ConfigError(f"{name} is a Python function ({value['!function']}), which isn't read: use a template")
        if name not in READ | PASSED_OVER:
            raise ConfigError(f"the field {name} of lm-evaluation-harness isn't read here")
    output = config.get("output_type", "generate_until")
    if output not in KINDS:
        raise ConfigError(f"output_type {output} isn't known: {', '.join(KINDS)} are")
    items, shots = _data(config)
    rolling = output == "loglikelihood_rolling"
    plain: dict[str, Any] = {
        "kind": _kind(config, output),
        "data": items,
        "prompt": "" if rolling else config.get("doc_to_text", ""),
        "target": config.get("doc_to_target") or config.get("doc_to_text", "")
        if rolling
        else config.get("doc_to_target", ""),
        "description": config.get("description") or "",
        "target_delimiter": config.get("target_delimiter", " "),
        "shot_delimiter": config.get("fewshot_delimiter", "\n\n"),
        "shots": 0 if rolling else config.get("num_fewshot") or 0,
        "repeats": config.get("repeats", 1),
    }
    for name in ("prompt", "target", "description"):
        plain[name] = _template(name, plain[name])
    return from_dict(TaskSpec, plain | _shots(config.get("fewshot_config") or {}, shots if shots != items else ""))


def _template(name: str, value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{{{{{value}}}}}"
    if not isinstance(value, str):
        raise ConfigError(f"{name} must be a template or a field's name, {value!r:.60} given")
    return value


def _data(config: dict[str, Any]) -> tuple[str, str]:
    """(file of the items, file of the shots)."""
    if config.get("dataset_path") not in ("json", "csv", "parquet"):
        raise ConfigError(
            f"dataset_path {config.get('dataset_path')!r} isn't local: only json, csv and parquet are read"
        )
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    files = {"train": files} if isinstance(files, str) else files
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ConfigError("dataset_kwargs.data_files must name a file, or one a split")
    split = config.get("test_split") or config.get("validation_split") or next(iter(files))
    drawn = config.get("fewshot_split") or config.get("training_split") or config.get("validation_split") or split
    missing = next((name for name in (split, drawn) if name not in files), None)
    if missing:
        raise ConfigError(f"dataset_kwargs.data_files has no split {missing}")
    return files[split], files[drawn]


def _shots(settings: dict[str, Any], file: str) -> dict[str, Any]:
    unknown = settings.keys() - {"sampler", "samples", "split"}
    if unknown:
        raise ConfigError(f"fewshot_config.{min(unknown)} isn't read here")
    sampler = settings.get("sampler", "default")
    if sampler not in ("default", "first_n"):
        raise ConfigError(f"fewshot_config.sampler {sampler} isn't known: default and first_n are")
    if isinstance(settings.get("samples"), list):
        return {"fixed_shots": settings["samples"]}
    return {"shot_data": file, "shot_order": "first" if sampler == "first_n" else "drawn"}


def _kind(config: dict[str, Any], output: str) -> dict[str, Any]:
    metrics = [{"metric": m} if isinstance(m, str) else m for m in config.get("metric_list") or ()]
    if output != "generate_until":
        for metric in metrics:
            if metric.get("metric") not in METRICS[output] or metric.keys() - METRIC_FIELDS:
                raise ConfigError(f"the metric {metric.get('metric')} of {output} isn't known here")
        if output != "multiple_choice":
            return {"type": KINDS[output]} | ({"bare_target": True} if output == "loglikelihood" else {})
        choices = config.get("doc_to_choice")
        if not choices or isinstance(choices, dict):
            raise ConfigError("doc_to_choice must be a template or a list of texts")
        unconditional = any(metric["metric"] == "acc_mutual_info" for metric in metrics)
        return {"type": "loglikelihood", "choices": choices, "unconditional": unconditional}
    settings = dict(config.get("generation_kwargs") or {})
    until = settings.pop("until", [config.get("fewshot_delimiter", "\n\n")])
    sampled = settings.pop("do_sample", False)
    kind = {
        "type": "generate",
        "stop": [until] if isinstance(until, str) else until,
        "max_tokens": settings.pop("max_gen_toks", 256),
        "temperature": float(settings.pop("temperature", 0.0)) if sampled else 0.0,
        "top_p": settings.pop("top_p", 1.0) if sampled else 1.0,
        "filters": _filters(config.get("filter_list") or ()),
        "metrics": [_metric(metric) for metric in metrics or [{"metric": "exact_match"}]],
    }
    settings.pop("temperature", None)
    if settings:
        raise ConfigError(f"generation_kwargs.{next(iter(settings))} isn't read here")
    return kind


def _filters(chains: Any) -> list[dict[str, Any]]:
    if len(chains) > 1:
        raise ConfigError(f"filter_list has {len(chains)} chains of filters, and one is read: make a task of each")
    found = []
    for step in chains[0]["filter"] if chains else ():
        name = step.get("function")
        if name == "regex" and step.get("group_select", 0) in (0, -1):
            which = "last" if step.get("group_select", 0) == -1 else "first"
            pattern = step.get("regex_pattern", r"#### (\-?[0-9\.\,]+)")
            found.append(
                {"type": "regex", "pattern": pattern, "which": which, "fallback": step.get("fallback", "[invalid]")}
            )
        elif name == "remove_whitespace":
            found.append({"type": "strip"})
        elif name == "lowercase":
            found.append({"type": "lower"})
        elif name != "take_first":
            raise ConfigError(
                f"the filter {name} isn't known here: regex, remove_whitespace, lowercase and take_first are"
            )
    return found


def _metric(metric: dict[str, Any]) -> dict[str, Any] | str:
    """A scorer that gives the same numbers."""
    name, known = metric.get("metric"), METRIC_FIELDS | {"ignore_case", "ignore_punctuation", "regexes_to_ignore"}
    if name in ("bleu", "chrf") and not metric.keys() - METRIC_FIELDS:
        return str(name)
    if name != "exact_match" or metric.keys() - known:
        raise ConfigError(f"the metric {name} with {', '.join(sorted(metric.keys() - {'metric'}))} isn't known here")
    steps: list[dict[str, Any]] = [{"type": "remove", "pattern": p} for p in metric.get("regexes_to_ignore") or ()]
    steps += [{"type": "lower"}] * bool(metric.get("ignore_case"))
    steps += [{"type": "remove_punctuation"}] * bool(metric.get("ignore_punctuation"))
    return {"type": "equal", "filters": steps}
