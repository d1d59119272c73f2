"""Decoders of Mistral's and Qwen 3's kin whose layers are mixtures of experts (`mixtral`, `qwen3_moe`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from luban.core.errors import UnsupportedError
from luban.models.convert.base import ExpertSlice, Fused, Pair, Stacked
from luban.models.convert.fields import Fields
from luban.models.convert.llama import LAYER, Llama
from luban.models.convert.mistral import Mistral
from luban.models.convert.qwen3 import Qwen3
from luban.models.head.tokens import Span
from luban.models.spec import ModelSpec
from luban.nn.feedforward.base import FeedForward
from luban.nn.moe.layer import MixtureOfExperts
from luban.nn.moe.top_k import TopK

ATTENTION = tuple(row for row in LAYER if not row[0].startswith("feedforward."))


class WithExperts(Llama):
    """LLaMA's parts with a dropless top-k mixture of SwiGLU networks in every layer.

    `router_aux_loss_coef` counts every choice of a token where our balance loss counts their share, so that ours is k times it.
    """

    router: ClassVar[str]  # theirs, of a layer
    experts: ClassVar[dict[str, str]]  # our projections → theirs, with the expert's number
    fixed: ClassVar[dict[str, Any]] = {}  # further fields of config.json

    def sizes(self, fields: Fields) -> tuple[int, int, bool]:
        """Inner width of an expert, number of experts, whether the chosen ones' probabilities are divided by their sum."""
        raise NotImplementedError

    def size_fields(self, mixture: MixtureOfExperts, router: TopK) -> dict[str, Any] | None:
        """The fields of config.json that say so, or None where this format can't."""
        raise NotImplementedError

    def read_feedforward(self, fields: Fields) -> FeedForward:
        """The mixture of every layer."""
        width, experts, normalise = self.sizes(fields)
        active = fields.need("num_experts_per_tok")
        balance = fields.get("router_aux_loss_coef", 0.001) * active
        router = TopK(active=active, normalise=normalise, balance=balance)
        return MixtureOfExperts(width=width, experts=experts, network="swiglu", router=router)

    def feedforward_fields(self, feedforward: FeedForward) -> dict[str, Any] | None:
        """Its fields."""
        if not isinstance(feedforward, MixtureOfExperts) or feedforward.network != "swiglu":
            return None
        router = feedforward.router
        sizes = self.size_fields(feedforward, router) if isinstance(router, TopK) else None
        if sizes is None or not isinstance(router, TopK):
            return None
        coefficient = router.balance / router.active
        return {**sizes, "num_experts_per_tok": router.active, "router_aux_loss_coef": coefficient, **self.fixed}

    def pairs(self, spec: ModelSpec) -> Iterator[Pair | Fused | Stacked]:
        """Tensor by tensor; a tensor of ours holds those of all experts."""
        yield from super().pairs(spec)
        body = self.span_prefix if isinstance(spec.head, Span) else self.prefix
        for index, layer in enumerate(spec.layers):
            mixture, block = layer.feedforward, f"decoder.blocks.{index}.feedforward"
            assert isinstance(mixture, MixtureOfExperts)
            yield Pair(f"{block}.router.weight", f"{body}layers.{index}.{self.router}")
            for ours, theirs in self.experts.items():
                for expert in range(mixture.experts):
                    name = f"{body}layers.{index}.{theirs.format(expert)}"
                    yield ExpertSlice(f"{block}.experts.{ours}.weight", name, expert=expert, experts=mixture.experts)


class Mixtral(WithExperts, Mistral):
    """Mistral's attention; the probabilities of the chosen experts are divided by their sum."""

    model_type: ClassVar[str] = "mixtral"
    name: ClassVar[str] = "Mixtral"
    default_eps: ClassVar[float] = 1e-5
    layer_names: ClassVar[tuple[tuple[str, str], ...]] = ATTENTION
    router: ClassVar[str] = "block_sparse_moe.gate.weight"
    experts: ClassVar[dict[str, str]] = {
        "gate": "block_sparse_moe.experts.{}.w1.weight",
        "up": "block_sparse_moe.experts.{}.w3.weight",
        "down": "block_sparse_moe.experts.{}.w2.weight",
    }

    def windows(self, fields: Fields) -> list[int | None]:
        """Absent or null means no window."""
        return [fields.get("sliding_window", None, int)] * fields.need("num_hidden_layers")

    def sizes(self, fields: Fields) -> tuple[int, int, bool]:
        """Probabilities are always normalised."""
        return fields.need("intermediate_size"), fields.get("num_local_experts", 8), True

    def size_fields(self, mixture: MixtureOfExperts, router: TopK) -> dict[str, Any] | None:
        """None for probabilities as they are."""
        fields = {"intermediate_size": mixture.width, "num_local_experts": mixture.experts}
        return fields if router.normalise else None


class Qwen3MoE(WithExperts, Qwen3):
    """Qwen 3's attention; mixtures in all layers."""

    model_type: ClassVar[str] = "qwen3_moe"
    name: ClassVar[str] = "Qwen3Moe"
    layer_names: ClassVar[tuple[tuple[str, str], ...]] = ATTENTION
    router: ClassVar[str] = "mlp.gate.weight"
    experts: ClassVar[dict[str, str]] = {
        name: f"mlp.experts.{{}}.{name}_proj.weight" for name in ("gate", "up", "down")
    }
    fixed: ClassVar[dict[str, Any]] = {"decoder_sparse_step": 1, "mlp_only_layers": []}

    def sizes(self, fields: Fields) -> tuple[int, int, bool]:
        """Raises UnsupportedError for a model that has dense layers, too."""
        fields.only("decoder_sparse_step", 1)
        if fields.get("mlp_only_layers", []):
            raise UnsupportedError("config.json names mlp_only_layers: a model with some dense layers isn't read")
        fields.get("intermediate_size", 0)  # of the dense layers, of which there are none
        older = fields.get("num_experts", 128)  # transformers 4's name
        experts = fields.get("num_local_experts", older)
        return fields.need("moe_intermediate_size"), experts, fields.get("norm_topk_prob", False)

    def size_fields(self, mixture: MixtureOfExperts, router: TopK) -> dict[str, Any]:
        """Both ways of weighting are expressed; transformers 4 says num_experts."""
        return {
            "intermediate_size": mixture.width,
            "moe_intermediate_size": mixture.width,
            "num_local_experts": mixture.experts,
            "num_experts": mixture.experts,
            "norm_topk_prob": router.normalise,
        }
