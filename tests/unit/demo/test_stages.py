"""What the demo may take."""

from __future__ import annotations

from pathlib import Path

from luban.demo.life import CPU, GPU, life

LIMIT = 480  # seconds that the stages may take together
OTHERS = 63  # seconds of the stages without a budget, on two quiet cores (docs/MAP.md)


def test_budgets_leave_the_other_stages_twice_their_time():
    assert CPU.pretrain_seconds + CPU.sft_seconds + 2 * OTHERS <= LIMIT
    for sizes in (CPU, GPU):
        stages = {stage.name: stage.command for stage in life(Path("demo"), sizes, seed=0)}
        for name, budget in (("pretrain", sizes.pretrain_seconds), ("sft", sizes.sft_seconds)):
            words = stages[name]
            assert words[words.index("--train.budget_seconds") + 1] == str(budget)
