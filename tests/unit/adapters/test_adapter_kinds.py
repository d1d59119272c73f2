"""Every kind of adapter: what step 0 leaves unchanged, what is trained, how many parameters, what merging gives."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import FAMILIES

from luban.adapters.base import AdapterConfig, adapters_of, rates_of, without_adapters
from luban.adapters.bottleneck import BottleneckConfig
from luban.adapters.dora import DoRA
from luban.adapters.ia3 import IA3
from luban.adapters.llama_adapter import LLaMAAdapter
from luban.adapters.lora import LoRA
from luban.adapters.parallel import Parallel
from luban.adapters.pissa import PiSSA
from luban.adapters.prefix import PrefixTuning, PTuningV2
from luban.adapters.prompt import PromptTuning
from luban.adapters.series import Houlsby, Pfeiffer
from luban.core.errors import ConfigError, UnsupportedError
from luban.load.adapted import put_in
from luban.models.build import build_model, state_of
from luban.models.spec import ModelSpec, uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.feedforward.plain import GELU
from luban.nn.linear import matmul_owners
from luban.nn.mixer.dilated import Dilated
from luban.nn.mixer.grouped import Grouped
from luban.nn.mixer.lsh import LSH
from luban.nn.mixer.routing import Routing
from luban.objectives.causal import Causal

V, E, L, F, H, K, D = 37, 32, 3, 48, 4, 2, 8
SPEC = uniform(
    vocab_size=V, width=E, layers=L, context=64, mixer=Grouped(heads=H, kv_heads=K), feedforward=SwiGLU(width=F)
)
IDENTITIES: dict[str, AdapterConfig] = {
    "lora": LoRA(rank=3, alpha=5.0),
    "lora of patterns": LoRA(rank=2, targets=("*.blocks.[01].mixer.*", "down"), rank_stabilised=True, init="gaussian"),
    "pissa": PiSSA(rank=3),
    "llama adapter": LLaMAAdapter(length=5, layers=2),
    "houlsby": Houlsby(width=6),
    "pfeiffer": Pfeiffer(width=6, activation="gelu"),
    "parallel": Parallel(width=6, scale=4.0),
    "parallel to attention": Parallel(width=6, beside="mixer"),
    "ia3": IA3(),
}
OTHERS: dict[str, AdapterConfig] = {
    "dora": DoRA(rank=3),
    "prompt": PromptTuning(length=4),
    "prefix": PrefixTuning(length=4, network=16),
    "p-tuning v2": PTuningV2(length=4),
}
ALL = IDENTITIES | OTHERS
linear = E * H * D + 2 * E * K * D + H * D * E + 3 * E * F  # of a layer
sums = (E + H * D) + 2 * (E + K * D) + (H * D + E) + 3 * (E + F)  # inputs and outputs of each of its projections
COUNTS = {
    "lora": L * 3 * sums,
    "pissa": L * 3 * sums,
    "dora": L * (3 * sums + H * D + 2 * K * D + E + 2 * F + E),
    "llama adapter": 2 * 5 * E + 2 * H,
    "houlsby": L * 2 * (2 * 6 * E + 6 + E) + (2 * L + 1) * E,
    "pfeiffer": L * (2 * 6 * E + 6 + E),
    "parallel": L * (2 * 6 * E + 6 + E),
    "ia3": L * (2 * K * D + F),
    "prompt": 4 * E,
    "p-tuning v2": 4 * L * 2 * K * D,
    "prefix": 4 * 16 + 16 * 16 + 16 + 17 * L * 2 * K * D,
}


@pytest.fixture(autouse=True)
def seed() -> int:
    number = random.SystemRandom().randrange(2**31)
    torch.manual_seed(number)
    return number


def adapted(spec: ModelSpec, config: AdapterConfig, *, moved: bool = False, dtype="float32"):
    """A model with random weights, and the same one adapted; `moved`: with random values in the adapter's parameters."""
    plain, model = (build_model(spec, seed=3, dtype=dtype) for _ in range(2))
    values = config.initial(spec, state_of(plain), 5)
    saved = {n: state_of(plain)[n] for n in trained_of_base(spec, config)}
    put_in(model, config, values | saved, "test")
    if moved:
        with torch.no_grad():
            for parameter in trainable(model).values():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return plain, model


def trained_of_base(spec, config):
    model = build_model(spec, device="meta")
    own = set(state_of(model))
    config.adapt(model)
    return {name for name, p in model.named_parameters() if p.requires_grad and name in own}


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def tokens(rows=2, length=11):
    return torch.randint(0, V, (rows, length))


