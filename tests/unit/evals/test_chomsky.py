"""Tasks of the Chomsky hierarchy against answers worked out another way; training with several seeds; saved models."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import operator
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from luban.core.errors import ArtifactError, ConfigError
from luban.evals.chomsky.models import MODELS, model_spec
from luban.evals.chomsky.protocol import Protocol, Seeds, accuracies, batch_of, read_protocol, row_tokens, save, train
from luban.evals.chomsky.tasks import TASKS, chomsky_task
from luban.models.build import build_model
from luban.nn.recurrent.tape import TapeLayer

ROOT = Path(__file__).parents[3]
SIGNS = {5: "+", 6: "-", 7: "*", 8: "(", 9: ")"}
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.USub: operator.neg}


def value_of(tokens: list[int], unknown: int = 0) -> int:
    """The expression by Python's grammar, modulo 5."""

    def walk(node):
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.UnaryOp):
            return OPERATIONS[type(node.op)](walk(node.operand))
        return OPERATIONS[type(node.op)](walk(node.left), walk(node.right))

    text = "".join(SIGNS.get(token, str(unknown if token == 10 else token)) for token in tokens)
    return walk(ast.parse(text, mode="eval").body) % 5


def number(bits: list[int]) -> int:
    return int("".join(map(str, bits[::-1])), 2) if bits else 0


def written(value: int, size: int, padding: int) -> list[int]:
    bits = [int(bit) for bit in reversed(f"{value:b}")]
    return bits + [padding] * (size - len(bits))


def stacked(tokens: list[int]) -> list[int]:
    stack: list[int] = []
    for token in tokens:
        if token < 2:
            stack.append(token)
        elif token == 2:
            stack[-1:] = []
        else:
            stack.append(token - 3)
    return stack[::-1] + [2] * (len(tokens) + 1 - len(stack))


def summed(tokens: list[int], combine, extra: int) -> list[int]:
    at = tokens.index(2)
    return written(combine(number(tokens[:at]), number(tokens[at + 1 :])), len(tokens) + extra, 2)


def missing(tokens: list[int]) -> list[int]:
    at, half = tokens.index(2), len(tokens) // 2
    return [tokens[(at + half) % len(tokens)]]


