"""Random BART, T5 and LongT5 models against transformers' own classes: logits, padding, gradients, steps with a cache, round trip."""

from __future__ import annotations

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from t5_like import t5_like

import luban
from luban.core.errors import UnsupportedError
from luban.generate.cache import ContiguousCache
from luban.models.convert.base import FORMATS, format_for
from luban.models.encoder import EncoderBody
from luban.objectives.denoising import SourceLoss

transformers = pytest.importorskip("transformers")
KINDS = ("bart", "bart", "t5", "t5", "t5-1.1", "longt5", "longt5")


def random_model(rng: random.Random, kind: str):
    """A small model of odd sizes."""
    heads = rng.choice([1, 2, 3])
    common = {"vocab_size": rng.randrange(31, 301, 2), "d_model": heads * rng.choice([4, 6, 10])}
    if kind == "bart":
        inner = rng.randrange(9, 70)
        return transformers.BartForConditionalGeneration(
            transformers.BartConfig(
                **common,
                encoder_layers=rng.choice([1, 2]),
                decoder_layers=rng.choice([1, 3]),
                encoder_attention_heads=heads,
                decoder_attention_heads=heads,
                encoder_ffn_dim=inner,
                decoder_ffn_dim=inner,
                init_std=0.3,
                dropout=0.0,
                max_position_embeddings=40,
                activation_function=rng.choice(["gelu", "relu"]),
                attention_dropout=0.0,
            )
        )
    config, model, own = t5_like(kind, rng, 5)
    return model(
        config(
            **common,
            **own,
            d_kv=rng.choice([3, 8]),
            d_ff=rng.randrange(9, 70),
            num_layers=rng.choice([1, 2]),
            num_decoder_layers=rng.choice([1, 3]),
            num_heads=heads,
            relative_attention_num_buckets=rng.choice([8, 16, 32]),
            relative_attention_max_distance=rng.choice([20, 40]),
            dropout_rate=0.0,
            initializer_factor=1.0,
            **({"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} if kind == "t5-1.1" else {}),
        )
    )


@pytest.fixture(params=range(len(KINDS)), ids=lambda i: f"{KINDS[i]}-{i}")
def pair(request, tmp_path):
    """(theirs, ours) with the same random weights, biases and norms included."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    theirs = random_model(random.Random(seed), KINDS[request.param]).eval()
    for name, parameter in theirs.named_parameters():
        if "bias" in name or "norm" in name:
            torch.nn.init.normal_(parameter.data, mean=0.0 if "bias" in name else 1.0, std=0.3)
    if KINDS[request.param] == "bart":
        theirs.final_logits_bias.normal_()
    theirs.save_pretrained(tmp_path / "theirs")
    return theirs, luban.load_model(tmp_path / "theirs")


def batch(ours):
    """Sources of several lengths, padded on the right, and targets, without theirs' padding id, whose row gets no gradient."""
    vocab = ours.spec.vocab_size
    mask = torch.arange(11) < torch.tensor([[11], [4], [1]])
    return torch.randint(2, vocab, (3, 11)), mask, torch.randint(2, vocab, (3, 7))


def test_logits_equal_and_come_back(pair, tmp_path):
    theirs, ours = pair
    source, mask, target = batch(ours)
    expected = theirs(source, attention_mask=mask.long(), decoder_input_ids=target).logits
    torch.testing.assert_close(ours.module(source, target, mask), expected, atol=1e-4, rtol=1e-5)
    luban.export_model(ours, tmp_path / "out")
    back, info = type(theirs).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    again = back.eval()(source, attention_mask=mask.long(), decoder_input_ids=target).logits
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-5)


def test_loss_and_gradients_equal(pair):
    theirs, ours = pair
    source, mask, target = batch(ours)
    labels = torch.randint(0, ours.spec.vocab_size, target.shape)
    trained = torch.rand(target.shape) < 0.7
    trained[0, 0] = True
    expected = theirs(
        source, attention_mask=mask.long(), decoder_input_ids=target, labels=torch.where(trained, labels, -100)
    ).loss
    expected.backward()
    given = {"source": source, "source_mask": mask, "tokens": target, "targets": labels, "loss_mask": trained}
    loss = SourceLoss(ours.module)(given).sum / trained.sum()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    form, _ = format_for(ours.spec)
    reference, mine = dict(theirs.named_parameters()), dict(ours.module.named_parameters())
    for names in form.pairs(ours.spec):
        if (
            names.theirs in reference and reference[names.theirs].grad is not None
        ):  # final_logits_bias is a buffer there
            want = reference[names.theirs].grad
            assert (mine[names.ours].grad - want).norm() <= 1e-3 * want.norm() + 1e-6, names


def test_left_and_right_padding_and_the_row_alone_agree(pair):
    _, ours = pair
    source, mask, target = batch(ours)
    right = ours.module(source, target, mask)
    rolled = torch.stack([row.roll(11 - int(n.sum())) for row, n in zip(source, mask, strict=True)])
    torch.testing.assert_close(ours.module(rolled, target, mask.flip(-1)), right, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.module(source[1:2, :4], target[1:2]), right[1:2], atol=1e-4, rtol=1e-4)


def test_step_by_step_with_a_cache_equals_the_whole(pair):
    _, ours = pair
    source, mask, target = batch(ours)
    whole = ours.module(source, target, mask)
    cache = ContiguousCache.of(ours.module, 3)
    memory = ours.module.encode(source, mask)
    steps = [
        ours.module(None, part, cache=cache, encoder_states=memory)
        for part in (target[:, :3], target[:, 3:4], target[:, 4:])
    ]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-4, rtol=1e-4)