@pytest.mark.parametrize("name", IDENTITIES)
def test_step_0_changes_nothing(name):
    plain, model = adapted(SPEC, IDENTITIES[name])
    x = tokens()
    assert torch.equal(model(x), plain(x))


def test_doras_step_0_changes_nothing_but_rounding():
    plain, model = adapted(SPEC, OTHERS["dora"], dtype="float64")
    x = tokens()
    torch.testing.assert_close(model(x), plain(x), rtol=1e-6, atol=1e-6)  # its magnitudes begin in float32


@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_parameters(name):
    _, model = adapted(SPEC, ALL[name])
    assert sum(p.numel() for p in trainable(model).values()) == COUNTS[name]


def test_counts_of_the_papers():
    """LLaMA-7B, LoRA of rank 8 on queries and values; BERT-large, Houlsby at 64 without its norms; LLaMA-Adapter at 30 of 32
    layers; GPT-3, rank 1 and 4."""
    llama = uniform(vocab_size=32000, width=4096, layers=32, mixer=Grouped(heads=32), feedforward=SwiGLU(width=11008))
    gpt3 = uniform(vocab_size=50257, width=12288, layers=96, mixer=Grouped(heads=96), feedforward=GELU(width=49152))
    bert = uniform(vocab_size=30522, width=1024, layers=24, mixer=Grouped(heads=16), feedforward=GELU(width=4096))

    def count(spec, config):
        model = build_model(spec, device="meta")
        config.adapt(model)
        return sum(p.numel() for p in trainable(model).values())

    assert count(llama, LoRA(rank=8, targets=("q", "v"))) == 4_194_304
    assert count(llama, LLaMAAdapter(length=10, layers=30)) == 1_229_760
    assert count(gpt3, LoRA(rank=4, targets=("q", "v"))) == 18_874_368
    assert count(gpt3, LoRA(rank=1, targets=("q", "v"))) == 4_718_592
    assert count(bert, Houlsby(width=64, modules_to_save=())) == 6_343_680
    assert count(llama, PromptTuning(length=100, init="random")) == 409_600


@pytest.mark.parametrize("name", ["lora", "lora of patterns", "pissa", "dora", "ia3"])
def test_merged_computes_the_same(name):
    plain, model = adapted(SPEC, ALL[name], moved=True, dtype="float64")
    x = tokens()
    before, far = model(x), plain(x)
    ALL[name].merge(model)
    assert not adapters_of(model) and model.state_dict().keys() == plain.state_dict().keys()
    assert (before - far).abs().max() > 1e-2
    torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-9)


def test_a_tied_output_layer_merges_into_a_weight_of_its_own():
    """The embedding stays as it was, the specification says that they are apart, and merging again is refused."""
    spec, config = replace(SPEC, tied_head=True), LoRA(rank=3, targets=("q", "lm_head"))
    plain, model = adapted(spec, config, moved=True)
    x = tokens()
    before = model(x)
    config.merge(model)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.decoder.embedding.tokens.weight, plain.decoder.embedding.tokens.weight)
    assert model.spec == replace(spec, tied_head=False)
    again = build_model(model.spec, seed=1)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
    with pytest.raises(UnsupportedError, match="has no adapter: it was merged already"):
        config.merge(model)


@pytest.mark.parametrize("name", [n for n in ALL if n not in ("lora", "lora of patterns", "pissa", "dora", "ia3")])
def test_what_is_no_change_of_weights_is_not_merged(name):
    _, model = adapted(SPEC, ALL[name])
    instead = "export without --merge" if ALL[name].peft else "Luban reads the run itself"
    with pytest.raises(UnsupportedError, match=f"no change of weights.*{instead}"):
        ALL[name].merge(model)


@pytest.mark.parametrize("name", [name for name in ALL if ALL[name].removable])
def test_without_its_adapters_a_model_is_the_base(name):
    plain, model = adapted(SPEC, ALL[name], moved=True)
    x = tokens()
    moved = model(x)
    with without_adapters(model):
        torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
    assert torch.equal(model(x), moved) and not torch.equal(moved, plain(x))


@pytest.mark.parametrize("name", ALL)
def test_only_the_adapter_has_gradients(name):
    config = ALL[name]
    if isinstance(config, BottleneckConfig):  # drawn biases can turn all ReLUs of a bottleneck off, for every token
        config = replace(config, activation="gelu")
    _, model = adapted(SPEC, config, moved=True)
    x = tokens()
    batch = {"tokens": x[:, :-1], "targets": x[:, 1:], "loss_mask": torch.ones(2, 10, dtype=torch.bool)}
    Causal().loss(model)({**batch, "documents": None, "positions": None}).sum.backward()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert all(p.grad is None for n, p in model.named_parameters() if n in frozen)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trainable(model).values())


