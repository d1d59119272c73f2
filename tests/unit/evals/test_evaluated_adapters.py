"""An adapter is measured over its model: as the merged model is, and apart from every other adapter."""

from __future__ import annotations

import pytest
from adapted_models import write_adapted
from evals_shared import CHOICE, COLOURS, read_lines, write_task

import luban
from luban.adapters.lora import LoRA
from luban.core.errors import UsageError
from luban.evals.run import EvalOptions, evaluate
from luban.load.adapter_export import merged
from luban.load.export import export_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluated")


def logprobs_of(out):
    """What was answered, in order."""
    return [row["response"]["logprob"] for row in read_lines(out / "responses.jsonl")]


def test_adapters_share_a_cache_without_sharing_answers(folder):
    base, made = write_adapted(folder, {"a": LoRA(rank=3), "b": LoRA(rank=3)})
    task = write_task(folder, "colours", CHOICE, COLOURS)
    logprobs = {}
    for name in ("", "a", "b"):
        out = folder / f"out_{name}"
        options = EvalOptions(cache=folder / "cache", adapter=None if not name else str(made[name]))
        evaluate(str(base), [task], out, options)
        logprobs[name] = logprobs_of(out)
    export_model(merged(luban.load_model(base, adapter=made["a"])), folder / "merged")
    evaluate(str(folder / "merged"), [task], folder / "out_merged", EvalOptions())
    found = logprobs_of(folder / "out_merged")
    assert found == pytest.approx(logprobs["a"], abs=1e-3)
    assert logprobs["a"] != logprobs["b"] != logprobs[""] != logprobs["a"]


def test_a_server_names_its_own_adapters(folder):
    with pytest.raises(UsageError, match="--model-name"):
        evaluate("http://127.0.0.1:1", ["arithmetic_add_2"], folder / "none", EvalOptions(adapter="x"))
