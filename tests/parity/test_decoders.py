"""Random causal decoders of every family against transformers' own class: logits, loss, gradients, generation, round trip."""

from __future__ import annotations

import random

import pytest
import torch
from safetensors.torch import load_file, save_file

import luban
import luban.models.convert.base
from luban.core.errors import ArtifactError, UnsupportedError
from luban.models.head.language_model import LanguageModel
from luban.objectives.causal import CausalLoss

transformers = pytest.importorskip("transformers")
KINDS = (
    "llama",
    "llama",
    "llama",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gpt2",
    "gpt2",
    "openai-gpt",
    "bloom",
    "bloom",
    "falcon",
    "falcon",
    "falcon",
    "falcon",
    "falcon-rw",
    "falcon-rw",
)  # each configuration is drawn afresh each run


def random_config(rng: random.Random, kind: str = "llama"):
    """A small model of odd sizes."""
    kv_heads = rng.choice([1, 2, 3])
    heads = kv_heads * rng.choice([1, 2, 3, 5])
    sizes = {
        "vocab_size": rng.randrange(31, 301, 2),
        "hidden_size": heads * rng.choice([2, 4, 6]),
        "num_hidden_layers": rng.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "initializer_range": 0.2,
        "tie_word_embeddings": rng.random() < 0.5,
    }
    more = (gpt_like if kind in GPTS else llama_like)(rng, kind, kv_heads, sizes["hidden_size"])
    if "layer_types" in more:
        more["layer_types"] = more["layer_types"][: sizes["num_hidden_layers"]]
    return transformers.AutoConfig.for_model(kind.removesuffix("-rw"), **sizes, **more)


GPTS = {"gpt2", "openai-gpt", "bloom", "falcon", "falcon-rw"}


def llama_like(rng: random.Random, kind: str, kv_heads: int, width: int) -> dict:
    own = {
        "llama": {"attention_bias": rng.random() < 0.3, "mlp_bias": rng.random() < 0.3},
        "mistral": {"sliding_window": rng.choice([None, 3, 8])},
        "qwen2": layer_windows(rng),
        "qwen3": {"attention_bias": rng.random() < 0.3, **layer_windows(rng)},
    }[kind]
    scalings = SCALINGS[:-1] if kind == "qwen2" else SCALINGS  # heads of 2 are drawn there; theirs divides by 0
    return {
        **own,
        **({} if kind == "qwen2" else {"head_dim": rng.choice([4, 6, 8, 10])}),
        "intermediate_size": rng.randrange(9, 70),
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 64,
        "rms_norm_eps": rng.choice([1e-5, 1e-6]),
        "rope_parameters": {"rope_theta": rng.choice([100.0, 10_000.0, 500_000.0]), **rng.choice(scalings)},
    }


def layer_windows(rng: random.Random) -> dict:
    """Windows in all, some or none of the layers, said in either way."""
    some = {"layer_types": rng.choices(["sliding_attention", "full_attention"], k=3)}
    return rng.choice(
        [
            {},
            {"sliding_window": 3},
            *(
                {"use_sliding_window": True, "sliding_window": rng.choice([2, 5]), **way}
                for way in ({"max_window_layers": rng.choice([0, 1, 9])}, some)
            ),
        ]
    )


SCALINGS = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {
        "rope_type": "yarn",
        "factor": 2.5,
        "original_max_position_embeddings": 24,
        "beta_fast": 8.0,
        "beta_slow": 0.5,
        "truncate": False,
        "attention_factor": 1.3,
    },
    {"rope_type": "yarn", "factor": 5.0, "original_max_position_embeddings": 16, "mscale": 0.8, "mscale_all_dim": 0.3},
    {"rope_type": "dynamic", "factor": 3.0},
]