ANSWERS = {
    "even_pairs": lambda t: [int(sum(a != b for a, b in itertools.pairwise(t)) % 2 == 0)],
    "modular_arithmetic": lambda t: [value_of(t)],
    "parity": lambda t: [t.count(1) % 2],
    "cycle_navigation": lambda t: [(t.count(1) - t.count(2)) % 5],
    "stack_manipulation": stacked,
    "reverse_string": lambda t: t[::-1],
    "modular_brackets": lambda t: [value_of(t)],
    "solve_equation": lambda t: [x for x in range(5) if value_of(t[:-2], x) == t[-1]],
    "duplicate_string": lambda t: t * 2,
    "missing_duplicate": missing,
    "odds_first": lambda t: t[::2] + t[1::2],
    "binary_addition": lambda t: summed(t, operator.add, 1),
    "binary_multiplication": lambda t: summed(t, operator.mul, 0),
    "compute_sqrt": lambda t: written(int(number(t) ** 0.5), (len(t) + 1) // 2, 0),
    "bucket_sort": sorted,
}


@pytest.mark.parametrize("name", TASKS)
def test_answers_are_right_and_lengths_are_those_asked_for(name):
    task, rng = TASKS[name], np.random.default_rng(random.randrange(2**31))
    assert set(ANSWERS) == set(TASKS)
    for length in (1, 2, 3, 4, random.randint(5, 40)):
        inputs, answers = task.sample(rng, 5, length)
        assert length <= inputs.shape[1] <= max(length + 1, 3)
        assert inputs.min() >= 0 and inputs.max() < task.inputs and answers.min() >= 0 and answers.max() < task.outputs
        for row, answer in zip(inputs.tolist(), answers.tolist(), strict=True):
            assert ANSWERS[name](row) == answer, row
        assert inputs.shape[1] + answers.shape[1] <= row_tokens(task, length)


def test_there_are_four_regular_four_context_free_and_seven_context_sensitive_tasks():
    levels = [task.level for task in TASKS.values()]
    assert [levels.count(level) for level in ("regular", "context-free", "context-sensitive")] == [4, 4, 7]
    assert len(set(MODELS)) == len(MODELS) == 16


@pytest.mark.parametrize("name", ["stack_rnn", "tape_rnn", "transformer", "transformer_relative", "lstm"])
def test_seeds_together_are_trained_as_each_by_itself(name):
    task, rng = chomsky_task("reverse_string"), np.random.default_rng(1)
    spec = model_spec(name, task, 30, 16)
    tokens, answers = batch_of(task, rng, 4, 7)
    alone, together = ([build_model(spec, seed=n).train() for n in range(3)] for _ in range(2))
    seeds = Seeds(together, vectorised=name != "lstm")
    optimizer = torch.optim.SGD(seeds.trained(), lr=0.5)
    for _ in range(2):
        logits = seeds.logits(tokens, 7, 2)[..., :2]
        loss = F.cross_entropy(logits.flatten(0, 2), answers.expand(3, -1, -1).flatten()) * 3
        optimizer.zero_grad()
        loss.backward()
        seeds.clip(0.1)
        optimizer.step()
    for one in alone:
        plain = torch.optim.SGD(one.parameters(), lr=0.5)
        given = {} if name.startswith("transformer") else {"segments": (tokens == 2).long()}
        for _ in range(2):
            loss = F.cross_entropy(one(tokens, **given)[:, -7:, :2].flatten(0, 1), answers.flatten())
            plain.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(one.parameters(), 0.1)
            plain.step()
    for one, other in zip(alone, seeds.unstacked(), strict=True):
        for (key, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3, msg=key)


SMALL = Protocol(
    task="even_pairs", model="lstm", width=8, seeds=2, steps=40, batch=16, longest=3, test_from=4, test_to=5, lr=3e-2
)


def test_a_trained_model_is_saved_measured_again_and_evaluated_by_the_command(tmp_path: Path):
    from luban.evals.run import EvalOptions, evaluate

    models, steps = train(SMALL)
    assert steps == 40
    by_length = accuracies(models, SMALL)
    best = max(range(2), key=lambda n: sum(by_length[n]))
    share = sum(by_length[best]) / len(by_length[best])
    assert 0.5 < share <= 1
    save(models[best], SMALL, tmp_path / "model")
    assert read_protocol(tmp_path / "model") == SMALL
    found = evaluate(str(tmp_path / "model"), ["chomsky"], tmp_path / "out", EvalOptions(device="cpu")).results
    assert found["chomsky_even_pairs"]["value"] == pytest.approx(share)
    assert found["chomsky_even_pairs_published"]["value"] == 1.0


def test_memories_grow_for_longer_rows_than_those_of_training():
    protocol = replace(SMALL, model="tape_rnn", task="duplicate_string", steps=1, test_from=30, test_to=30, test_rows=2)
    models, _ = train(protocol)
    assert models[0].spec.body.cell.cells < 30
    assert all(0 <= share <= 1 for share in accuracies(models, protocol)[0])


def test_steps_of_computation_stand_between_input_and_answer_and_are_no_input_of_the_tape(monkeypatch):
    task, rng = chomsky_task("reverse_string"), np.random.default_rng(random.randrange(2**31))
    tokens, answers = batch_of(task, rng, 3, 6, computation=2)
    assert tokens.shape == (3, 6 + 12 + 6) and torch.equal(tokens[:, :6].flip(1), answers)
    assert (tokens[:, 6:18] == 3).all() and (tokens[:, 18:] == 2).all()
    jumps = []
    monkeypatch.setattr(TapeLayer, "forward", lambda self, x, given: jumps.append((x.shape[1], given.tolist())) or x)
    protocol = Protocol(
        task="reverse_string", model="tape_rnn", width=8, seeds=1, steps=1, batch=2, longest=1, computation=3
    )
    models, _ = train(replace(protocol, test_from=5, test_to=5, test_rows=2))
    accuracies(models, replace(protocol, test_from=5, test_to=5, test_rows=2))
    assert jumps == [(1 + 3 + 1, [1, 1]), (5 + 15 + 5, [5, 5])]


def test_a_table_of_positions_is_as_large_at_trained_lengths_as_in_tests():
    protocol = replace(SMALL, model="transformer_learned", layers=1, steps=1, width=16, test_rows=3)
    models, _ = train(protocol)
    assert len(accuracies(models, protocol, range(1, 3))[0]) == 2 and len(accuracies(models, protocol)[0]) == 2


def test_sizes_of_a_transformer_are_those_asked_for():
    short = {"model": "transformer_random_learned", "longest": 10, "test_from": 11, "test_to": 20}
    spec = Protocol(**short, width=32, layers=2, position_range=77).spec(40)
    assert (len(spec.layers), spec.width, spec.position.longest) == (2, 32, 77)
    assert Protocol(**short).spec(3000).position.longest == 3000
    assert len(Protocol(model="transformer").spec(40).layers) == 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"computation": -1}, "computation must be at least 0, -1 given"),
        ({"layers": 2}, "layers are those of Transformers: lstm has one"),
        ({"task": "partiy"}, "unknown Chomsky task 'partiy'.*parity"),
        ({"model": "gru"}, "unknown model 'gru'"),
        ({"test_to": 3}, "test lengths go from 4 to 3: none"),
        ({"seeds": 0}, "seeds must be at least 1, 0 given"),
        ({"width": 0}, "width must be at least 1"),
        ({"seconds": 0.0}, "seconds must be above 0"),
        ({"model": "transformer_random_alibi", "position_range": 3}, "position_range 3 is too small"),
        ({"lr": 0.0}, "lr must be above 0, 0.0 given"),
    ],
)
def test_protocols_that_cannot_be_are_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        replace(SMALL, **change)


