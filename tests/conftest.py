"""Small models and vocabularies that several tests share."""

from __future__ import annotations

import os
from pathlib import Path

# Workers of pytest-xdist fill the cores: with as many threads each as there are cores, threads would mostly wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import skip_reasons
from hypothesis import HealthCheck, settings
from tiny_models import write_checkpoint

# Deadlines and "too slow" bound wall time; fixtures that hold a vocabulary may serve many examples.
settings.register_profile(
    "luban", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.load_profile("luban")


def pytest_terminal_summary(terminalreporter):
    """List skipped tests by their missing dependency."""
    skipped = terminalreporter.stats.get("skipped", [])
    if lines := skip_reasons.lines([(report.nodeid, str(report.longrepr[2])) for report in skipped]):
        terminalreporter.section("skipped tests, by missing dependency")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of a random decoder over bytes, context 512."""
    from luban.models.spec import uniform
    from luban.nn.feedforward.gated import SwiGLU
    from luban.nn.init import NormalInit
    from luban.nn.mixer.grouped import Grouped

    spec = uniform(
        vocab_size=272,
        width=32,
        layers=2,
        context=512,
        mixer=Grouped(heads=4, kv_heads=2),
        feedforward=SwiGLU(width=48),
        init=NormalInit(std=0.3),
    )
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny-bytes", spec)


@pytest.fixture(scope="session")
def tiny_translator(tmp_path_factory) -> Path:
    """A checkpoint of a random encoder–decoder over bytes, context 64, without a chat template."""
    from luban.models.encoder_decoder import EncoderDecoderBody
    from luban.models.spec import uniform
    from luban.nn.feedforward.gated import SwiGLU
    from luban.nn.init import NormalInit
    from luban.nn.mixer.grouped import Grouped

    spec = uniform(
        vocab_size=272,
        width=32,
        layers=2,
        context=64,
        mixer=Grouped(heads=4),
        feedforward=SwiGLU(width=48),
        body=EncoderDecoderBody(decoder_start=2),
        init=NormalInit(std=0.5),
    )
    folder = write_checkpoint(tmp_path_factory.mktemp("models") / "tiny-translator", spec)
    (folder / "tokenizer" / "chat_template.jinja").unlink()
    return folder