@pytest.mark.parametrize("name", ["lora", "ia3", "houlsby", "parallel"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_adapted(family, name):
    """Step 0 gives what the model gave, and a moved adapter something else."""
    made, config = FAMILIES[family], ALL[name]
    plain = build_model(made.spec, seed=1)
    try:
        config.adapt(build_model(made.spec, device="meta"))
    except (ConfigError, UnsupportedError) as error:
        assert re.search("projection|layers|matches nothing", str(error))
        assert not made.spec.layers or name != "lora"
        return
    plain, model = adapted(replace(made.spec), config)
    before = state_of(plain)
    loss, same = made.objective.loss(plain), made.objective.loss(model)
    arrays = made.batch(2, np.random.default_rng(0)).arrays()
    batch = {key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in arrays.items()}
    with torch.no_grad():  # else torch picks attention kernels by what needs a gradient
        assert torch.equal(same(batch).sum, loss(batch).sum)
        for parameter in trainable(model).values():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
        assert not torch.equal(same(batch).sum, loss(batch).sum)
    assert all(torch.equal(state_of(plain)[n], t) for n, t in before.items())


def test_a_prompt_is_the_same_as_tokens_before_the_text():
    """In an unpacked row, the prompt's rows put before the tokens' embeddings; independent of what the adapter does."""
    config = PromptTuning(length=4, init="labels", tokens=(5, 9))
    _, model = adapted(SPEC, config)
    plain = build_model(SPEC, seed=3)
    x = tokens()
    whole = torch.cat([torch.tensor([[5, 9, 5, 9]]).expand(2, -1), x], 1)
    torch.testing.assert_close(model(x), plain(whole)[:, 4:], rtol=1e-5, atol=1e-5)


def test_every_document_of_a_packed_row_has_the_prompt_before_it():
    for config in (PromptTuning(length=4), PTuningV2(length=3), LLaMAAdapter(length=3)):
        _, model = adapted(SPEC, config, moved=True)
        x = tokens(1, 12)
        documents = torch.tensor([[0] * 5 + [1] * 7])
        parts = torch.cat([model(x[:, :5]), model(x[:, 5:])], 1)
        torch.testing.assert_close(model(x, documents=documents), parts, rtol=1e-5, atol=1e-5)


def test_a_prefix_is_the_same_as_keys_and_values_of_tokens():
    """A prefix made of the keys and values that four tokens have gives what the tokens before the text give."""
    prompt, prefix = PromptTuning(length=4), PTuningV2(length=4)
    _, by_prompt = adapted(SPEC, prompt, moved=True)
    _, by_prefix = adapted(SPEC, prefix)
    with torch.no_grad():
        pairs = by_prompt.prompts(by_prompt)
        rows = [
            torch.stack([part[0].transpose(0, 1) for part in pairs[layer]], 1) for layer in range(L)
        ]  # (P, 2, K, D)
        by_prefix.prompts.embedding.copy_(torch.stack(rows, 1).flatten(1))
    x = tokens()
    torch.testing.assert_close(by_prefix(x), by_prompt(x), rtol=1e-5, atol=1e-5)


def test_pissa_begins_at_the_largest_singular_values():
    plain, model = adapted(SPEC, PiSSA(rank=3, alpha=6.0))
    name = "decoder.blocks.1.mixer.qkv"
    adapter, weight = model.get_submodule(f"{name}.adapters.k"), plain.get_submodule(f"{name}.k").weight
    u, s, vt = torch.linalg.svd(weight.double())
    principal = (u[:, :3] * s[:3]) @ vt[:3]
    torch.testing.assert_close((adapter.b @ adapter.a).double() * 2.0, principal, rtol=1e-4, atol=1e-6)


def test_lora_starts_from_draws_that_depend_on_names_alone():
    plain, model = adapted(SPEC, LoRA(rank=3))
    _, fewer = adapted(SPEC, LoRA(rank=3, targets=("v",)))
    name = "decoder.blocks.2.mixer.qkv.adapters.v"
    assert torch.equal(model.get_submodule(name).a, fewer.get_submodule(name).a)
    a = LoRA(rank=16).initial(SPEC, state_of(plain), 1)["decoder.blocks.0.feedforward.adapters.down.a"]
    bound = 1 / math.sqrt(F)
    assert a.abs().max() <= bound and abs(a.std().item() - bound / math.sqrt(3)) < 0.15 * bound


def test_lora_plus_rates():
    _, model = adapted(SPEC, LoRA(rank=3, rate_ratio=16.0, targets=("q",)))
    assert rates_of(model) == {f"decoder.blocks.{i}.mixer.qkv.adapters.q.b": 16.0 for i in range(L)}


def test_dropout_is_for_training_alone():
    _, model = adapted(SPEC, LoRA(rank=3, dropout=0.5), moved=True)
    x = tokens()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


BAD = {
    "nothing": (LoRA(targets=("gat",)), "matches no projection of this model.*did you mean 'gate'"),
    "far": (
        LoRA(targets=("mlp",)),
        "^adapter target 'mlp' matches no projection of this model; its .* have the roles q, k,",
    ),
    "pattern": (LoRA(targets=("encoder.*",)), "roles q, k, v, o, gate, up, down, lm_head"),
    "embedding": (LoRA(targets=("embedding",)), "take no adapter"),
    "rank": (LoRA(rank=17), r"rank 17 is above the width of decoder.blocks.0.mixer.qkv.k \(16 × 32\): at most 16"),
    "saved": (LoRA(modules_to_save=("embeding",)), "matches nothing.*did you mean 'embedding'"),
    "layers": (LLaMAAdapter(layers=9), "adapter.layers is 9, and the model has 3"),
    "token": (PromptTuning(init="labels", tokens=(99,)), "below the vocabulary's size, 37"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_can_not_be_is_refused(name):
    config, reason = BAD[name]
    with pytest.raises(ConfigError, match=reason):
        config.adapt(build_model(SPEC, device="meta"))


def test_a_network_without_width_is_refused():
    for width in (0, -3):
        with pytest.raises(ConfigError, match=f"adapter.network must be at least 1, {width} given; p_tuning_v2"):
            PrefixTuning(network=width)


@pytest.mark.parametrize("mixer", [Dilated(heads=4), LSH(heads=4), Routing(heads=4)], ids=["dilated", "lsh", "routing"])
@pytest.mark.parametrize("name", ["llama adapter", "prompt", "prefix", "p-tuning v2"])
def test_prompts_need_layers_that_attend_to_them(mixer, name):
    spec = uniform(vocab_size=V, width=E, layers=L, context=64, mixer=mixer, feedforward=SwiGLU(width=F))
    with pytest.raises(UnsupportedError, match="mixer grouped"):
        ALL[name].adapt(build_model(spec, device="meta"))


def test_norms_are_those_that_houlsby_trains():
    _, model = adapted(SPEC, Houlsby(width=4))
    assert {n for n in trainable(model) if "adapters" not in n} == {
        n for n, p in model.named_parameters() if p.shape == (E,) and "adapters" not in n
    }


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_a_packed_base(base):
    """The adapter over a packed base computes and learns what it does over the unpacked numbers; these are off by little."""
    config = LoRA(rank=3, base=base)
    plain, model = adapted(SPEC, config, moved=True)
    _, right = adapted(SPEC, LoRA(rank=3))
    config.pack_base(model)
    with torch.no_grad():
        for (_, ours), (_, theirs) in zip(matmul_owners(model), matmul_owners(right), strict=True):
            if ours.packed is None:
                continue
            rows = torch.cat([part.weight(torch.float32) for part in ours.packed.values() if part.shape[1] == E])
            for name, projection in theirs.projections().items():
                if name in ("q", "k", "v", "gate", "up"):
                    mine, rows = rows.split([projection.out_features, len(rows) - projection.out_features])
                    projection.weight.copy_(mine)
                else:
                    (part,) = [p for n, p in ours.packed.items() if n in ("weight", "down")]
                    projection.weight.copy_(part.weight(torch.float32))
    for (_, ours), (_, theirs) in zip(adapters_of(model), adapters_of(right), strict=True):
        theirs.load_state_dict(ours.state_dict())
    x = tokens()
    torch.testing.assert_close(model(x), right(x), rtol=1e-4, atol=1e-4)
    for made in (model, right):
        made(x).square().sum().backward()
    for (name, ours), theirs in zip(trainable(model).items(), trainable(right).values(), strict=True):
        off = float((ours.grad - theirs.grad).abs().max() / theirs.grad.abs().max())
        assert off < 1e-3, (name, off)  # fp32, sums in another order
    assert plain is not model
    with pytest.raises(ConfigError, match="reads the weight that it adapts"):
        DoRA(base=base).adapt(build_model(SPEC, device="meta"))
    ungated = uniform(vocab_size=V, width=E, layers=1, mixer=Grouped(heads=H), feedforward=GELU(width=F))
    with pytest.raises(ConfigError, match=r"at decoder\.blocks\.0\.feedforward\.down reads the weight"):
        IA3(base=base).adapt(build_model(ungated, device="meta"))
