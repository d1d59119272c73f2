"""Ghost Attention: where the instruction stands for the model that writes and for the one that is trained, what is a target, and
that a toy model keeps an instruction over six turns."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from evals_shared import Scripted, read_lines
from tiny_models import write_checkpoint

import luban
from luban.align.ghost_attention import (
    Constraint,
    Constraints,
    GhostConfig,
    ghost_attention,
    read_constraints,
    read_dialogues,
)
from luban.align.prompts import prompt_ids
from luban.align.sft import SFTRecipe, with_shards
from luban.cli.main import main
from luban.core.config import from_dict
from luban.core.errors import ConfigError, DataError, UnfinishedError
from luban.data.shards import Shards
from luban.data.show import document_spans
from luban.evals.requests import Failed, Written
from luban.load.model import load_model
from luban.models.spec import uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.init import NormalInit
from luban.nn.mixer.grouped import Grouped
from luban.tokenizer.tokenizer import load_tokenizer

LETTERS = "abcdefgh"
ONE = Constraints(
    constraint=(Constraint(name="letter", long="Always say {value}.", short="Say {value}", values=("a", "b", "c")),)
)


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def chat(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_the_writer_reads_the_instruction_in_every_turn_and_the_training_dialogue_has_it_once(tmp_path):
    file = write(tmp_path / "d.jsonl", [{"messages": chat("q1", "a1", "q2", "a2", f"q{i}", "a3")} for i in range(40)])
    backend = Scripted(lambda request: "new")
    found = ghost_attention(file, backend, ONE, tmp_path / "out", GhostConfig(short=0.5))
    rows = read_lines(tmp_path / "out" / "dialogues.jsonl")
    assert found == {"rows": 40, "dialogues": 40, "answers written": 40}
    short = 0
    asked = {request.prompt[-1]["content"].rpartition("q")[2]: request for request in backend.asked}
    for i, row in enumerate(rows):
        value = row["constraints"][0].removeprefix("letter=")
        told = [m["content"] for m in asked[str(i)].prompt]
        assert told == [
            f"Always say {value}.\n\nq1",
            "a1",
            f"Always say {value}.\n\nq2",
            "a2",
            f"Always say {value}.\n\nq{i}",
        ]
        first, *others = row["messages"]
        assert first["content"] in (f"Always say {value}.\n\nq1", f"Say {value}\n\nq1")
        short += first["content"].startswith("Say")
        assert [m["content"] for m in others] == ["a1", "q2", "a2", f"q{i}", "new"]
        assert [m.get("weight") for m in row["messages"]] == [None, 0, None, 0, None, None]
    assert 8 <= short <= 32 and len({row["constraints"][0] for row in rows}) == 3


def test_missing_answers_are_written_under_the_instruction_turn_by_turn(tmp_path):
    file = write(tmp_path / "d.jsonl", [{"turns": ["q1", "q2"]}, {"messages": chat("q1", "a1", "q2")}])
    backend = Scripted(lambda request: f"answer {len(request.prompt)}")
    ghost_attention(file, backend, ONE, tmp_path / "out", GhostConfig(every_turn=True, place="system"))
    rows = [row["messages"] for row in read_lines(tmp_path / "out" / "dialogues.jsonl")]
    assert [len(row) for row in rows] == [3, 5, 3, 5]  # a system's message, then one or two exchanges
    assert all(row[0]["role"] == "system" and row[1]["content"] == "q1" for row in rows)
    assert rows[1][2] == {"role": "assistant", "content": "answer 1", "weight": 0}  # what it wrote itself
    assert rows[3][2] == {"role": "assistant", "content": "a1", "weight": 0}  # what the dialogue has
    assert rows[2][2] == {"role": "assistant", "content": "answer 1"}
    ghost_attention(file, backend, ONE, tmp_path / "again", GhostConfig(rewrite=True))
    assert read_lines(tmp_path / "again" / "dialogues.jsonl")[1]["messages"][1]["content"] == "answer 1"


def test_only_the_last_answer_is_trained_on(tiny_checkpoint, tmp_path):
    file = write(tmp_path / "d.jsonl", [{"messages": chat("q1", "a1", "q2", "a2", f"q {i}", "a3")} for i in range(30)])
    ghost_attention(file, Scripted(lambda request: "kept"), ONE, tmp_path / "out", GhostConfig())
    plain = {"init": str(tiny_checkpoint), "data": {"path": str(tmp_path / "out" / "dialogues.jsonl")}}
    ready, _ = with_shards(from_dict(SFTRecipe, {**plain, "train": {"seq_len": 128}}), tmp_path / "cache")
    shards, tokenizer = Shards.open(ready.data.path), load_tokenizer(tiny_checkpoint / "tokenizer")
    for i in range(shards.documents):
        trained = [span["text"] for span in document_spans(shards, i, tokenizer) if span["trained"]]
        assert trained == ["kept<|end|>"]


def test_instructions_join_constraints_of_different_kinds(tmp_path):
    file = write(tmp_path / "d.jsonl", [{"turns": ["q"]}] * 200)
    ghost_attention(file, Scripted(lambda request: "x"), read_constraints(), tmp_path / "out", GhostConfig(most=3))
    drawn = [row["constraints"] for row in read_lines(tmp_path / "out" / "dialogues.jsonl")]
    assert {len(each) for each in drawn} == {1, 2, 3}
    assert all(len({name.partition("=")[0] for name in each}) == len(each) for each in drawn)


def test_what_can_not_be_trained_on_is_left_out_and_counted_and_a_second_call_goes_on(tmp_path):
    file = write(tmp_path / "d.jsonl", [{"turns": [f"q{i}"]} for i in range(4)])

    def say(request):
        text = request.prompt[-1]["content"]
        if text.endswith("q1"):
            return " "
        return Written(text="cut off", finish_reason="length") if text.endswith("q2") else "fine"

    down = Scripted(
        lambda request: Failed(error="down") if request.prompt[-1]["content"].endswith("q3") else say(request)
    )
    with pytest.raises(UnfinishedError, match=r"1 of 4 requests have no answer \(down\)"):
        ghost_attention(file, down, ONE, tmp_path / "out", GhostConfig())
    up = Scripted(say)
    found = ghost_attention(file, up, ONE, tmp_path / "out", GhostConfig())
    assert len(up.asked) == 1
    assert found == {"rows": 2, "dialogues": 4, "answers written": 4, "left out: empty": 1, "left out: cut off": 1}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "x"}, "d.jsonl:1: a row needs messages, or turns"),
        ({"messages": chat("q", "a")[::-1]}, "message 1, of role assistant"),
        ({"messages": [{"role": "system", "content": "x"}]}, "no user turn"),
        ({"messages": [{"role": "user", "content": "x", "weight": 2}]}, "weight is 0 or 1, 2 given"),
    ],
)
def test_rows_that_are_no_dialogues_are_refused_by_line(tmp_path, row, said):
    with pytest.raises(DataError, match=said):
        read_dialogues(write(tmp_path / "d.jsonl", [row]))


def test_settings_that_fit_nothing_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="fraction from 0 to 1"):
        GhostConfig(short=2)
    (tmp_path / "c.toml").write_text('[[constraint]]\nname = "a"\nlong = "x"\nshort = "{value}"\nvalues = ["y"]\n')
    with pytest.raises(ConfigError, match=r"need \{value\}"):
        read_constraints(tmp_path / "c.toml")


@pytest.mark.slow
def test_a_toy_model_keeps_an_instruction_for_six_turns(tmp_path):
    rng = random.Random(0)
    spec = uniform(
        vocab_size=272,
        width=64,
        layers=2,
        context=256,
        mixer=Grouped(heads=4),
        feedforward=SwiGLU(width=96),
        init=NormalInit(std=0.05),
    )
    write_checkpoint(tmp_path / "start", spec)

    def number() -> str:
        return str(rng.randint(0, 999))

    def told(letter: str) -> str:
        return f"say {letter}\n\n{number()}" if letter else number()

    rows = []
    for _ in range(1000):  # a chat model that obeys an instruction in the turn that has it
        asked = [rng.choice(["", rng.choice(LETTERS)]) for _ in range(rng.randint(1, 7))]
        rows.append({"messages": chat(*(text for letter in asked for text in (told(letter), letter or ".")))})
    write(tmp_path / "base.jsonl", rows)
    chats = [{"messages": chat(*(t for _ in range(rng.randint(2, 7)) for t in (number(), ".")))} for _ in range(300)]
    write(tmp_path / "chats.jsonl", chats)
    (tmp_path / "c.toml").write_text(
        f'[[constraint]]\nname = "letter"\nlong = "say {{value}}"\nshort = "say {{value}}"\nvalues = {json.dumps([*LETTERS])}\n'
    )
    settings = "--train.batch_size 16 --train.seq_len 192 --train.compile false --train.precision fp32 --optim.lr 3e-3"
    short = [*settings.split(), "--validation.every", "0", "--train.steps", "120"]

    def tuned(start: str, data: Path, name: str) -> Path:
        files = ["--init", str(tmp_path / start), "--data.path", str(data), "--out", str(tmp_path / name)]
        assert main(["sft", "luban_sft_cpu", *files, *short]) == 0
        return tmp_path / name

    plain = tuned("start", tmp_path / "base.jsonl", "chat")
    words = ["--constraints", str(tmp_path / "c.toml"), "--max-tokens", "4", "--temperature", "0", "--every-turn"]
    out = ["--model", str(plain), "--out", str(tmp_path / "ghost")]
    assert main(["data", "ghost_attention", str(tmp_path / "chats.jsonl"), *out, *words]) == 0
    kept = tuned("chat", tmp_path / "ghost" / "dialogues.jsonl", "kept")

    def recall(run: Path) -> float:
        """The fraction of dialogues whose sixth answer keeps the first turn's instruction."""
        model = load_model(run)
        engine, wanted = luban.Engine(model), [rng.choice(LETTERS) for _ in range(64)]
        held = [chat(told(letter)) for letter in wanted]
        for turn in range(6):
            ids = [prompt_ids(each, model.need_tokenizer()) for each in held]
            said = [r.text for r in engine.generate(ids, luban.Sampling(max_tokens=4, temperature=0.0))]
            if turn == 5:
                return sum(a == b for a, b in zip(said, wanted, strict=True)) / len(wanted)
            held = [[*each, *chat("", text)[1:], *chat(number())] for each, text in zip(held, said, strict=True)]
        raise AssertionError

    assert recall(plain) <= 0.3 and recall(kept) >= 0.95
