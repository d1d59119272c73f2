"""The harness on a small random model: likelihoods by brute force, shots, chats, resuming, caching, figures."""

from __future__ import annotations

import gzip
import json
import math
import random

import numpy as np
import pytest
import torch
from evals_shared import CHOICE, COLOURS, read_json, read_lines, write_task

import luban
from luban.core.errors import ConfigError, DataError, UsageError
from luban.evals.backends.local import LocalBackend
from luban.evals.likelihood import rolling_windows
from luban.evals.requests import Roll, Score, Write
from luban.evals.run import EvalOptions, evaluate


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return luban.load_model(tiny_checkpoint)


@pytest.fixture(scope="module")
def backend(model):
    return LocalBackend(model)


def brute_force(model, context, continuation):
    """The log-probability of a continuation by one forward over its tokens, and whether each is the likeliest."""
    tokenizer = model.need_tokenizer()
    head = tokenizer.encode(context, bos=True)
    ids = tokenizer.encode(context + continuation, bos=True)
    with torch.inference_mode():
        logprobs = model.module(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
    rows = range(len(head) - 1, len(ids) - 1)
    total = sum(logprobs[i, ids[i + 1]].item() for i in rows)
    return total, all(logprobs[i].argmax().item() == ids[i + 1] for i in rows)


def sentence(rng, words):
    return " ".join("".join(rng.choices("abcdefgh", k=rng.randint(1, 7))) for _ in range(words))


def test_continuations_are_scored_as_one_forward_over_each_would(backend, model):
    rng = random.Random()
    pairs = [(sentence(rng, rng.randint(1, 12)), " " + sentence(rng, rng.randint(1, 3))) for _ in range(12)]
    found = backend.respond([Score(context=c, continuation=t) for c, t in pairs])
    for (context, text), response in zip(pairs, found, strict=True):
        total, greedy = brute_force(model, context, text)
        assert response.logprob == pytest.approx(total, rel=3e-6, abs=1e-4) and response.greedy == greedy
        assert response.tokens == len(text) and response.prompt_tokens == len(context) + 1  # bytes are tokens here


def test_spaces_at_a_contexts_end_count_to_the_continuation(backend):
    one, other = backend.respond([Score(context="a b ", continuation="c"), Score(context="a b", continuation=" c")])
    assert one.logprob == pytest.approx(other.logprob, abs=1e-5) and one.tokens == 2


def test_a_continuation_without_a_context_follows_the_begin_token(backend, model):
    (found,) = backend.respond([Score(context="", continuation="xyz")])
    assert found.logprob == pytest.approx(brute_force(model, "", "xyz")[0], rel=3e-6, abs=1e-4)


def test_contexts_that_are_too_long_are_cut_from_the_left_and_it_is_said(backend, model):
    text = sentence(random.Random(), 300)
    (found,) = backend.respond([Score(context=text, continuation=" end")])
    ids = model.need_tokenizer().encode(text + " end", bos=True)
    assert found.truncated == len(ids) - 1 - model.spec.context
    kept = ids[found.truncated :]
    with torch.inference_mode():
        logprobs = model.module(torch.tensor([kept[:-1]]))[0].double().log_softmax(-1)
    total = sum(logprobs[i, kept[i + 1]].item() for i in range(len(kept) - 5, len(kept) - 1))
    assert found.logprob == pytest.approx(total, rel=3e-6, abs=1e-4)
    with pytest.raises(DataError, match="doesn't fit"):
        backend.respond([Score(context="a", continuation=text)])


def test_rolling_windows_count_each_token_once_with_full_windows_to_the_end():
    rng = random.Random()
    for _ in range(200):
        length, context = rng.randint(2, 70), rng.randint(1, 20)
        found = list(rolling_windows(list(range(length)), context))
        counted = [t for w in found for t, s in zip(w.targets, w.scored, strict=True) if s]
        assert counted == list(range(1, length))
        assert all(t == s + 1 for w in found for s, t in zip(w.tokens, w.targets, strict=True))
        assert all(len(w.tokens) == context for w in found) or length - 1 < context


def test_a_rolled_text_is_the_sum_of_its_windows(backend, model):
    text = sentence(random.Random(), 200)
    (found,) = backend.respond([Roll(text=text)])
    ids = model.need_tokenizer().encode(text, bos=True)
    with torch.inference_mode():
        total = 0.0
        for window in rolling_windows(ids, model.spec.context):
            logprobs = model.module(torch.tensor([window.tokens]))[0].double().log_softmax(-1)
            total -= sum(logprobs[i, t].item() for i, t in enumerate(window.targets) if window.scored[i])
    assert found.nats == pytest.approx(total, rel=1e-5) and found.tokens == len(ids) - 1


def test_batch_size_and_order_change_no_number(model):
    rng = random.Random()
    asked = [Score(context=sentence(rng, 6), continuation=" " + sentence(rng, 2)) for _ in range(10)]
    asked += [Roll(text=sentence(rng, 20)) for _ in range(4)]
    asked += [Write(prompt=sentence(rng, 5), max_tokens=6, temperature=t) for t in (0.0, 0.0, 1.0)]
    alike = [LocalBackend(model, batch_tokens=size) for size in (1, 150, 8192)]
    order = rng.sample(range(len(asked)), len(asked))
    first = alike[0].respond(asked)
    for backend in alike[1:]:
        shuffled = backend.respond([asked[i] for i in order])
        for place, response in zip(order, shuffled, strict=True):
            for name, value in response.to_json().items():
                expected = first[place].to_json()[name]
                assert value == (pytest.approx(expected, rel=1e-5) if isinstance(value, float) else expected)


def test_batch_invariant_numbers_are_the_same_bits(tiny_checkpoint):
    rng = random.Random()
    asked = [Score(context=sentence(rng, 6), continuation=" " + sentence(rng, 2)) for _ in range(6)]
    backend = LocalBackend(luban.load_model(tiny_checkpoint), batch_invariant=True)
    together = backend.respond(asked)
    assert [backend.respond([one])[0] for one in asked] == together


def choose(model_path, tmp_path, out="out", rows=COLOURS, spec=CHOICE, **options):
    task = write_task(tmp_path, "colours", spec, rows)
    return evaluate(str(model_path), [task], tmp_path / out, EvalOptions(**options))


def test_choices_are_the_likeliest_in_all_and_by_byte(tiny_checkpoint, model, tmp_path):
    spec = CHOICE | {"kind": {**CHOICE["kind"], "unconditional": True, "unconditional_context": "Answer:"}}
    found = choose(tiny_checkpoint, tmp_path, spec=spec)
    right = [0, 1, 1, 0, 1]
    for row, item, gold in zip(found.rows, COLOURS, right, strict=True):
        totals = np.array([brute_force(model, item["q"], " " + option)[0] for option in item["options"]])
        sizes = np.array([len(option) for option in item["options"]])
        alone = np.array([brute_force(model, "Answer:", " " + option)[0] for option in item["options"]])
        weights = np.exp(totals) / np.exp(totals).sum()
        assert row["reference"] == gold and row["answer"] == totals.argmax()
        assert row["picked"] == {
            "acc": totals.argmax(),
            "acc_norm": (totals / sizes).argmax(),
            "acc_unconditional": (totals - alone).argmax(),
        }
        assert row["scores"]["brier"] == pytest.approx(((weights - np.eye(len(sizes))[gold]) ** 2).sum(), abs=1e-4)
    results = read_json(tmp_path / "out" / "results.json")
    acc = np.mean([row["answer"] == row["reference"] for row in found.rows])
    assert results["acc"]["value"] == acc and results["acc"]["n"] == 5
    assert results["acc"]["interval"][0] <= acc <= results["acc"]["interval"][1]
    assert read_lines(tmp_path / "out" / "answers.jsonl") == json.loads(json.dumps(found.rows))


def test_a_lone_target_is_right_where_the_model_would_write_it(tiny_checkpoint, model, tmp_path):
    greedy = luban.Engine(model).generate("Once", luban.Sampling(max_tokens=3, temperature=0, ignore_eos=True))[0].text
    rows = [{"q": "Once", "a": greedy}, {"q": "Once", "a": "never this"}]
    spec = {"prompt": "{{q}}", "target": "{{a}}", "target_delimiter": "", "id": "{{a}}", "kind": "loglikelihood"}
    found = choose(tiny_checkpoint, tmp_path, rows=rows, spec=spec)
    nats = [-brute_force(model, "Once", row["a"])[0] for row in rows]
    assert [row["scores"]["acc"] for row in found.rows][1] == 0
    assert found.results["perplexity"]["value"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)


def test_rolling_figures_are_of_all_texts_together(tiny_checkpoint, tmp_path):
    rows = [{"text": "one two three"}, {"text": "北京 is a city"}]
    found = choose(tiny_checkpoint, tmp_path, rows=rows, spec={"target": "text", "kind": "rolling"})
    nats = sum(row["scores"]["nats"] for row in found.rows)
    size = sum(len(row["text"].encode()) for row in rows)
    assert found.results["bits_per_byte"]["value"] == pytest.approx(nats / math.log(2) / size)
    assert found.results["word_perplexity"]["value"] == pytest.approx(math.exp(nats / 7), rel=1e-9)


def test_shots_are_drawn_by_seed_never_the_item_and_stand_before_it(tiny_checkpoint, tmp_path):
    found = choose(tiny_checkpoint, tmp_path, shots=2)
    for row, item in zip(found.rows, COLOURS, strict=True):
        assert len(row["shots"]) == 2 and row["item"] not in row["shots"]
        shown = [COLOURS[int(shot)] for shot in row["shots"]]
        worked = "".join(f"{s['q']} {s['options'][[0, 1, 1, 0, 1][COLOURS.index(s)]]}\n\n" for s in shown)
        assert row["prompt"] == f"<|bos|>{worked}{item['q']}"
    again = choose(tiny_checkpoint, tmp_path, out="again", shots=2)
    other = choose(tiny_checkpoint, tmp_path, out="other", shots=2, seed=1)
    assert [row["shots"] for row in again.rows] == [row["shots"] for row in found.rows]
    assert [row["shots"] for row in other.rows] != [row["shots"] for row in found.rows]


def test_shots_from_a_named_split_and_fixed_ones(tiny_checkpoint, tmp_path):
    (tmp_path / "set").mkdir()
    write_task(tmp_path / "set", "test", CHOICE, COLOURS[:2])
    write_task(tmp_path / "set", "train", CHOICE, COLOURS[2:])
    spec = {"data": "set", "split": "test", "shot_split": "train", "shot_order": "first", **CHOICE}
    found = choose(tiny_checkpoint, tmp_path, rows=None, spec=spec, shots=1)
    assert all(row["prompt"].startswith("<|bos|>Snow is white\n\n") for row in found.rows) and len(found.rows) == 2
    spec = {"fixed_shots": COLOURS[3:4], **CHOICE}
    found = choose(tiny_checkpoint, tmp_path, out="fixed", rows=COLOURS[:2], spec=spec, shots=1)
    assert all("Coal is black\n\n" in row["prompt"] for row in found.rows)


def test_the_chat_template_is_visible_in_the_artifact(tiny_checkpoint, tmp_path):
    off = choose(tiny_checkpoint, tmp_path, out="off", shots=1)
    on = choose(tiny_checkpoint, tmp_path, out="on", shots=1, chat="on")
    turns = choose(tiny_checkpoint, tmp_path, out="turns", shots=1, chat="turns")
    assert "<|user|>" not in off.rows[0]["prompt"]
    assert on.rows[0]["prompt"].count("<|user|>") == 1 and on.rows[0]["prompt"].endswith("<|assistant|>")
    assert turns.rows[0]["prompt"].count("<|user|>") == 2
    manifest = read_json(tmp_path / "on" / "manifest.json")
    assert manifest["config"]["chat"] == "on" and manifest["settings"]["about"]["begins_with_bos"] is True
    assert manifest["settings"]["about"]["chat_template"]


def test_texts_are_scored_after_their_filters_and_samples_differ_by_seed(tiny_checkpoint, tmp_path):
    kind = {"type": "generate", "max_tokens": 8, "temperature": 1.0, "filters": ["lower"], "metrics": ["equal", "f1"]}
    rows = [{"q": "Say something", "a": "no"}, {"q": "Say it", "a": ["no", "yes"]}]
    spec = {"prompt": "{{q}}", "target": "{{a}}", "kind": kind}
    found = choose(tiny_checkpoint, tmp_path, rows=rows, spec=spec, repeats=3, seed=5)
    assert all(len(row["answers"]) == 3 and len(set(row["answers"])) > 1 for row in found.rows)
    assert found.rows[0]["answers"] == [raw.lower() for raw in found.rows[0]["raws"]]
    again = choose(tiny_checkpoint, tmp_path, out="b", rows=rows, spec=spec, repeats=3, seed=5)
    assert again.rows == found.rows
    assert choose(tiny_checkpoint, tmp_path, out="c", rows=rows, spec=spec, repeats=3, seed=6).rows != found.rows
    assert found.counts["cut_answers"] == sum(len(raw.encode()) >= 8 for row in found.rows for raw in row["raws"])


def test_what_was_answered_is_not_asked_again(tiny_checkpoint, tmp_path, monkeypatch):
    asked = []
    plain = LocalBackend.respond

    def counted(self, requests):
        asked.append(len(requests))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return plain(self, requests)

    monkeypatch.setattr(LocalBackend, "respond", counted)
    monkeypatch.setattr(LocalBackend, "round_size", 4)
    with pytest.raises(KeyboardInterrupt):
        choose(tiny_checkpoint, tmp_path, cache=tmp_path / "cache")
    kept = tmp_path / "out.incomplete" / "responses.jsonl"
    with open(kept, "a") as file:
        file.write('{"key": "cut off by a cra')
    found = choose(tiny_checkpoint, tmp_path, cache=tmp_path / "cache")
    assert sum(asked[2:]) == 13 - 4 and len(read_lines(tmp_path / "out" / "responses.jsonl")) == 13
    asked[:] = [0, 0]
    again = choose(tiny_checkpoint, tmp_path, out="again", cache=tmp_path / "cache", limit=3)
    assert asked == [0, 0] and again.rows == found.rows[:3]
    assert len(read_lines(tmp_path / "again" / "responses.jsonl")) == 7


def test_several_tasks_have_figures_apart_and_a_group_one_of_all_items(tiny_checkpoint, tmp_path):
    write_task(
        tmp_path, "one", CHOICE | {"group_by": "kind_of"}, [{**row, "kind_of": row["q"][0]} for row in COLOURS[:3]]
    )
    write_task(tmp_path, "two", CHOICE, COLOURS[3:])
    (tmp_path / "both.toml").write_text('tasks = ["one.toml", "two.toml"]\n')
    found = evaluate(str(tiny_checkpoint), [str(tmp_path / "both.toml")], tmp_path / "out", EvalOptions())
    rows = {name: [row["scores"]["acc"] for row in found.rows if row["task"] == name] for name in ("one", "two")}
    assert found.results["both/acc"]["value"] == pytest.approx(np.mean(rows["one"] + rows["two"]))
    assert found.results["one/acc/G"]["value"] == rows["one"][0] and found.results["two/acc"]["n"] == 2


def test_rephrasings_that_are_scored_differently_are_flips(tiny_checkpoint, tmp_path):
    rows = [
        {"prompt": f"q{i}", "about": str(i // 2), "must": ["[\\s\\S]" if i in (0, 1, 2) else "never"]} for i in range(6)
    ]
    spec = {"prompt": "prompt", "same_by": "about", "kind": {"type": "probe", "max_tokens": 3}}
    found = choose(tiny_checkpoint, tmp_path, rows=rows, spec=spec)
    assert found.results["flips"]["value"] == pytest.approx(1 / 3) and found.results["flips"]["n"] == 3
    assert found.results["passed"]["value"] == 0.5


def test_items_that_stand_in_a_corpus_are_marked(tiny_checkpoint, tmp_path):
    rng = random.Random()
    rows = [{"q": sentence(rng, 15), "a": "yes"} for _ in range(6)] + [{"q": "short one", "a": "yes"}]
    common = sentence(rng, 14)
    rows[5]["q"] = common + " " + sentence(rng, 3)
    texts = [f"{sentence(rng, 9)} {rows[1]['q'].upper()}! {sentence(rng, 9)}", *[common] * 11]
    (tmp_path / "seen.txt").write_text("\n".join(texts))
    spec = {"prompt": "{{q}}", "target": "{{a}}", "kind": {"type": "generate", "max_tokens": 1}}
    found = choose(tiny_checkpoint, tmp_path, rows=rows, spec=spec, contamination=(tmp_path / "seen.txt",))
    assert [row["contaminated"] for row in found.rows] == [False, True, False, False, False, False, None]
    assert found.results["exact_match_clean"]["n"] == 5
    assert found.results["contaminated"]["value"] == pytest.approx(1 / 6) and found.results["contaminated"]["n"] == 6
    assert found.counts["too_short_for_contamination"] == 1
    everything = choose(
        tiny_checkpoint, tmp_path, out="all", rows=rows[1:2], spec=spec, contamination=(tmp_path / "seen.txt",)
    )
    assert everything.results["contaminated"]["value"] == 1 and "exact_match_clean" not in everything.results


@pytest.mark.parametrize(
    ("rows", "spec", "options", "said"),
    [
        ([], CHOICE, {}, "has no items"),
        ([{"q": "x", "options": ["a", "b"]}], CHOICE, {}, r"colours.jsonl:1.*needs a field that isn't there: 'gold'"),
        ([{**COLOURS[0], "gold": 2}], CHOICE, {}, "the answer 2 is none of the 2 choices"),
        ([{**COLOURS[0], "gold": "grey"}], CHOICE, {}, "the answer 'grey' is none"),
        ([{**COLOURS[0], "options": ["a"]}], CHOICE, {}, "at least two"),
        (COLOURS, CHOICE | {"fixed_shots": COLOURS[1:2]}, {"shots": 1}, "shot 0 is item 1 itself"),
        (COLOURS[:2], CHOICE, {"shots": 2}, "2 shots are asked for, and there are only 1"),
        (COLOURS, CHOICE | {"id": "{{options | length}}"}, {}, "the id '2' is that of"),
        (COLOURS, CHOICE | {"prompt": "{{q"}, {}, "^task colours: the template.*is not valid"),
        ([{"q": "x", "gold": 0}], CHOICE, {}, "colours.jsonl:1: the field 'options', which choices names, isn't there"),
        (
            [*COLOURS, {"q": "x", "options": ["a", "b"]}],
            CHOICE | {"target": "gold"},
            {},
            "colours.jsonl:6: the field 'gold', which other rows have and target names",
        ),
        ([*COLOURS, {**COLOURS[0], "q": None}], CHOICE, {}, "colours.jsonl:6"),
    ],
)
def test_data_that_is_not_right_is_refused_with_its_place(tiny_checkpoint, tmp_path, rows, spec, options, said):
    with pytest.raises((DataError, ConfigError), match=said):
        choose(tiny_checkpoint, tmp_path, rows=rows, spec=spec, **options)
    assert not list(tmp_path.glob("out*"))


def test_packed_lines_are_read_and_damage_is_named(tiny_checkpoint, tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in COLOURS).encode()
    spec = CHOICE | {"data": "packed.jsonl.gz"}
    for content, said in (
        (gzip.compress(lines), ""),
        (gzip.compress(lines + b"{"), "packed.jsonl.gz:6 is not JSON"),
        (gzip.compress(lines)[:-9], "packed.jsonl.gz cannot be unpacked"),
        (lines, "packed.jsonl.gz cannot be unpacked"),
    ):
        (tmp_path / "packed.jsonl.gz").write_bytes(content)
        if said:
            with pytest.raises(DataError, match=said):
                choose(tiny_checkpoint, tmp_path, spec=spec, out=f"out-{len(content)}")
        else:
            assert choose(tiny_checkpoint, tmp_path, spec=spec).results["acc"]["n"] == len(COLOURS)


def test_tasks_that_make_no_sense_are_refused(tiny_checkpoint, tmp_path):
    greedy = {"type": "generate", "max_tokens": 4}
    for spec, said in (
        ({"kind": "loglikelihood", "prompt": "{{q}}"}, "missing field 'target'"),
        ({"prompt": "{{q}}", "target": "{{a}}"}, "missing field 'kind'"),
        ({"kind": "rolling", "prompt": "{{q}}", "target": "{{a}}"}, "rolling task has a target"),
        ({"kind": greedy, "prompt": "q", "target": "a", "repeats": 2}, "repeats of greedy answers"),
        (
            {"kind": {**greedy, "filters": [{"type": "regex", "pattern": "("}]}, "prompt": "q", "target": "a"},
            "no regular",
        ),
        ({"kind": {**greedy, "metrics": ["exactmatch"]}, "prompt": "q", "target": "a"}, "did you mean 'exact_match'"),
        (CHOICE | {"promt": "x"}, "did you mean 'prompt'"),
    ):
        with pytest.raises(ConfigError, match=said):
            choose(tiny_checkpoint, tmp_path, rows=COLOURS, spec=spec)
    with pytest.raises(UsageError, match="did you mean 'lambada'"):
        evaluate(str(tiny_checkpoint), ["lambda"], tmp_path / "out", EvalOptions())
    with pytest.raises(DataError, match=r"task lambada brings no data.*--data FILE"):
        evaluate(str(tiny_checkpoint), ["lambada"], tmp_path / "out", EvalOptions())
    with pytest.raises(UsageError, match="held-out documents are needed by bits_per_byte: pass --corpus"):
        evaluate(str(tiny_checkpoint), ["bits_per_byte"], tmp_path / "out", EvalOptions())
