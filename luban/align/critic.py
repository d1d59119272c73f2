"""PPO's critic: a value model that is trained beside the policy, and saved in the policy's checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from luban.align.policy_config import PPO
from luban.align.scoring import RewardModel
from luban.checkpoint.checkpoint import Checkpoint
from luban.checkpoint.reader import CheckpointReader
from luban.core.config import Partial
from luban.core.errors import LineageError
from luban.data.collate.rollout import RolloutBatch
from luban.load.model import LoadedModel, load_model
from luban.models.build import state_of
from luban.models.head.rows import Value
from luban.objectives.value import ValueFunction
from luban.parallel.engine import TrainEngine
from luban.train.recipe import Recipe
from luban.train.run import make_engine
from luban.train.start import Start, with_head
from luban.train.state import TrainState

PREFIX = "critic."  # of the critic's tensors among the optimizer's in a checkpoint


def critic_start(recipe: Recipe, ppo: PPO, policy: LoadedModel, reward: RewardModel | None) -> Start:
    """The critic before its first step: the model of `ppo.critic`, else the first reward model, its scores shifted as the
    reward's are, else the policy's body under a new value head.

    Raises:
        LineageError: a critic with another vocabulary.
    """
    if ppo.critic:
        model = load_model(ppo.critic)
        reward = RewardModel(model) if isinstance(model.spec.head, Value) else None
    else:
        model = reward.model if reward is not None else policy
    if not model.need_tokenizer().same_vocabulary(policy.need_tokenizer()):
        raise LineageError(f"the critic {model.name} has another vocabulary than the policy {policy.name}")
    weights = {name: tensor.float().cpu().clone() for name, tensor in state_of(model.module).items()}
    if reward is None:
        headed = replace(recipe, model=Partial(recipe.model.of, {"head": {"type": "value"}}))
        spec, weights = with_head(headed, model.spec, weights)
        return Start(spec=spec, weights=weights)
    if "head.output.bias" in weights:
        weights["head.output.bias"] -= reward.offset
    return Start(spec=model.spec, weights=weights)


class Critic:
    """A value model in training.

    Args:
        recipe: of the policy: optimizer, schedule, precision.
    """

    def __init__(self, recipe: Recipe, ppo: PPO, start: Start, device: Any):
        optim = replace(recipe.optim, lr=ppo.critic_lr) if ppo.critic_lr else recipe.optim
        self.recipe = replace(recipe, objective=ValueFunction(clip=ppo.value_clip), optim=optim, adapter=None)
        self.engine: TrainEngine = make_engine(self.recipe, start, device)

    def learn(self, batch: RolloutBatch, step: int) -> None:
        """One step on the batch that the policy is about to be trained on."""
        factor = self.recipe.schedule.factor(step, self.recipe.train.steps)
        self.engine.submit(replace(batch, logged={}, pretraining={}), factor)


@dataclass
class ActorCriticState(TrainState):
    """The policy's state with the critic's beside it."""

    critic: Critic | None = None

    def to_checkpoint(self) -> Checkpoint:
        """As TrainState, the critic's weights and moments among the optimizer's tensors."""
        checkpoint = super().to_checkpoint()
        if self.critic is None:
            return checkpoint
        held = self.critic.engine.held()
        extra = {f"{PREFIX}{kind}/{name}": value for kind, values in held.items() for name, value in values.items()}
        return replace(checkpoint, optimizer={**checkpoint.optimizer, **extra})

    def restore(self, checkpoint: CheckpointReader, seed: int) -> None:
        """Go back to a checkpoint, policy and critic."""
        super().restore(cast(CheckpointReader, _Part(checkpoint, "")), seed)
        if self.critic is not None:
            self.critic.engine.take_up(_Part(checkpoint, PREFIX))


class _Part:
    """A checkpoint as the policy (prefix "") or the critic sees it."""

    def __init__(self, checkpoint: CheckpointReader, prefix: str):
        self.checkpoint, self.prefix = checkpoint, prefix

    def entries(self, collection: str) -> Mapping[str, Any]:
        """The part's tensors of a collection."""
        if not self.prefix:
            found = self.checkpoint.entries(collection)
            return {name: entry for name, entry in found.items() if not name.startswith(PREFIX)}
        start = f"{self.prefix}{collection}/"
        found = self.checkpoint.entries("optimizer")
        return {name.removeprefix(start): entry for name, entry in found.items() if name.startswith(start)}

    def read(self, collection: str, name: str, begin: Any, shape: Any) -> Any:
        """A rectangle of a tensor."""
        if self.prefix:
            return self.checkpoint.read("optimizer", f"{self.prefix}{collection}/{name}", begin, shape)
        return self.checkpoint.read(collection, name, begin, shape)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.checkpoint, name)
