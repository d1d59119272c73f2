"""GGUF files of every architecture that is read: a random model of transformers, written with the gguf package's own table
of names as llama.cpp's converter does, read back; and the keys that change numbers."""

from __future__ import annotations

import random
import shutil

import numpy as np
import pytest
import torch

import luban
from luban.core.errors import ArtifactError, DataError, UnsupportedError
from luban.core.log import _warned
from luban.nn.position.scaling import Linear, YaRN

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
ARCHITECTURES = {
    "llama": ("llama", gguf.MODEL_ARCH.LLAMA),
    "qwen2": ("qwen2", gguf.MODEL_ARCH.QWEN2),
    "qwen3": ("qwen3", gguf.MODEL_ARCH.QWEN3),
    "gemma": ("gemma", gguf.MODEL_ARCH.GEMMA),
    "gemma3": ("gemma3_text", gguf.MODEL_ARCH.GEMMA3),
    "phi2": ("phi", gguf.MODEL_ARCH.PHI2),
    "phi3": ("phi3", gguf.MODEL_ARCH.PHI3),
}
LAYERS, CONTEXT = 7, 64  # past six layers, after which Gemma 3's pattern repeats
TOKENS = ["<unk>", "<|end|>", *(chr(c) for c in range(ord("!"), ord("~") + 1)), "Ġ", "Ċ", "ab", "abc"]


def model_of(name: str, rng: random.Random):
    """A random model of transformers, norms and biases included."""
    kv_heads, head = rng.choice([1, 2]), 8
    heads = kv_heads * 2
    theta = 1_000_000.0 if name == "gemma3" else 10_000.0
    sizes = {
        "vocab_size": len(TOKENS),
        "hidden_size": heads * head,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }
    if name in ("phi2", "phi3"):
        sizes["rope_parameters"]["partial_rotary_factor"] = 0.5
    if name == "gemma3":
        sizes["rope_parameters"] = None
        sizes |= {"query_pre_attn_scalar": head}
    if name in ("gemma", "gemma3", "qwen3"):
        sizes["head_dim"] = head
    if name in ("gemma3", "phi3"):
        sizes["sliding_window"] = 5
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(ARCHITECTURES[name][0], **sizes)
    ).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter.data, std=0.2)
    return model


def converted(name: str, model) -> dict[str, np.ndarray]:
    """Tensors as llama.cpp's converter stores them."""
    names = gguf.get_tensor_name_map(ARCHITECTURES[name][1], LAYERS)
    config, found = model.config, {}
    for theirs, tensor in model.state_dict().items():
        if theirs == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        if name.startswith("gemma") and theirs.endswith("norm.weight"):
            array = array + 1
        if name == "llama" and (".q_proj" in theirs or ".k_proj" in theirs):
            heads = config.num_attention_heads if ".q_proj" in theirs else config.num_key_value_heads
            halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        found[names.get_name(theirs, try_suffixes=(".weight", ".bias"))] = np.ascontiguousarray(array)
    return found


