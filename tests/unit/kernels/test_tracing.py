"""What marks functions for torch.compile without importing it."""

from __future__ import annotations

import subprocess
import sys

import torch

from luban.kernels.tracing import constant_in_graphs


def test_the_mark_is_that_of_torch():
    def ours():
        return 3

    def theirs():
        return 3

    torch.compiler.assume_constant_result(theirs)
    assert vars(constant_in_graphs(ours)) == vars(theirs) != {}


def test_a_model_is_loaded_and_writes_without_the_compiler(tiny_checkpoint):
    """Importing it would add more than a second to every command."""
    code = f"""import sys, luban
engine = luban.Engine(luban.load_model({str(tiny_checkpoint)!r}))
engine.generate("hi", luban.Sampling(max_tokens=3))
print([name for name in ("torch._dynamo", "sympy", "torch.distributed.fsdp") if name in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr
