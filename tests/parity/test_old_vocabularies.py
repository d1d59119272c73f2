"""Directories that hold a SentencePiece model and no `tokenizer.json`, as LLaMA and T5 were published."""

from __future__ import annotations

import json
import random

import pytest

import luban
from luban.core.errors import ArtifactError, DataError
from luban.load.model import begins_with_bos, ends_with_eos
from luban.tokenizer.chat import render
from luban.tokenizer.importing.artifact import import_tokenizer
from luban.tokenizer.tokenizer import load_tokenizer

sentencepiece = pytest.importorskip("sentencepiece")
CHARACTERS = "abcdefg  \n.,é漢🐉<s>"
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, bytes]:
    """Small SentencePiece models with LLaMA's and T5's options."""
    folder, rng = tmp_path_factory.mktemp("pieces"), random.Random(0)
    words = ["".join(rng.choices("abcdefg", k=rng.randint(1, 6))) for _ in range(200)]
    (folder / "text").write_text("\n".join(" ".join(rng.choices(words, k=20)) for _ in range(300)))
    found = {}
    for kind, options in (
        ("bpe", {"byte_fallback": True, "normalization_rule_name": "identity", "vocab_size": 272}),
        ("unigram", {"vocab_size": 80, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}),
    ):
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "text"), model_prefix=str(folder / "m"), model_type=kind, minloglevel=2, **options
        )
        found[kind] = (folder / "m.model").read_bytes()
    return found


def drawn() -> list[str]:
    rng = random.Random()
    return ["".join(rng.choices(CHARACTERS, k=rng.randint(0, 30))) for _ in range(200)]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_vocabulary_is_read_where_it_lies(models, kind, tmp_path):
    data = models[kind]
    file = tmp_path / ("tokenizer.model" if kind == "bpe" else "spiece.model")
    file.write_bytes(data)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    for found in (load_tokenizer(tmp_path), load_tokenizer(file), luban.load_tokenizer(str(tmp_path))):
        texts = drawn()
        assert found.encode_batch(texts) == [theirs.encode(text) for text in texts]
        assert found.vocab_size == theirs.get_piece_size() and found.eos_id == theirs.eos_id()
        assert not begins_with_bos(found) and not ends_with_eos(found)  # of no model


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_settings_beside_it_count(models, kind, tmp_path):
    data = models[kind]
    (tmp_path / "tokenizer.model").write_bytes(data)
    size = sentencepiece.SentencePieceProcessor(model_proto=data).get_piece_size()
    added = {"<|im_end|>": size, "<pad>": size + 1} if kind == "bpe" else {"<|im_end|>": size}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    settings = {"add_eos_token": True, "pad_token": "<pad>", "chat_template": TEMPLATE, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    found = load_tokenizer(tmp_path)
    assert found.special["<|im_end|>"] == size and size in found.stop_ids and ends_with_eos(found)
    assert found.pad_id == (size + 1 if kind == "bpe" else 0) and found.vocab_size == size + len(added)
    assert any(render([{"role": "assistant", "content": "abc"}], found).loss_mask)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<far>": size + 7}))
    with pytest.raises(ArtifactError, match=rf"'<far>' has the id {size + 7} there, and {size} behind tokenizer.model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "bos", "eos"), [("llama", True, False), ("mistral", True, False), ("t5", False, True)]
)
def test_what_a_model_puts_around_its_texts_is_known_by_its_type(models, tmp_path, model_type, bos, eos):
    data = models["unigram" if model_type == "t5" else "bpe"]
    (tmp_path / "spiece.model").write_bytes(data)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    found, size = load_tokenizer(tmp_path), sentencepiece.SentencePieceProcessor(model_proto=data).get_piece_size()
    assert (begins_with_bos(found), ends_with_eos(found)) == (bos, eos)
    sentinels = {name: i for name, i in found.special.items() if name.startswith("<extra_id_")}
    assert sentinels == ({f"<extra_id_{n}>": size + 99 - n for n in range(100)} if model_type == "t5" else {})
    transformers = pytest.importorskip("transformers")
    found.save(tmp_path)
    text = "abc de"
    marked = [*([found.bos_id] if bos else []), *found.encode(text), *([found.eos_id] if eos else [])]
    assert (
        transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))(text).input_ids == marked
    )


def test_a_vocabulary_whose_use_is_not_known_is_refused_with_the_way(models, tmp_path):
    (tmp_path / "sentencepiece.bpe.model").write_bytes(models["unigram"])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "xlm-roberta"}))  # shifts the ids by one
    with pytest.raises(
        ArtifactError, match=r"its sentencepiece\.bpe\.model alone does not say .* 'xlm-roberta'.*AutoTokenizer"
    ):
        load_tokenizer(tmp_path)
    assert import_tokenizer(tmp_path, tmp_path / "out").vocab_size  # as a vocabulary of its own


def test_a_whole_model_folder_is_used_as_it_was_published(models, tiny_checkpoint, tmp_path):
    m = luban.load_model(tiny_checkpoint)
    folder = luban.export_model(m, tmp_path / "hf")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(DataError, match="holds no tokenizer"):
        luban.load_model(folder).need_tokenizer()
    (folder / "tokenizer.model").write_bytes(models["bpe"])
    found = luban.load_model(folder)
    assert found.begins_with_bos and found.need_tokenizer().vocab_size == 272
    again = luban.load_model(luban.export_model(found, tmp_path / "again"))
    text = "abc 漢"
    assert again.begins_with_bos and again.need_tokenizer().encode(text) == found.need_tokenizer().encode(text)