BART = {
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20,
    "decoder_layers": 2,
    "decoder_ffn_dim": 20,
    "init_std": 0.3,
    "max_position_embeddings": 40,
}
T5 = {
    "d_kv": 5,
    "d_ff": 20,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "initializer_factor": 3.0,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
CLASSES = (
    "BartForSequenceClassification",
    "BartForQuestionAnswering",
    "BartModel",
    "T5ForSequenceClassification",
    "T5ForQuestionAnswering",
    "T5Model",
    "T5EncoderModel",
    "T5ForTokenClassification",
    "LongT5Model",
    "LongT5EncoderModel",
)


@pytest.mark.parametrize("name", CLASSES)
def test_other_heads_and_the_encoder_alone_equal_theirs(name, tmp_path):
    kind, sizes = (transformers.T5Config, T5) if name.startswith("T5") else (transformers.BartConfig, BART)
    if name.startswith("Long"):
        kind, sizes = transformers.LongT5Config, {**T5, "local_radius": 2}
    config = kind(vocab_size=60, d_model=16, num_labels=2 if "Question" in name else random.choice([1, 4]), **sizes)
    theirs = getattr(transformers, name)(config).eval()
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter.data, mean=1.0, std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = luban.load_model(tmp_path / "theirs")
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    source = torch.randint(3, 60, (2, 9))
    source[torch.arange(2), mask.sum(-1) - 1] = config.eos_token_id  # theirs reads the class there
    source = torch.where(mask, source, config.pad_token_id)
    target = torch.cat((torch.full((2, 1), config.decoder_start_token_id), source[:, :-1]), dim=1)

    def outputs(model) -> torch.Tensor:
        given = {"decoder_input_ids": target} if name.endswith("T5Model") else {}
        if "Encoder" not in name and "Token" not in name:
            given["decoder_attention_mask"] = mask.long()
        found = model(source, attention_mask=mask.long(), **given)
        if "start_logits" in found:
            return torch.stack((found.start_logits, found.end_logits), dim=-1)[mask]
        found = found.logits if "logits" in found else found.last_hidden_state
        return found[mask] if found.dim() == 3 else found

    want = outputs(theirs)
    alone = isinstance(ours.spec.body, EncoderBody)
    got = ours.module(source, mask) if alone else ours.module(source, target, mask, decoder_mask=mask)
    torch.testing.assert_close(got[mask] if got.dim() == 3 else got, want, atol=1e-4, rtol=1e-5)
    luban.export_model(ours, tmp_path / "out")
    back, info = type(theirs).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(outputs(back.eval()), want, atol=1e-5, rtol=1e-5)
    assert luban.load_model(tmp_path / "out").spec == ours.spec


def test_a_t5_with_a_head_of_its_own_survives_being_saved_by_theirs(tmp_path):
    """Published T5 1.1 files have their own output table; transformers 5 saves them with a configuration that says tied."""
    theirs = random_model(random.Random(3), "t5-1.1")
    theirs.save_pretrained(tmp_path / "tied")
    config = json.loads((tmp_path / "tied/config.json").read_text())
    del config["scale_decoder_outputs"]
    tensors = load_file(tmp_path / "tied/model.safetensors")
    tensors["lm_head.weight"] = torch.randn_like(tensors["shared.weight"])
    published = tmp_path / "published"
    published.mkdir()
    (published / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    save_file(tensors, published / "model.safetensors", metadata={"format": "pt"})
    theirs = type(theirs).from_pretrained(published).eval()
    theirs.save_pretrained(tmp_path / "again")
    source, target = (
        torch.randint(2, theirs.config.vocab_size, (2, 7)),
        torch.randint(2, theirs.config.vocab_size, (2, 5)),
    )
    want = theirs(source, decoder_input_ids=target).logits
    for folder in ("published", "again"):
        ours = luban.load_model(tmp_path / folder)
        assert not ours.spec.tied_head
        torch.testing.assert_close(ours.module(source, target), want, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_classes_that_are_not_built_are_refused_by_name(kind):
    form, name = FORMATS[kind](), kind.capitalize()
    config = random_model(random.Random(1), kind).config.to_dict()
    with pytest.raises(
        UnsupportedError, match=rf"architecture {name}ForCausalLM; known are .*{name}ForQuestionAnswering"
    ):
        form.spec({**config, "architectures": [f"{name}ForCausalLM"]})


def test_summaries_of_blocks_are_refused_by_name():
    config = transformers.LongT5Config(encoder_attention_type="transient-global").to_dict()
    with pytest.raises(UnsupportedError, match="encoder_attention_type = 'transient-global'"):
        FORMATS["longt5"]().spec(config)
    with pytest.raises(UnsupportedError, match="architecture T5Model; known are LongT5ForConditionalGeneration"):
        FORMATS["longt5"]().spec({**config, "encoder_attention_type": "local", "architectures": ["T5Model"]})


def test_parameters_by_arithmetic(pair):
    theirs, ours = pair
    count = sum(p.numel() for p in ours.module.parameters())
    bias = ours.spec.vocab_size if ours.spec.head.bias else 0  # a buffer there
    head = 0 if ours.spec.tied_head else theirs.lm_head.weight.numel()
    tied = theirs.lm_head.weight is theirs.get_input_embeddings().weight
    assert ours.spec.parameters == count == sum(p.numel() for p in theirs.parameters()) + bias + (head if tied else 0)
