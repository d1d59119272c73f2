"""Task files of lm-evaluation-harness: what is read means the same, what isn't is named."""

from __future__ import annotations

import json

import pytest
from evals_shared import COLOURS

from luban.core.errors import ConfigError
from luban.evals.data import read_task
from luban.evals.run import EvalOptions, evaluate
from luban.evals.spec import load_tasks

pytest.importorskip("yaml")
BASE = """
task: colours
dataset_path: json
dataset_kwargs:
  data_files: {test: DIR/test.jsonl, train: DIR/train.jsonl}
test_split: test
fewshot_split: train
fewshot_config: {sampler: first_n}
num_fewshot: 1
metadata: {version: 1.0}
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: options
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - metric: acc_mutual_info
"""
WRITE = """
output_type: generate_until
doc_to_text: "{{q}}?"
doc_to_target: "{{options[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 5, do_sample: false, temperature: 0.0}
filter_list:
  - name: word
    filter:
      - {function: regex, regex_pattern: "([a-z]+)", group_select: -1}
      - {function: take_first}
metric_list: [{metric: exact_match, ignore_case: true, ignore_punctuation: true}]
"""


def write(folder, text, base=BASE):
    for name, rows in (("test", COLOURS[:2]), ("train", COLOURS[3:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text((base + text).replace("DIR", str(folder)))
    return str(folder / "task.yaml")


def test_multiple_choice(tiny_checkpoint, tmp_path):
    found = evaluate(str(tiny_checkpoint), [write(tmp_path, CHOICE)], tmp_path / "out", EvalOptions())
    assert all(row["prompt"].startswith("<|bos|>Coal is black\n\n") for row in found.rows) and len(found.rows) == 2
    assert {"acc", "acc_norm", "acc_unconditional", "brier"} <= found.results.keys()


def test_generate_until_and_an_included_file(tmp_path):
    (tmp_path / "base.yaml").write_text((BASE + WRITE).replace("DIR", str(tmp_path)))
    write(tmp_path, "")
    (tmp_path / "task.yaml").write_text("include: base.yaml\ntask: other\nnum_fewshot: 0\n")
    (task,) = load_tasks(str(tmp_path / "task.yaml"))
    kind = task.spec.kind
    assert task.name == "other" and task.spec.shots == 0 and kind.max_tokens == 5 and kind.stop == ("\n",)
    assert kind.filters[0].apply("so It is Green") == "reen" and kind.filters[0].which == "last"
    items, _, _ = read_task(task)
    assert kind.metrics[0].one("GREEN!", items[0]) == 1 and kind.metrics[0].one("red", items[0]) == 0


def test_rolling(tmp_path):
    (task,) = load_tasks(
        write(tmp_path, 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{q}}"\n')
    )
    assert [item.answer for item in read_task(task)[0]] == ["Grass is", "The sky is"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (CHOICE + "process_docs: !function utils.process\n", r"process_docs is a Python function \(utils.process\)"),
        (CHOICE + "use_prompt: promptsource\n", "the field use_prompt of lm-evaluation-harness isn't read"),
        (CHOICE.replace("acc_mutual_info", "mcc"), "the metric mcc of multiple_choice isn't known"),
        (WRITE.replace("take_first", "majority_vote"), "the filter majority_vote isn't known"),
        (WRITE.replace("ignore_case: true", "multi_target: true"), "the metric exact_match with .*multi_target"),
        (WRITE.replace("temperature: 0.0", "top_k: 3"), "generation_kwargs.top_k isn't read"),
        (CHOICE.replace("multiple_choice", "multiple"), "output_type multiple isn't known"),
        ("fewshot_config: {sampler: balanced}\n" + CHOICE, "sampler balanced isn't known"),
        ("dataset_path: cais/mmlu\n" + CHOICE, "'cais/mmlu' isn't local"),
        ("test_split: dev\n" + CHOICE, "no split dev"),
        ("a: [", "is not YAML"),
    ],
)
def test_what_is_not_read_is_refused_by_name(tmp_path, text, said):
    keys = [line.partition(":")[0] for line in text.splitlines() if line and line[0].isalpha()]
    base = "".join(line + "\n" for line in BASE.splitlines() if line.partition(":")[0] not in keys)
    with pytest.raises(ConfigError, match=said):
        load_tasks(write(tmp_path, text, base))


def test_files_lie_in_the_current_folder_or_beside_the_task(tmp_path, monkeypatch):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "elsewhere").mkdir()
    task = write(tmp_path / "tasks", CHOICE, BASE.replace("DIR/", ""))
    monkeypatch.chdir(tmp_path / "elsewhere")
    items, shots, _ = read_task(load_tasks(task)[0])
    assert [len(items), len(shots)] == [2, len(COLOURS) - 3]
    write(tmp_path / "elsewhere", CHOICE)
    (tmp_path / "elsewhere" / "test.jsonl").write_text(json.dumps(COLOURS[4]) + "\n")
    items, _, _ = read_task(load_tasks(task)[0])  # as lm-evaluation-harness reads it
    assert [item.question for item in items] == [COLOURS[4]["q"]]
