"""Every command of docs/ALIGNMENT.md, run in its order on a tiny model."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from luban.cli.main import main

GUIDE = Path(__file__).parents[3] / "docs" / "ALIGNMENT.md"
SHORT = {
    "generate": ["--max-tokens", "6"],
    "sft": ["--train.compile", "false", "--train.precision", "fp32"],
    "rl": ["--rl.prompts", "2", "--rl.samples", "4", "--rl.max_tokens", "6", "--rl.heldout", "2"],
}
TRAINS = ["--train.steps", "2", "--train.batch_size", "4", "--train.seq_len", "128", "--validation.batches", "1"]


def commands() -> list[list[str]]:
    blocks = re.findall(r"^```\n(luban .*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    return [shlex.split(line)[1:] for block in blocks for line in block.splitlines() if line.startswith("luban ")]


@pytest.mark.slow
def test_every_command_of_the_guide_runs(tiny_checkpoint, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_checkpoint, "runs/chat")

    def write(name: str, rows: list[dict]) -> None:
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("scored.jsonl", [{"prompt": f"q {i}", "responses": ["a", "bc", "d"], "scores": [i, 2, 1]} for i in range(30)])
    write(
        "critiques.jsonl",
        [{"prompt": f"q {i}", "response": "a", "critique": "no", "revision": "b"} for i in range(30)],
    )
    write("answers.jsonl", [{"prompt": "q", "completion": "a"}])
    write("prompts.jsonl", [{"prompt": f"q {i}"} for i in range(30)])
    Path("reward.py").write_text("def short(prompt, answer, row):\n    return -len(answer)\n")
    for words in commands():
        if words[0] == "sft":  # what a random model has written is no text
            said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
            write("best.jsonl", [{"messages": [*said[:1], {**said[1], "content": f"red {i}"}]} for i in range(30)])
        verb, trains = words[0], words[0] in ("sft", "reward", "dpo", "rl")
        if verb == "rl":
            trains_with = [*TRAINS[:3], "8", *TRAINS[4:6]]
        else:
            trains_with = TRAINS if trains else []
        extra = SHORT.get(verb, []) if verb != "data" else []
        assert main([*words, *trains_with, *extra]) == 0, (words, capfd.readouterr().err)
    assert len(commands()) > 12
