"""Small models and vocabularies that several tests share."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path

import pytest
import skip_reasons
from hypothesis import HealthCheck, settings

# Deadlines and "too slow" bound wall time; fixtures that hold a vocabulary may serve many examples.
settings.register_profile(
    "luban", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.load_profile("luban")
SPECIALS = (
    "<|bos|>",
    "<|eos|>",
    "<|pad|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
    *(f"<|reserved_{i}|>" for i in range(9)),
)


def pytest_terminal_summary(terminalreporter):
    """List skipped tests by their missing dependency."""
    skipped = terminalreporter.stats.get("skipped", [])
    if lines := skip_reasons.lines([(report.nodeid, str(report.longrepr[2])) for report in skipped]):
        terminalreporter.section("skipped tests, by missing dependency")
        for line in lines:
            terminalreporter.write_line(line)


def write_byte_tokenizer(folder: Path) -> None:
    """A byte-level vocabulary of 16 special tokens and 256 bytes, in the Hugging Face layout."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*SPECIALS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    template = importlib.resources.files("luban.tokenizer").joinpath("chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template)


def write_checkpoint(folder: Path, spec, seed: int = 0) -> Path:
    """A checkpoint of random weights with a byte-level tokenizer."""
    from safetensors.torch import save_file

    from luban import build_model
    from luban.models.spec import write_spec

    folder.mkdir(parents=True)
    write_spec(spec, folder)
    save_file(dict(build_model(spec, seed=seed).named_parameters()), folder / "model.safetensors")
    write_byte_tokenizer(folder / "tokenizer")
    return folder


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