def write(path, name: str, model, *, extra=lambda writer: None, tokens=TOKENS, **options):
    """The model as a GGUF file (or several, with `split_max_tensors`)."""
    writer, config = gguf.GGUFWriter(path, name, **options), model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(head // 2 if name in ("phi2", "phi3") else head)
    if name == "phi2":
        writer.add_layer_norm_eps(config.layer_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if name in ("gemma", "gemma3", "qwen3"):
        writer.add_key_length(head)
        writer.add_value_length(head)
    if name in ("gemma3", "phi3"):
        writer.add_sliding_window(config.sliding_window)
    writer.add_file_type(0)
    if tokens:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types([2, 3] + [1] * (len(tokens) - 2))
        writer.add_token_merges(["a b", "ab c"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(1)
    else:
        writer.add_vocab_size(config.vocab_size)
    extra(writer)
    for tensor, array in converted(name, model).items():
        writer.add_tensor(tensor, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def rng():
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return random.Random(seed)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_the_models_that_was_written(name, tmp_path, rng):
    theirs = model_of(name, rng)
    ours = luban.load_model(write(tmp_path / "model.gguf", name, theirs))
    assert ours.unread == ()
    tokens = torch.randint(0, len(TOKENS), (2, 19))
    torch.testing.assert_close(ours.module(tokens), theirs(tokens).logits, atol=5e-4, rtol=1e-4)
    luban.export_model(ours, tmp_path / "out")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(back(tokens).logits, theirs(tokens).logits, atol=5e-4, rtol=1e-4)


def test_old_phi_2_files_hold_queries_keys_and_values_in_one(tmp_path, rng, monkeypatch):
    theirs = model_of("phi2", rng)
    plain = converted("phi2", theirs)
    for kind in ("weight", "bias"):
        for i in range(LAYERS):
            parts = [plain.pop(f"blk.{i}.attn_{part}.{kind}") for part in "qkv"]
            plain[f"blk.{i}.attn_qkv.{kind}"] = np.concatenate(parts)
    monkeypatch.setitem(globals(), "converted", lambda *_: plain)
    ours, tokens = luban.load_model(write(tmp_path / "old.gguf", "phi2", theirs)), torch.randint(0, len(TOKENS), (2, 9))
    torch.testing.assert_close(ours.module(tokens), theirs(tokens).logits, atol=5e-4, rtol=1e-4)


def test_split_files_are_read_from_any_part(tmp_path, rng):
    theirs, tokens = model_of("llama", rng), torch.randint(0, len(TOKENS), (2, 9))
    write(tmp_path / "model.gguf", "llama", theirs, split_max_tensors=20)
    parts = sorted(tmp_path.glob("model-*.gguf"))
    assert len(parts) > 2
    for part in (parts[0], parts[-1]):
        got = luban.load_model(part)
        torch.testing.assert_close(got.module(tokens), theirs(tokens).logits, atol=5e-4, rtol=1e-4)
        assert got.tokenizer.encode("abc") == [len(TOKENS) - 1]
    parts[1].unlink()
    with pytest.raises(ArtifactError, match=f"one of {len(parts)} parts, and .*{parts[1].name} is missing"):
        luban.load_model(parts[0])
    renamed = parts[0].rename(tmp_path / "first.gguf")
    with pytest.raises(ArtifactError, match="must be called NAME-00001-of-"):
        luban.load_model(renamed)


@pytest.mark.parametrize(
    "name", ["MODEL.GGUF", "sha256-74a4da8c9fdbcd15bd1f6d01d621410d31c6fc00986f5eb687824e7b93d7a9db"]
)
def test_files_of_other_names_are_known_by_what_they_begin_with(name, tmp_path, rng):
    theirs, tokens = model_of("llama", rng), torch.randint(0, len(TOKENS), (2, 9))
    write(tmp_path / "model.gguf", "llama", theirs)
    shutil.move(tmp_path / "model.gguf", tmp_path / name)
    ours = luban.load_model(tmp_path / name)
    torch.testing.assert_close(ours.module(tokens), theirs(tokens).logits, atol=5e-4, rtol=1e-4)


def test_a_file_without_a_vocabulary_is_a_model_for_token_ids(tmp_path, rng):
    theirs = model_of("llama", rng)
    ours = luban.load_model(write(tmp_path / "model.gguf", "llama", theirs, tokens=()))
    assert ours.tokenizer is None and not ours.begins_with_bos
    (result,) = luban.Engine(ours).generate([[3, 4]], luban.Sampling(max_tokens=3, temperature=0))
    assert result.token_ids[0] == theirs(torch.tensor([[3, 4]])).logits[0, -1].argmax()
    with pytest.raises(DataError, match="holds no tokenizer"):
        luban.Engine(ours).generate("text")


def scaled(tmp_path, rng, **keys):
    """The rotary scaling of a file with these keys."""

    def extra(writer):
        for key, value in keys.items():
            add = writer.add_string if isinstance(value, str) else writer.add_float32
            (writer.add_uint32 if isinstance(value, int) else add)(f"llama.rope.{key.replace('__', '.')}", value)

    return luban.load_model(
        write(tmp_path / "m.gguf", "llama", model_of("llama", rng), extra=extra)
    ).spec.position.scaling


def test_rotary_scaling_as_llama_cpp_reads_it(tmp_path, rng):
    assert scaled(tmp_path, rng, scale_linear=4.0) == Linear(factor=4.0)  # the old name
    assert scaled(tmp_path, rng, scaling__factor=3.0) == Linear(factor=3.0)  # linear where no type is named
    assert scaled(tmp_path, rng, scaling__factor=3.0, scale_linear=4.0) == Linear(factor=3.0)
    assert scaled(tmp_path, rng, scaling__factor=1.0) is None
    assert scaled(tmp_path, rng, scaling__type="linear") is None
    assert scaled(tmp_path, rng, scaling__type="none", scaling__factor=4.0) is None
    yarn = scaled(tmp_path, rng, scaling__type="yarn", scaling__factor=4.0, scaling__original_context_length=16)
    assert yarn == YaRN(factor=4.0, original=16)
    assert scaled(tmp_path, rng, scaling__type="yarn", scaling__factor=4.0).original == CONTEXT
    assert scaled(tmp_path, rng, scaling__attn_factor=1.0) is None
    with pytest.raises(UnsupportedError, match=r"rope\.scaling\.attn_factor = 1\.5"):
        scaled(tmp_path, rng, scaling__attn_factor=1.5)
    with pytest.raises(UnsupportedError, match="rotary scaling 'longrope'"):
        scaled(tmp_path, rng, scaling__type="longrope", scaling__factor=4.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [("attn_logit_softcapping", 50.0), ("logit_scale", 0.5), ("attention.sliding_window", 9), ("expert_count", 4)],
)
def test_keys_that_change_the_computation_are_refused_by_name(tmp_path, rng, key, value):
    def extra(writer):
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"llama.{key}", value)

    with pytest.raises(UnsupportedError, match=rf"llama\.{key} = {value}, which changes the computation"):
        luban.load_model(write(tmp_path / "m.gguf", "llama", model_of("llama", rng), extra=extra))


def test_other_keys_that_are_not_read_are_listed_once(tmp_path, rng, capsys):
    def extra(writer):
        writer.add_bool("tokenizer.ggml.remove_extra_whitespaces", True)
        writer.add_string("general.basename", "x")

    file = write(tmp_path / "m.gguf", "llama", model_of("llama", rng), extra=extra)
    _warned.clear()
    for _ in range(2):
        assert luban.load_model(file).unread == ("tokenizer.ggml.remove_extra_whitespaces = True",)
    assert capsys.readouterr().err.count("not read") == 1


@pytest.mark.parametrize(
    ("pre", "declared", "begins"),
    [
        ("llama-bpe", None, True),
        ("llama3", None, True),
        ("llama-bpe", False, False),
        ("tekken", None, True),
        ("gpt-2", None, False),
        ("gpt-2", True, True),
        ("smaug-bpe", None, False),
    ],
)
def test_texts_begin_with_the_begin_token_where_llama_cpp_adds_it(tmp_path, rng, pre, declared, begins):
    def extra(writer):
        writer.add_string("tokenizer.ggml.pre", pre)
        if declared is not None:
            writer.add_add_bos_token(declared)

    model = model_of("llama", rng)

    class Writer(gguf.GGUFWriter):
        def add_tokenizer_pre(self, _: str) -> None:  # `extra` says it
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", Writer)
        m = luban.load_model(write(tmp_path / "m.gguf", "llama", model, extra=extra))
    assert m.begins_with_bos == begins
    assert (luban.Engine(m).tokens_of("a")[0] == 1) == begins


def test_a_file_that_does_not_say_how_words_are_cut_gets_llama_cpps_default_and_a_warning(tmp_path, rng, capsys):
    class Writer(gguf.GGUFWriter):
        def add_tokenizer_pre(self, _: str) -> None:
            pass

    _warned.clear()
    tokens = [*TOKENS, "12", "123", "1234", "$$", "a$"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", Writer)
        patch.setattr(Writer, "add_token_merges", lambda w, _: w.add_array("tokenizer.ggml.merges", MERGES))
        model = model_of("llama", rng)
        model.resize_token_embeddings(len(tokens))
        m = luban.load_model(write(tmp_path / "m.gguf", "llama", model, tokens=tokens))
    assert "lacks tokenizer.ggml.pre" in capsys.readouterr().err
    assert [m.tokenizer.token(i) for i in m.tokenizer.encode("1234a$$")] == ["123", "4", "a", "$$"]


MERGES = ["1 2", "12 3", "123 4", "$ $", "a $"]
