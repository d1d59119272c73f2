"""Random BERT, RoBERTa and ALBERT models against transformers' own classes: every head, padding, gradients, round trip."""

from __future__ import annotations

import json
import random

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import luban
from luban.core.errors import ArtifactError
from luban.models.convert.base import format_for
from luban.models.head.hidden import Hidden
from luban.objectives.causal import CausalLoss

transformers = pytest.importorskip("transformers")
KINDS = ("bert", "roberta", "albert")
HEADS = ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "PreTraining", "Model")
CASES = [(k, h) for k in KINDS for h in HEADS if (k, h) != ("roberta", "PreTraining")]


def random_config(rng: random.Random, kind: str):
    """A small model of odd sizes."""
    heads = rng.choice([1, 2, 3, 5])
    layers = rng.choice([2, 4])
    own = {
        "bert": {"hidden_act": rng.choice(["gelu", "relu", "gelu_new"]), "type_vocab_size": rng.choice([1, 2, 3])},
        "roberta": {
            "type_vocab_size": rng.choice([1, 2]),
            "pad_token_id": 1,
            "hidden_act": rng.choice(["gelu", "gelu_new", "relu"]),
        },
        "albert": {
            "embedding_size": rng.choice([7, 12]),
            "num_hidden_groups": rng.choice([1, 2]),
            "hidden_act": rng.choice(["gelu", "gelu_new", "relu"]),
            "classifier_dropout_prob": 0.0,
        },
    }[kind]
    return transformers.AutoConfig.for_model(
        kind,
        **own,
        vocab_size=rng.randrange(31, 301, 2),
        hidden_size=heads * rng.choice([3, 4, 7]),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=rng.randrange(9, 70),
        max_position_embeddings=40,
        initializer_range=0.3,
        layer_norm_eps=rng.choice([1e-12, 1e-5]),
        num_labels=rng.choice([2, 3, 5]),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        tie_word_embeddings=rng.random() < 0.7,
    )


