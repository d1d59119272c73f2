"""What the demo may take."""

from __future__ import annotations

from pathlib import Path

from luban.demo.life import CPU, GPU, life

LIMIT = 480  # seconds that the stages may take together
OTHERS = 63  # seconds of the stages without a budget, on two quiet cores (docs/MAP.md)


def test_each_stage_leaves_its_artifact_and_reads_only_those_of_earlier_ones(tmp_path):
    out = tmp_path / "a folder with {braces}"
    for sizes in (CPU, GPU):
        left: set[Path] = set()
        for stage in life(out, sizes, seed=7):
            *words, option, own = stage.command
            assert option == "--out" and Path(own) == stage.out and stage.out.parent == out
            read = {out / Path(part).relative_to(out).parts[0] for word in words for part in paths(word, out)}
            assert read <= left, f"{stage.name} reads what no earlier stage leaves: {read - left}"
            left.add(stage.out)
    assert {stage.name for stage in life(out, GPU, 0)} - {stage.name for stage in life(out, CPU, 0)} == {
        "packages",
        "text",
    }


def paths(word: str, out: Path) -> list[str]:
    """The artifacts below `out` that a word of a command names."""
    at = word.find(str(out) + "/")
    return [word[at:]] if at >= 0 else []


def test_budgets_leave_the_other_stages_twice_their_time():
    assert CPU.pretrain_seconds + CPU.sft_seconds + 2 * OTHERS <= LIMIT
    for sizes in (CPU, GPU):
        stages = {stage.name: stage.command for stage in life(Path("demo"), sizes, seed=0)}
        for name, budget in (("pretrain", sizes.pretrain_seconds), ("sft", sizes.sft_seconds)):
            words = stages[name]
            assert words[words.index("--train.budget_seconds") + 1] == str(budget)
