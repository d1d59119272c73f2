"""Scoring: every token counted once, equal to a direct computation, and compressors that are the real ones."""

import random
import shutil
import subprocess

import pytest
import torch

from luban.evals.compression import compressors
from luban.evals.likelihood import Window, negative_log_likelihood, windows
from luban.nn.lm_head import LMHead


def test_windows_count_every_scored_token_exactly_once():
    for _ in range(200):
        length, context = random.randint(1, 60), random.randint(1, 20)
        stride = random.randint(1, context)
        scored = [random.random() < 0.7 for _ in range(length)]
        counted = []
        for place, window in enumerate(windows(list(range(length)), scored, context, stride)):
            assert len(window.tokens) == len(window.targets) <= context
            assert all(t == s + 1 for s, t in zip(window.tokens, window.targets, strict=True))
            counted += [t for t, s in zip(window.targets, window.scored, strict=True) if s]
            if place:
                seen = next((i for i, s in enumerate(window.scored) if s), len(window.tokens))
                assert seen >= context - stride or len(window.tokens) < context
        assert counted == [i for i in range(1, length) if scored[i]]


class Bigram(torch.nn.Module):
    """Hidden states are one-hot tokens, the head a table: the likelihood of a window can be written down."""

    def __init__(self, size):
        super().__init__()
        self.head = LMHead(size, size, bias=False)
        torch.nn.init.normal_(self.head.weight)

    def forward(self, tokens, mask=None, *, output):
        return torch.nn.functional.one_hot(tokens, self.head.in_features).float()


def test_likelihood_equals_a_direct_sum_whatever_the_batching():
    size = 11
    model = Bigram(size)
    logs = torch.log_softmax(model.head.weight.detach().double().t(), -1)
    cut = []
    for _ in range(23):
        ids = [random.randrange(size) for _ in range(random.randint(2, 30))]
        cut.append(Window(ids[:-1], ids[1:], [random.random() < 0.5 for _ in ids[1:]]))
    want = [-sum(logs[a, b].item() for a, b, s in zip(w.tokens, w.targets, w.scored, strict=True) if s) for w in cut]
    for batch_tokens in (1, 40, 10_000):
        got = negative_log_likelihood(model, cut, batch_tokens=batch_tokens)
        assert got == pytest.approx(want, rel=1e-5, abs=1e-5)


@pytest.mark.skipif(not (shutil.which("gzip") and shutil.which("xz")), reason="gzip and xz are not installed")
def test_compressors_are_the_command_line_ones():
    stream = "".join(random.choices("abcdefgh \n", k=60_000)).encode()
    found = compressors(stream)
    for name, command in (("gzip", ["gzip", "-9", "-n"]), ("xz", ["xz", "-9e"])):
        size = len(subprocess.run(command, input=stream, capture_output=True, check=True).stdout)
        assert abs(found[f"{name}_bits_per_byte"] * len(stream) / 8 - size) <= 64  # headers and checks differ
    assert found["heldout_bytes"] == len(stream)