def make(kind: str, head: str, folder):
    """(theirs, ours) with the same random weights, biases and norms included."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    name = {"bert": "Bert", "roberta": "Roberta", "albert": "Albert"}[kind] + (
        head if head == "Model" else f"For{head}"
    )
    config = random_config(random.Random(seed), kind)
    if head in ("QuestionAnswering", "PreTraining"):
        config.num_labels = 2  # theirs reads the width of these heads from it too
    theirs = getattr(transformers, name)(config).eval()
    for name, parameter in theirs.named_parameters():
        if "bias" in name or "norm" in name.lower():
            torch.nn.init.normal_(parameter.data, mean=0.0 if "bias" in name else 1.0, std=0.2)
    theirs.save_pretrained(folder / "theirs")
    ours = luban.load_model(folder / "theirs")
    if config.hidden_size < 12:  # a norm over so few values can lose half of fp32's digits, in either: float64 decides
        theirs.double()
        ours.module.double()
    return theirs, ours


def batch(ours, side: str):
    """Tokens, mask and positions of rows of several lengths."""
    lengths = (1, 5, 12)
    tokens, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.bool)
    for i, n in enumerate(lengths):
        place = slice(12 - n, None) if side == "left" else slice(0, n)
        tokens[i, place], mask[i, place] = torch.randint(0, ours.spec.vocab_size, (n,)), True
    return tokens, mask, (mask.long().cumsum(-1) - 1).clamp_min(0)


def outputs(found) -> list[torch.Tensor]:
    """Their logits in our shapes."""
    if "start_logits" in found:
        return [torch.stack((found.start_logits, found.end_logits), dim=-1)]
    if "prediction_logits" in found:
        return [found.prediction_logits, found.get("seq_relationship_logits", found.get("sop_logits"))]
    return [found.last_hidden_state, found.pooler_output] if "pooler_output" in found else [found.logits]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("kind", "head"), CASES)
def test_logits_equal_and_come_back(kind, head, side, tmp_path):
    theirs, ours = make(kind, head, tmp_path)
    tokens, mask, positions = batch(ours, side)
    segments = torch.randint(0, ours.spec.body.segments, tokens.shape)
    rows_read_first = head in ("SequenceClassification", "PreTraining", "Model") and side == "left"
    if rows_read_first:  # theirs reads slot 0 whatever stands there
        tokens, mask, positions, segments = tokens[2:], mask[2:], positions[2:], segments[2:]
    offset = ours.spec.position.offset
    arguments = {"attention_mask": mask.long(), "position_ids": positions + offset, "token_type_ids": segments}
    expected = outputs(theirs(tokens, **arguments))
    hidden = ours.module(tokens, mask, segments=segments, output="hidden")
    got = [ours.module(tokens, mask, segments=segments)]
    got += [ours.module.head.pairs(hidden, mask)] if head == "PreTraining" else []
    got += [ours.module.head.pooled(hidden, mask)] if head == "Model" else []
    for mine, want in zip(got, expected, strict=True):
        assert mine.shape == want.shape
        kept = mask if mine.dim() == 3 else slice(None)
        torch.testing.assert_close(mine[kept], want[kept], atol=1e-4, rtol=0)
    luban.export_model(ours, tmp_path / "out")
    back, info = type(theirs).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for mine, want in zip(outputs(back.eval()(tokens, **arguments)), expected, strict=True):
        torch.testing.assert_close(mine, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_loss_and_gradients_equal(kind, tmp_path):
    theirs, ours = make(kind, "MaskedLM", tmp_path)
    tokens = torch.randint(2, ours.spec.vocab_size, (3, 15))
    chosen = torch.rand(3, 15) < 0.4
    chosen[0, 0] = True
    targets = torch.randint(0, ours.spec.vocab_size, (3, 15))
    theirs(tokens, labels=torch.where(chosen, targets, -100)).loss.backward()
    batch = {"tokens": tokens, "targets": targets, "loss_mask": chosen, "documents": None, "positions": None}
    (CausalLoss(ours.module)(batch).sum / chosen.sum()).backward()
    form, _ = format_for(ours.spec)
    reference, mine = dict(theirs.named_parameters()), dict(ours.module.named_parameters())
    for names in form.pairs(ours.spec):
        if names.theirs not in reference or (reference[names.theirs].grad is None and "bias" in names.theirs):
            continue  # an untied head's unread copy
        want = reference[names.theirs].grad
        want = torch.zeros_like(reference[names.theirs]) if want is None else want
        got = mine[names.ours].grad
        got = torch.zeros_like(want) if got is None else got
        assert (got - want).norm() <= 1e-3 * want.norm() + 1e-6, names


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_by_arithmetic(kind, tmp_path):
    theirs, ours = make(kind, "MaskedLM", tmp_path)
    assert ours.spec.parameters == sum(p.numel() for p in ours.module.parameters())
    unread = 0 if ours.spec.tied_head else ours.spec.vocab_size  # theirs keeps a second bias that nothing reads
    assert ours.spec.parameters == sum(p.numel() for p in theirs.parameters()) - unread


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_equal_separate_rows(kind, tmp_path):
    _, ours = make(kind, "MaskedLM", tmp_path)
    one, two = (torch.randint(0, ours.spec.vocab_size, (1, n)) for n in (5, 8))
    packed = ours.module(torch.cat((one, two), dim=1), documents=torch.tensor([[0] * 5 + [1] * 8]))
    torch.testing.assert_close(packed[:, :5], ours.module(one), atol=1e-4, rtol=0)
    torch.testing.assert_close(packed[:, 5:], ours.module(two), atol=1e-4, rtol=0)
    assert F.softmax(packed, -1).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_body_saved_without_its_pooler_stays_without_one(kind, tmp_path):
    config = random_config(random.Random(7), kind)
    theirs = getattr(transformers, kind.capitalize() + "Model")(config, add_pooling_layer=False).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours, tokens = luban.load_model(tmp_path / "theirs"), torch.randint(0, config.vocab_size, (2, 9))
    assert ours.spec.head == Hidden()
    want = theirs(tokens, position_ids=torch.arange(9)[None] + ours.spec.position.offset).last_hidden_state
    torch.testing.assert_close(ours.module(tokens), want, atol=1e-4, rtol=0)
    luban.export_model(ours, tmp_path / "out")
    assert luban.load_model(tmp_path / "out").spec == ours.spec
    whole = load_file(tmp_path / "theirs/model.safetensors")
    name = next(iter(type(theirs)(config).pooler.state_dict())) if kind != "albert" else ""
    whole[f"pooler.{name}" if name else "pooler.weight"] = torch.zeros(config.hidden_size, config.hidden_size)
    save_file(whole, tmp_path / "theirs/model.safetensors")
    with pytest.raises(ArtifactError, match=r"lacks the tensor .*pooler.*bias"):  # half a pooler is a damaged file
        luban.load_model(tmp_path / "theirs")


def test_the_first_published_berts_are_read_as_theirs(tmp_path):
    """Norms called gamma and beta, and pooler and pair output beside a head that is said to be masked LM alone."""
    config = random_config(random.Random(8), "bert")
    config.num_labels, config.tie_word_embeddings = 2, True
    theirs = transformers.BertForPreTraining(config).eval()
    for name, parameter in theirs.named_parameters():
        if "LayerNorm" in name:
            torch.nn.init.normal_(parameter.data, mean=1.0, std=0.2)
    theirs.save_pretrained(tmp_path)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    save_file(old, tmp_path / "model.safetensors")
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "architectures": ["BertForMaskedLM"]}))
    tokens = torch.randint(0, config.vocab_size, (2, 9))
    want = theirs(tokens).prediction_logits
    torch.testing.assert_close(luban.load_model(tmp_path).module(tokens), want, atol=1e-4, rtol=0)
