"""Simulated annotators: who labels what, noise, batches, agreement, cost; preferences that a reward model reads."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter

import pytest
from evals_shared import Scripted, read_json, read_lines

from luban.align.annotate.pool import Annotator, Pool, read_pool
from luban.align.annotate.simulate import annotate, assign, pool_judge
from luban.align.preferences import as_preference_shards
from luban.cli.main import main
from luban.core.errors import ConfigError, UnfinishedError, UsageError
from luban.evals.judges.model import JudgeTemplate, ModelJudge
from luban.evals.judges.pairs import Match
from luban.evals.judges.rules import RuleJudge
from luban.evals.requests import Failed


def pairs(count, rng=random):
    sizes = [rng.sample(range(1, 60), 2) for _ in range(count)]
    return [
        Match(
            id=str(i),
            prompt=f"p{i}",
            first="x",
            second="y",
            answers=("a" * a, "b" * b),
            human="first" if a > b else "second",
        )
        for i, (a, b) in enumerate(sizes)
    ]


def pool_of(*names, noise=0.25, **fields):
    return Pool(annotator=tuple(Annotator(name=name, model="rule:longest", **fields) for name in names), noise=noise)


def by_rule(annotator, pool):
    return RuleJudge(annotator.model.removeprefix("rule:"))


def test_a_quarter_of_the_labels_is_flipped_which_caps_accuracy_at_three_quarters(tmp_path):
    found = annotate(pairs(4000), pool_of("a", "b"), by_rule, tmp_path / "out")
    assert abs(found["human_agreement_with_noise"] - 0.75) <= 0.02 and found["human_agreement"] == 1
    rows = read_lines(tmp_path / "out" / "preferences.jsonl")
    assert abs(sum(len(row["chosen"]) > len(row["rejected"]) for row in rows) / 4000 - 0.75) <= 0.02
    clean = annotate(pairs(50), pool_of("a", noise=0.0), by_rule, tmp_path / "clean")
    assert clean["flipped"] == 0 and clean["labelled"] == 50


def test_annotators_are_drawn_by_weight_the_same_ones_every_time():
    pool = Pool(annotator=(Annotator(name="a", model="m"), Annotator(name="b", model="m", weight=3)))
    some = pairs(4000)
    drawn = Counter(each.name for each in assign(pool, some, 1))
    assert abs(drawn["b"] / 4000 - 0.75) < 0.03
    assert assign(pool, some, 1) == assign(pool, some, 1) != assign(pool, some, 2)


def test_the_order_is_drawn_and_undone():
    first = Pool(annotator=(Annotator(name="a", model="rule:first"),), noise=0.0)
    from luban.align.annotate.simulate import label_pairs

    labels = label_pairs(first.annotator[0], RuleJudge("first"), pairs(1000), noise=0.0, seed=3)
    assert abs(sum(label.verdict == "first" for label in labels) / 1000 - 0.5) < 0.06
    swapped = label_pairs(
        Annotator(name="a", model="m", order="swapped"), RuleJudge("first"), pairs(5), noise=0, seed=0
    )
    assert all(label.verdict == "second" for label in swapped)


def longest(text):
    """The verdict of each numbered pair, or of the only one."""
    found = re.findall(r"(a+|b+)\|(a+|b+)", text)
    verdicts = ["[[A]]" if len(a) > len(b) else "[[B]]" for a, b in found]
    return verdicts[0] if "# Pair" not in text else "\n".join(f"{n}: {v}" for n, v in enumerate(verdicts, 1))


def scripted(say, batch=1):
    backend = Scripted(say)

    def judge_of(annotator, pool):
        template = JudgeTemplate(pair="{{first}}|{{second}}", single="x")
        return pool_judge(annotator, ModelJudge(backend, template))

    return backend, judge_of


def test_pairs_in_one_prompt_are_read_by_their_numbers(tmp_path):
    backend, judge_of = scripted(lambda request: longest(request.prompt[-1]["content"]))
    found = annotate(pairs(22), pool_of("a", noise=0.0, batch=4), judge_of, tmp_path / "out")
    assert found["human_agreement"] == 1 and found["labelled"] == 22 and len(backend.asked) == 6
    assert all(request.temperature == 1 for request in backend.asked)


def test_what_cannot_be_read_is_left_out_and_counted_and_tokens_have_a_price(tmp_path):
    _, judge_of = scripted(lambda request: ("[[C]]", "hm", "[[A]]")[len(request.prompt[-1]["content"]) % 3])
    found = annotate(pairs(60), pool_of("a"), judge_of, tmp_path / "out", prices=(1.0, 1.0))
    assert found["labelled"] + found["ties"] + found["unparsed"] == 60 and found["ties"] and found["cost"] == 0
    labels = read_lines(tmp_path / "out" / "labels.jsonl")
    assert sum(label["verdict"] is None for label in labels) == found["unparsed"]


def test_annotators_that_do_not_answer_are_asked_again(tmp_path):
    some = pairs(12)
    turn = itertools.count()
    _, down = scripted(lambda request: Failed(error="down") if next(turn) % 2 else "[[A]]")
    with pytest.raises(UnfinishedError, match="pairs have no label"):
        annotate(some, pool_of("a"), down, tmp_path / "out")
    backend, up = scripted(lambda request: "[[A]]")
    found = annotate(some, pool_of("a"), up, tmp_path / "out")
    assert found["labelled"] == 12 and 0 < len(backend.asked) < 12


def test_agreement_of_annotators_with_each_other(tmp_path):
    pool = Pool(
        annotator=(
            Annotator(name="a", model="rule:longest"),
            Annotator(name="b", model="rule:longest"),
            Annotator(name="c", model="rule:shortest"),
        ),
        noise=0.0,
    )
    annotate(pairs(30), pool, by_rule, tmp_path / "out", everyone=20)
    table = read_json(tmp_path / "out" / "agreement.json")
    assert table["pairs_of_annotators"]["a b"] == {"agreement": 1.0, "kappa": 1.0, "n": 20}
    assert table["pairwise_agreement"] == pytest.approx(1 / 3) and table["variance"] == pytest.approx(1 / 3)
    assert table["human_agreement_by_annotator"]["c"]["value"] == 0


def test_the_shipped_pool_has_thirteen_annotators_of_three_models():
    pool = read_pool("alpacafarm")
    assert (
        Counter(each.model for each in pool.annotator) == {"strong": 5, "middle": 4, "weak": 4} and pool.noise == 0.25
    )
    assert all(each.template in pool.templates and each.temperature == 1 for each in pool.annotator)
    assert {each.batch for each in pool.annotator} == {1, 4, 5}
    with pytest.raises(UsageError, match="middle, strong, weak aren't given: --models middle=MODEL"):
        pool.with_models({})
    with pytest.raises(UsageError, match="did you mean 'strong'"):
        pool.with_models({"stong": "x"})


def test_preferences_are_read_by_reward_models(tiny_checkpoint, tmp_path):
    import luban

    rows = [
        {"prompt": m.prompt, "output_1": m.answers[0], "output_2": m.answers[1], "preference": 1} for m in pairs(30)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    verb = [
        "annotate",
        str(tmp_path / "pairs.jsonl"),
        "--pool",
        "alpacafarm",
        "--models",
        "strong=rule:longest",
        "middle=rule:longest",
        "weak=rule:shortest",
    ]
    assert main([*verb, "--noise", "0", "--everyone", "5", "--out", str(tmp_path / "prefs")]) == 0
    tokenizer = luban.load_model(tiny_checkpoint).need_tokenizer()
    assert as_preference_shards(tmp_path / "prefs", tokenizer, tmp_path / "cache", 0).is_dir()


def test_prompts_alone_are_answered_twice_by_a_model(tiny_checkpoint, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"instruction": f"Say {i}"}) + "\n" for i in range(4)))
    pool = tmp_path / "pool.toml"
    pool.write_text('[[annotator]]\nname = "a"\nmodel = "rule:first"\n')
    verb = [
        "annotate",
        str(tmp_path / "prompts.jsonl"),
        "--model",
        str(tiny_checkpoint),
        "--max-tokens",
        "6",
        "--pool",
        str(pool),
    ]
    assert main([*verb, "--limit", "3", "--out", str(tmp_path / "prefs")]) == 0
    labels = read_lines(tmp_path / "prefs" / "labels.jsonl")
    assert len(labels) == 3


def test_errors_are_one_line(tmp_path, capsys):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "output_1": "a", "output_2": "b"}\n')
    (tmp_path / "pool.toml").write_text('noise = 0.7\n[[annotator]]\nname = "a"\nmodel = "rule:longest"\n')
    file, out = str(tmp_path / "pairs.jsonl"), str(tmp_path / "o")
    for arguments, said, code in (
        ([file], "takes one of --pool", 2),
        ([file, "--pool", str(tmp_path / "pool.toml")], "noise is a fraction below 0.5", 2),
        ([file, "--pool", "none.toml"], "does not exist", 2),
        ([file, "--pool", "alpacafarm", "--models", "strong"], "--models takes NAME=MODEL", 2),
        ([str(tmp_path / "no.jsonl"), "--pool", "alpacafarm"], "is not a file", 1),
    ):
        assert main(["annotate", *arguments, "--out", out]) == code
        printed = capsys.readouterr().err
        assert said in printed and len(printed.strip().splitlines()) == 1
    with pytest.raises(ConfigError, match="a name of its own"):
        Pool(annotator=())