def gpt_like(rng: random.Random, kind: str, kv_heads: int, width: int) -> dict:
    dropout = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
    if kind == "bloom":
        return {"layer_norm_epsilon": rng.choice([1e-5, 1e-3])}
    if kind == "openai-gpt":
        return {"max_position_embeddings": 64, "layer_norm_epsilon": rng.choice([1e-5, 1e-3])}
    if kind == "gpt2":
        return {
            "max_position_embeddings": 64,
            "n_inner": rng.choice([None, 37]),
            "activation_function": rng.choice(["gelu_new", "gelu", "relu"]),
            "layer_norm_epsilon": rng.choice([1e-5, 1e-3]),
        }
    if kind == "falcon-rw":
        return {**dropout, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
    grouped = rng.random() < 0.5
    return {
        **dropout,
        "new_decoder_architecture": grouped,
        "num_kv_heads": kv_heads if grouped else None,
        "num_ln_in_parallel_attn": rng.choice([None, 1, 2]) if grouped else None,
        "multi_query": rng.random() < 0.5,
        "parallel_attn": grouped or rng.random() < 0.6,
        "bias": rng.random() < 0.5,
        "ffn_hidden_size": rng.choice([None, 41]),
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": rng.choice([100.0, 10_000.0])},
    }


@pytest.fixture(params=range(len(KINDS)), ids=lambda i: f"{KINDS[i]}-{i}")
def pair(request, tmp_path):
    """(theirs, ours) with the same random weights, biases and norms included."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    theirs = transformers.AutoModelForCausalLM.from_config(
        random_config(random.Random(seed), KINDS[request.param])
    ).eval()
    for name, parameter in theirs.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter.data, mean=0.0 if "bias" in name else 1.0, std=0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    return theirs, luban.load_model(tmp_path / "theirs")


def test_logits_equal(pair):
    theirs, ours = pair
    for length in (1, 2, 17):
        tokens = torch.randint(0, ours.spec.vocab_size, (3, length))
        torch.testing.assert_close(ours.module(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gpt2", "openai-gpt", "bloom", "falcon"])
def test_classes_and_rewards_are_read_off_the_last_token_as_theirs(kind, labels, tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    torch.manual_seed(seed)
    config = random_config(random.Random(seed), kind)
    config.num_labels, config.pad_token_id = labels, 0
    theirs = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = luban.load_model(tmp_path / "theirs")
    tokens = torch.randint(1, config.vocab_size, (3, 9))
    mask = torch.arange(9) < torch.tensor([[9], [4], [1]])
    tokens = tokens * mask
    want = theirs(tokens, attention_mask=mask.long()).logits
    got = ours.module(tokens, mask)
    torch.testing.assert_close(got, want.squeeze(-1) if labels == 1 else want, atol=1e-4, rtol=0)
    luban.export_model(ours, tmp_path / "out")
    back, info = type(theirs).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    back.config.pad_token_id = 0
    torch.testing.assert_close(back.eval()(tokens, attention_mask=mask.long()).logits, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("head", ["TokenClassification", "QuestionAnswering"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gpt2", "bloom", "falcon"])
def test_classes_of_tokens_and_spans_are_read_as_theirs(kind, head, tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    torch.manual_seed(seed)
    config = random_config(random.Random(seed), kind)
    config.num_labels = 2 if head == "QuestionAnswering" else random.Random(seed).choice([1, 3])
    auto = getattr(transformers, f"AutoModelFor{head}")
    theirs = auto.from_config(config).eval()
    for name, parameter in theirs.named_parameters():
        if name in ("score.bias", "classifier.bias", "qa_outputs.bias"):
            torch.nn.init.normal_(parameter.data)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, tokens = luban.load_model(tmp_path / "theirs"), torch.randint(0, config.vocab_size, (2, 9))

    def scores(model) -> torch.Tensor:
        found = model(tokens)
        return found.logits if "logits" in found else torch.stack((found.start_logits, found.end_logits), dim=-1)

    want = scores(theirs)
    torch.testing.assert_close(ours.module(tokens), want, atol=1e-4, rtol=0)
    luban.export_model(ours, tmp_path / "out")
    back, info = auto.from_pretrained(  # a Mistral without a window is written as a Llama
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(scores(back.eval()), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["gpt2", "openai-gpt", "llama"])
def test_classes_that_are_not_built_are_refused_by_name(kind):
    config = random_config(random.Random(1), kind).to_dict()
    form = luban.models.convert.base.FORMATS[kind]()
    with pytest.raises(UnsupportedError, match="architecture OtherDoubleHeadsModel; known are a language model"):
        form.spec({**config, "architectures": ["OtherDoubleHeadsModel"]})
    assert form.spec({**config, "architectures": ["RenamedForCausalLM"]}).head == LanguageModel()


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
def test_a_body_alone_gives_its_hidden_states(kind, tmp_path):
    config = random_config(random.Random(4), kind)
    config.tie_word_embeddings = False
    theirs = transformers.AutoModel.from_config(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = luban.load_model(tmp_path / "theirs")
    tokens = torch.randint(0, config.vocab_size, (2, 9))
    want = theirs(tokens).last_hidden_state
    torch.testing.assert_close(ours.module(tokens), want, atol=1e-4, rtol=0)
    luban.export_model(ours, tmp_path / "out")
    torch.testing.assert_close(
        transformers.AutoModel.from_pretrained(tmp_path / "out")(tokens).last_hidden_state, want, atol=1e-5, rtol=0
    )
    with pytest.raises(UnsupportedError, match="head hidden"):
        luban.Engine(ours).generate([[1, 2]], luban.Sampling(max_tokens=1))


def test_falcons_alibi_is_rounded_as_theirs_far_from_the_first_token(tmp_path):
    config = transformers.FalconConfig(
        vocab_size=40,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=6,
        alibi=True,
        multi_query=False,
        parallel_attn=False,
        bias=True,
        initializer_range=0.3,
    )
    theirs = transformers.FalconForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(0, 40, (1, 700))  # past 256, where bfloat16 no longer holds every position
    torch.testing.assert_close(luban.load_model(tmp_path).module(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_theirs_and_the_row_alone(pair, side):
    theirs, ours = pair
    lengths = (1, 5, 12)
    rows = [torch.randint(0, ours.spec.vocab_size, (n,)) for n in lengths]
    tokens, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(12 - len(row), None) if side == "left" else slice(0, len(row))
        tokens[i, place], mask[i, place] = row, True
    positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
    given = (
        {}
        if theirs.config.model_type == "bloom" or getattr(theirs.config, "alibi", False)
        else {"position_ids": positions}
    )
    expected = theirs(tokens, attention_mask=mask.long(), **given).logits
    got = ours.module(tokens, mask)
    torch.testing.assert_close(got[mask], expected[mask], atol=1e-4, rtol=0)
    assert got.isfinite().all()
    for i, row in enumerate(rows):
        torch.testing.assert_close(got[i][mask[i]], ours.module(row[None])[0], atol=1e-4, rtol=0)


def test_loss_and_gradients_equal(pair):
    theirs, ours = pair
    tokens = torch.randint(0, ours.spec.vocab_size, (2, 15))
    expected = theirs(tokens, labels=tokens).loss
    expected.backward()
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_mask": torch.ones(2, 14, dtype=torch.bool)}
    loss = CausalLoss(ours.module)(batch | {"documents": None, "positions": None}).sum / 28
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    form, _ = luban.models.convert.base.format_for(ours.spec)
    reference = dict(theirs.named_parameters())
    mine = {name: p.grad for name, p in ours.module.named_parameters()}
    for names in form.pairs(ours.spec):
        want = reference[names.theirs].grad
        assert (names.join(mine) - want).norm() <= 1e-3 * want.norm() + 1e-6, names


def test_greedy_generation_equals_theirs(pair):
    theirs, ours = pair
    prompts = [torch.randint(0, ours.spec.vocab_size, (n,)).tolist() for n in (1, 4, 9)]
    results = luban.Engine(ours).generate(prompts, luban.Sampling(max_tokens=10, temperature=0, ignore_eos=True))
    for prompt, result in zip(prompts, results, strict=True):
        tokens = torch.tensor([prompt])
        for token in result.token_ids:  # stepwise on the same prefix, so that a near-tie can't hide the rest
            logits = theirs(tokens).logits[0, -1]
            assert logits[token] >= logits.max() - 1e-4
            tokens = torch.cat((tokens, torch.tensor([[token]])), dim=1)


def test_exported_model_loads_in_transformers_with_equal_logits(pair, tmp_path):
    theirs, ours = pair
    luban.export_model(ours, tmp_path / "out")
    back, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = torch.randint(0, ours.spec.vocab_size, (2, 11))
    torch.testing.assert_close(back(tokens).logits, theirs(tokens).logits, atol=1e-5, rtol=0)


def test_what_is_not_built_is_refused_by_name(tmp_path):
    config = random_config(random.Random(1)).to_dict()
    form = luban.models.convert.base.FORMATS["llama"]()
    with pytest.raises(UnsupportedError, match="hidden_act = 'relu'"):
        form.spec({**config, "hidden_act": "relu"})
    with pytest.raises(UnsupportedError, match="rotary scaling 'longrope'"):
        form.spec({**config, "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0}})


def test_dynamic_scaling_beyond_the_trained_context(tmp_path):
    """Every row by its own length: alone in a batch as theirs, and unchanged by a longer neighbour."""
    config = random_config(random.Random(2), "qwen2")
    config.max_position_embeddings = 16
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 3.0}
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = luban.load_model(tmp_path / "theirs")
    tokens = torch.randint(0, config.vocab_size, (2, 40))
    for length in (40, 23, 9):  # theirs keeps state: from a longer text to one within the context
        torch.testing.assert_close(
            ours.module(tokens[:, :length]), theirs(tokens[:, :length]).logits, atol=1e-4, rtol=0
        )
        theirs.model.rotary_emb.max_seq_len_cached = 17
    mask = torch.arange(40) < torch.tensor([[40], [23]])
    torch.testing.assert_close(ours.module(tokens, mask)[1, :23], ours.module(tokens[1:, :23])[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ("gpt2", {"activation_function": "gelu_nwe"}, "activation 'gelu_nwe'.*did you mean 'gelu_new'"),
        ("openai-gpt", {"afn": "silu"}, "afn = 'silu'"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
        ("falcon", {"new_decoder_architecture": True, "parallel_attn": False}, "the 40B form is parallel"),
    ],
)
def test_parts_of_other_families_that_are_not_built_are_refused_by_name(kind, changes, message):
    config = random_config(random.Random(1), kind).to_dict()
    with pytest.raises(UnsupportedError, match=message):
        luban.models.convert.base.FORMATS[kind]().spec({**config, **changes})


@pytest.mark.parametrize("kind", ["gpt2", "bloom", "falcon", "llama"])
def test_files_saved_without_the_head_leave_out_the_prefix(tmp_path, kind):
    config = random_config(random.Random(3), kind)
    config.tie_word_embeddings = True
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.base_model.save_pretrained(tmp_path)
    tokens = torch.randint(0, config.vocab_size, (2, 7))
    torch.testing.assert_close(luban.load_model(tmp_path).module(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


def test_fused_tensors_that_do_not_fit_are_named(tmp_path):
    theirs = transformers.AutoModelForCausalLM.from_config(random_config(random.Random(5), "bloom"))
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "transformer.h.0.self_attention.query_key_value.weight"
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"query_key_value\.weight of shape .* can't hold queries"):
        luban.load_model(tmp_path)
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"lacks the tensor .*query_key_value"):
        luban.load_model(tmp_path)
