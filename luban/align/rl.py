"""Reinforcement learning from rewards, through the same loop as pretraining: the loader's batches are rounds of answers that
the policy in training has just written."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from luban.adapters.base import without_adapters
from luban.align.advantages import kl_estimates
from luban.align.critic import ActorCriticState, Critic, critic_start
from luban.align.feedback import conditioned_prompt, quantiles_of
from luban.align.policy_config import GRPO, PPO, RL
from luban.align.preferences import Text
from luban.align.prompts import Prompts, as_prompt_shards, prompt_ids, prompt_of
from luban.align.reference import load_reference
from luban.align.rewards.base import NAMES, Answer, Rewards, identity, open_rewards
from luban.align.rewards.model import ModelReward
from luban.align.rollout import Answers, Sampler, token_logprobs, token_values
from luban.align.rounds import FOLDER, KEPT, Round, RoundLoader, next_beta
from luban.align.start import model_of, packed_beside
from luban.checkpoint.manager import CheckpointManager
from luban.core.config import UNSHOWN
from luban.core.errors import ConfigError, DataError, TrainingError, UsageError
from luban.core.resuming import Operational
from luban.core.seeding import derive, generator
from luban.data.batch import Batch
from luban.data.collate.rollout import RolloutBatch
from luban.data.loader import Loader
from luban.data.shards import Shards
from luban.generate.sampling import Sampling
from luban.load.model import LoadedModel
from luban.objectives.policy import TokenLogprobs
from luban.parallel.device import choose_device
from luban.parallel.engine import TrainEngine
from luban.parallel.precision import COMPUTE
from luban.parallel.world import World, process_count
from luban.train.loop import TrainerComponents
from luban.train.recipe import Recipe
from luban.train.run import assemble, train
from luban.train.start import Start
from luban.train.validate import Measure, Validation


@dataclass(frozen=True, kw_only=True)
class RLRecipe(Recipe):
    """A recipe of reinforcement learning."""

    rl: RL = field(default_factory=GRPO)
    # each a run of luban reward, guarded:SAFETY:HELPFULNESS (two of them), judge:MODEL, file.py:function, gsm8k,
    # facts[:PENALTY], regex:PATTERN, unit_tests or an http address
    reward: Operational[tuple[str, ...]] = ()
    reward_weights: tuple[float, ...] = ()  # one a reward (none: all 1)
    reward_identity: tuple[str, ...] = field(default=(), metadata=UNSHOWN)  # hashes of the rewards, by `packed`
    reference: Operational[str] = ""  # MODEL that the KL divergence is measured from (empty: that of init)
    reference_identity: str = field(default="", metadata=UNSHOWN)  # hash of it, by `packed`

    def __post_init__(self):
        super().__post_init__()
        if self.rl.epochs * self.rl.answers % self.train.batch_size or self.rl.answers % self.train.batch_size:
            raise ConfigError(
                f"a round has {self.rl.prompts} × {self.rl.samples} answers (rl.prompts × rl.samples), which must be a "
                f"multiple of train.batch_size ({self.train.batch_size})"
            )
        if self.reference and not self.rl.measures_kl:
            raise ConfigError("with rl.kl 0 no KL divergence from a reference is measured: leave --reference out")
        if self.rl.max_tokens >= self.train.seq_len:
            raise ConfigError(
                f"rl.max_tokens ({self.rl.max_tokens}) must be below train.seq_len ({self.train.seq_len}), which holds prompt "
                f"and answer"
            )
        if self.train.compile:
            raise ConfigError(
                "luban rl runs uncompiled, since the engine runs the same layers: leave train.compile out"
            )


def rl(recipe: RLRecipe, out: Path, name: str = "rl") -> Path:
    """Train the model `recipe.init` by rewards into the run `out`, or resume what is unfinished there.

    Raises:
        UsageError: no model, data or reward, or several processes.
        DataError: prompts that can't be used.
        LineageError: a reward model with another vocabulary or chat template.
        TrainingError: a reward that fails, or a policy out of bounds; names the last good checkpoint.
    """
    if process_count() > 1:
        raise UsageError("luban rl runs in one process: leave --nproc out")
    with packed_beside(out) as cache:
        ready, model = packed(recipe, cache)
        device = choose_device(ready.train.device)
        tokenizer = model.need_tokenizer()
        rewards = open_rewards(
            ready.reward, ready.reward_weights, tokenizer, recipe.init, str(device), ready.rl.reward_timeout
        )
        parts = partial(components, rewards=rewards, policy=model)
        return train(ready, out, task="rl", name=name, model=model, components=parts)


def packed(recipe: RLRecipe, cache: Path) -> tuple[RLRecipe, LoadedModel]:
    """The recipe with its prompts packed in `cache`, and the model that it starts from."""
    if not recipe.reward:
        raise UsageError(f"no reward: give --reward {NAMES}")
    if getattr(recipe.adapter, "dropout", 0) or recipe.train.neftune:
        raise ConfigError(
            "probabilities of answers are compared between steps, for which the network must stay the same: set adapter.dropout "
            "and train.neftune to 0"
        )
    model = model_of(recipe, "reinforcement learning", "PROMPTS.jsonl")
    path = as_prompt_shards(Path(recipe.data.path), model.need_tokenizer(), cache, recipe.train.seed)
    known = {
        "reward_identity": tuple(identity(name) for name in recipe.reward),
        "reference_identity": identity(recipe.reference) if recipe.reference else "",
    }
    data = replace(recipe.data, path=str(path))
    return replace(recipe, data=data, objective=recipe.rl.objective(), **known), model


def components(
    recipe: RLRecipe,
    shards: Shards,
    start: Start,
    device: torch.device,
    world: World,
    folder: Path,
    *,
    rewards: Rewards,
    policy: LoadedModel,
) -> TrainerComponents:
    """Policy, critic, reference, sampler and rounds, as `luban.train.run.assemble`."""
    parts = assemble(recipe, shards, start, device, world, folder)
    critic = None
    if isinstance(recipe.rl, PPO):
        first = next((reward.model for reward in rewards.rewards if isinstance(reward, ModelReward)), None)
        critic = Critic(recipe, recipe.rl, critic_start(recipe, recipe.rl, policy, first), device)
    actor = Actor(recipe, parts.engine, policy, rewards, critic, shards, folder)
    text = None
    if recipe.rl.pretrain:
        mix = Shards.open(recipe.rl.pretrain)
        mix.require_tokenizer(policy.need_tokenizer().content_hash, f"model {recipe.init}")
        text = Loader(mix, batch_size=recipe.train.batch_size, seq_len=recipe.train.seq_len, seed=recipe.train.seed)
    loader = RoundLoader(
        recipe.rl,
        make=actor.round,
        folder=folder / FOLDER,
        batch_size=recipe.train.batch_size,
        seed=recipe.train.seed,
        pad_id=shards.pad_id,
        learn=None if critic is None else critic.learn,
        text=text,
    )
    return TrainerComponents(
        recipe,
        parts.engine,
        ActorCriticState(start.spec, parts.engine, critic=critic),
        loader,  # type: ignore[arg-type]
        HeldoutReward.of(actor),  # type: ignore[arg-type]
    )


class Actor:
    """Makes rounds: samples answers, scores them, and reads them with policy, reference and critic."""

    def __init__(
        self,
        recipe: RLRecipe,
        engine: TrainEngine,
        policy: LoadedModel,
        rewards: Rewards,
        critic: Critic | None,
        shards: Shards,
        folder: Path,
    ):
        self.recipe, self.rl, self.engine, self.critic = recipe, recipe.rl, engine, critic
        self.rewards, self.shards, self.folder = rewards, shards, folder
        self.seed, self.longest = recipe.train.seed, recipe.train.seq_len + 1 - recipe.rl.max_tokens
        self.tokenizer = policy.need_tokenizer()
        self.prompts = self.opened(shards)
        self.sampler = Sampler(policy, engine.module.model, recipe.rl.answers, recipe.train.seq_len)
        self.rows = recipe.train.batch_size // recipe.train.accumulate  # read at once
        live = not recipe.reference and recipe.adapter is not None and recipe.adapter.removable
        self.reference = self._reference(policy) if recipe.rl.measures_kl and not live else None

    def opened(self, shards: Shards) -> Prompts:
        """The prompts of a split that leave the context enough tokens for an answer, with the sentence that asks for a quantile where there is one."""
        if not self.rl.quantiles:
            return Prompts.open(shards, self.longest)
        plain, asked = (prompt_ids(prompt, self.tokenizer) for prompt in ("x", self._conditioned("x", 0)))
        return Prompts.open(shards, self.longest - (len(asked) - len(plain)))

    def _conditioned(self, prompt: Text, quantile: int) -> Text:
        """A prompt that asks for a quantile of the scores, 0 being the lowest."""
        return conditioned_prompt(prompt, quantile + 1, self.rl.quantiles)

    def _asked(self, row: dict[str, Any], quantile: int) -> list[int]:
        return prompt_ids(self._conditioned(prompt_of(row), quantile), self.tokenizer)

    def relabelled(self, answers: Answers, scores: np.ndarray, rows: list[int], number: int) -> Answers:
        """The answers behind prompts that ask for the quantile which their scores are in."""
        kept = [Round.load(self.folder / FOLDER, n) for n in range(max(0, number - KEPT + 1), number)]
        pool = np.concatenate([*(each.arrays["scores"] for each in kept), scores])
        quantiles = quantiles_of(scores, pool, self.rl.quantiles)
        prompts = [self._asked(self.prompts.rows[row], q) for row, q in zip(rows, quantiles, strict=True)]
        return Answers(prompts, answers.answers, answers.sampling, answers.texts, answers.finished)

    def _reference(self, policy: LoadedModel) -> TokenLogprobs:
        """A model of its own to measure the KL divergence from, frozen."""
        model = load_reference(self.recipe.reference or self.recipe.init, policy)
        dtype = COMPUTE[self.recipe.train.precision]
        module = model.module.to(device=self.engine.device, dtype=dtype).requires_grad_(False)
        return TokenLogprobs(module, self.engine.module.attention, self.rl.temperature).eval()

    def chosen(self, number: int) -> list[int]:
        """The prompts of a round: all once, then all again in another order."""
        places = number * self.rl.prompts + np.arange(self.rl.prompts)
        epochs, at = np.divmod(places, len(self.prompts.ids))
        orders = {
            e: generator(self.seed, "prompts", e).permutation(len(self.prompts.ids)) for e in set(epochs.tolist())
        }
        return [int(orders[e][i]) for e, i in zip(epochs.tolist(), at.tolist(), strict=True)]

    def write(self, prompts: Prompts, chosen: list[int], samples: int, *names: str | int) -> Answers:
        """Answers to some of the prompts."""
        rl = self.rl
        ids = [prompts.ids[i] for i in chosen]
        if rl.quantiles:
            ids = [self._asked(prompts.rows[i], rl.quantiles - 1) for i in chosen]
        seed = derive(self.seed, *names)
        return self.sampler.write(
            ids, Sampling(n=samples, max_tokens=rl.max_tokens, temperature=rl.temperature, seed=seed)
        )

    def score(self, prompts: Prompts, chosen: list[int], answers: Answers) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """((N,) scores, name → scores of each reward)."""
        rows = np.repeat(chosen, len(answers.prompts) // len(chosen)).tolist()
        scores, apart = self.rewards.scores(
            [
                Answer(row=prompts.rows[row], text=text, prompt_ids=prompts.ids[row], ids=ids)
                for row, text, ids in zip(rows, answers.texts, answers.answers, strict=True)
            ]
        )
        if self.rl.unfinished is not None:
            scores = np.where(answers.finished, scores, self.rl.unfinished)
        return scores, apart

    def round(self, number: int) -> Round:
        """A new round, of the weights as they are. Raises TrainingError where KL or entropy are out of bounds."""
        chosen, seconds = self.chosen(number), dict[str, float]()
        with spent(seconds, "sampling"):
            answers = self.write(self.prompts, chosen, self.rl.samples, "round", number)
        with spent(seconds, "scoring"):
            scores, apart = self.score(self.prompts, chosen, answers)
        if self.rl.quantiles:
            rows = np.repeat(chosen, self.rl.samples).tolist()
            answers = self.relabelled(answers, scores, rows, number)
        batch = answers.batch(self.shards.pad_id)
        module, device = self.engine.module, self.engine.device
        assert isinstance(module, TokenLogprobs)
        with spent(seconds, "reading"):  # by policy, reference and critic
            old, entropies = token_logprobs(module, batch, self.rows, device)
            reference = self._reference_logprobs(batch, old)
            values = np.zeros(old.shape)
            if self.critic is not None:
                values = token_values(self.critic.engine.module, batch, self.rows, device)
        arrays = {
            "old_logprobs": old,
            "reference_logprobs": reference,
            "old_values": values,
            "sampled": answers.sampled(),
            "entropies": entropies,
            "scores": scores,
        }
        beta = next_beta(self.rl, self.folder / FOLDER, number)
        made = Round(answers=answers, arrays=arrays, apart=apart, rows=chosen, beta=beta, seconds=seconds)
        self._check(made, entropies.sum() / max(batch.loss_mask.sum(), 1), number)
        return made

    def _reference_logprobs(self, batch: RolloutBatch, old: np.ndarray) -> np.ndarray:
        """Log-probabilities under the reference, which with a removable adapter is the policy without it; `old` where no KL
        divergence is measured."""
        if not self.rl.measures_kl:
            return old
        if self.reference is not None:
            return token_logprobs(self.reference, batch, self.rows, self.engine.device)[0]
        module = self.engine.module
        assert isinstance(module, TokenLogprobs)
        with without_adapters(module.model):
            return token_logprobs(module, batch, self.rows, self.engine.device)[0]

    def _check(self, made: Round, entropy: float, number: int) -> None:
        rl = self.rl
        divergence = float(kl_estimates(made.kl)["k3"].sum(-1).mean())
        if rl.max_kl and divergence > rl.max_kl:
            what = f"the KL divergence of an answer from the reference is {divergence:.3g} nats, above rl.max_kl {rl.max_kl:g}"
        elif rl.min_entropy and entropy < rl.min_entropy:
            what = f"the mean entropy of a token is {entropy:.3g} nats, below rl.min_entropy {rl.min_entropy:g}"
        else:
            return
        steps = CheckpointManager(self.folder).steps()
        last = CheckpointManager(self.folder).path(steps[-1]) if steps else "none was saved yet"
        remedy = "Lower --optim.lr, or raise --rl.kl or --rl.entropy"
        if not number:
            remedy = "That is so of the model before training: choose another bound"
        raise TrainingError(f"stopped before round {number}: {what}. Last good checkpoint: {last}. {remedy}")


@contextmanager
def spent(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Note the seconds of a phase of a round."""
    began = time.monotonic()
    yield
    seconds[phase] = time.monotonic() - began