def test_a_model_that_was_trained_on_no_task_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"it has no chomsky\.json"):
        read_protocol(tmp_path)


@pytest.mark.parametrize("name", ["lstm", "tape_rnn", "transformer_random_relative"])
def test_a_training_that_was_stopped_goes_on_to_the_same_bits(name, tmp_path):
    protocol = Protocol(task="reverse_string", model=name, width=16, seeds=2, steps=6, batch=4, longest=6, test_to=44)
    whole, _ = train(protocol)
    train(replace(protocol, steps=2), folder=tmp_path)
    _, steps = train(replace(protocol, steps=4), folder=tmp_path)
    torch.manual_seed(random.randrange(2**31))  # another process
    resumed, last = train(protocol, folder=tmp_path)
    assert (steps, last) == (4, 6)
    for one, other in zip(whole, resumed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert {file.name for file in tmp_path.iterdir()} == {"training.safetensors"}


def test_state_is_saved_while_training_and_time_of_all_processes_counts(tmp_path, monkeypatch):
    protocol = Protocol(model="rnn", width=8, seeds=1, steps=5, batch=2, longest=3)
    monkeypatch.setattr(Seeds, "clip", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt) if calls.pop() else None)
    calls = [True, False, False, False]
    with pytest.raises(KeyboardInterrupt):
        train(protocol, folder=tmp_path, save_seconds=0)
    calls = [False] * 2
    assert train(protocol, folder=tmp_path)[1] == 5 and not calls, "three steps before, two after"
    assert train(replace(protocol, steps=9, seconds=1e-9), folder=tmp_path)[1] == 5


def test_a_folder_trained_with_other_settings_is_refused_by_what_differs(tmp_path):
    protocol = Protocol(model="rnn", width=8, seeds=1, steps=1, batch=2, longest=3)
    train(protocol, folder=tmp_path)
    with pytest.raises(ConfigError, match=r"batch 2 \(now 4\)"):
        train(replace(protocol, batch=4), folder=tmp_path)


def benchmark():
    spec = importlib.util.spec_from_file_location("chomsky_benchmark", ROOT / "benchmarks" / "chomsky.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_takes_a_kept_row_for_its_own_settings_alone(tmp_path):
    measure = benchmark().measure
    short = Protocol(model="rnn", width=8, seeds=1, steps=2, batch=2, longest=3, test_to=43, test_rows=2)
    row = measure(short, "cpu", str(tmp_path))
    assert row["steps"] == 2 and measure(short, "cpu", str(tmp_path)) == row
    assert measure(replace(short, steps=3), "cpu", str(tmp_path))["steps"] == 3
    with pytest.raises(ConfigError, match="test_to 43"):
        measure(replace(short, steps=3, test_to=45), "cpu", str(tmp_path))


def test_a_model_that_was_trained_otherwise_is_told_how_one_is_made(tmp_path):
    with pytest.raises(ArtifactError, match=r"has no chomsky\.json; benchmarks/chomsky\.py --out DIR trains"):
        read_protocol(tmp_path)