@dataclass(frozen=True, kw_only=True)
class MeasuredReward(Validation):
    """Mean reward on held-out prompts; the loss is its negative, so that the best checkpoint has the highest."""

    def row(self) -> dict[str, float]:
        """As a row of metrics."""
        return {"heldout_reward": -self.loss, "heldout_answers": self.tokens}


class HeldoutReward:
    """Measures the mean reward of an answer to each held-out prompt, sampled with the same seeds each time."""

    measure = Measure(
        name="held-out reward", best="highest", sign=-1, no_better="what is learned no longer helps on new prompts"
    )

    def __init__(self, actor: Actor, prompts: Prompts):
        self.actor, self.prompts = actor, prompts

    @classmethod
    def of(cls, actor: Actor) -> HeldoutReward | None:
        """None without held-out prompts, which assembling the run has warned of."""
        try:
            return cls(actor, actor.opened(Shards.open(actor.shards.path, "heldout")))
        except DataError:
            return None

    def batches_once(self) -> Iterator[Batch]:
        """None: answers are written anew."""
        yield from ()

    def __call__(self, engine: TrainEngine) -> Validation:
        """Measure."""
        chosen = list(range(min(self.actor.rl.heldout, len(self.prompts.ids))))
        answers = self.actor.write(self.prompts, chosen, 1, "heldout")
        scores, _ = self.actor.score(self.prompts, chosen, answers)
        return MeasuredReward(
            loss=-float(scores.mean()), tokens=len(scores), seq_len=self.actor.recipe.train.seq_len, bits_per_byte=None
        )
