"""Speed of post-training on one device: DPO pairs, rollouts and rounds of GRPO and PPO, rollouts beside transformers' generate.

    python benchmarks/post_training.py [--tiny] [--what dpo rollouts grpo ppo] [--peer]

Random weights of a LLaMA shape of 1.1B parameters in bf16 with fp32 masters (`--tiny`: 0.1M in fp32, for a CPU), random tokens.

dpo: steps of 8 pairs of 512 tokens, half of each the answer, the reference's log-probabilities stored; pairs and tokens a second.
rollouts: 64 prompts of 128 tokens, 128 tokens written to each; tokens a second.
grpo: a round of 8 prompts × 8 answers of 128 tokens: rollouts, old and reference log-probabilities, one update; seconds.
ppo: the same with a critic and four passes over the answers.

`--peer` also measures transformers' generate on the prompts of `rollouts`, where it is installed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import luban
from luban.align.critic import Critic
from luban.align.dpo import DPORecipe
from luban.align.policy_config import GRPO, PPO, RL
from luban.align.prompts import Prompts
from luban.align.rewards.base import Answer, Rewards
from luban.align.rl import Actor, RLRecipe
from luban.align.rollout import Sampler
from luban.align.rounds import RoundLoader
from luban.core.config import from_dict
from luban.data.collate.preference import PreferenceBatch
from luban.generate.sampling import Sampling
from luban.load.model import LoadedModel
from luban.models.head.rows import Value
from luban.models.spec import ModelSpec, uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.mixer.grouped import Grouped
from luban.objectives.policy import TokenLogprobs
from luban.train.run import make_engine
from luban.train.start import Start

SHAPES = {  # vocabulary, width, layers, heads, key heads, feed-forward
    "1b": (32_000, 2048, 22, 32, 4, 5632),
    "tiny": (512, 64, 2, 4, 2, 128),
}
STEPS = 5  # timed, behind two that aren't


class Shares:
    """A reward that costs nothing: the share of even tokens."""

    name = "even"

    def scores(self, answers: list[Answer]) -> list[float]:
        return [sum(token % 2 == 0 for token in answer.ids) / len(answer.ids) for answer in answers]


class Bench:
    """Measurements on one device.

    Args:
        tiny: of a model for a CPU, and lengths a quarter of those above.
    """

    def __init__(self, tiny: bool):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        vocabulary, width, layers, heads, key_heads, inner = SHAPES["tiny" if tiny else "1b"]
        self.spec: ModelSpec = uniform(
            vocab_size=vocabulary,
            width=width,
            context=2048,
            layers=layers,
            mixer=Grouped(heads=heads, kv_heads=key_heads),
            feedforward=SwiGLU(width=inner),
        )
        self.scale = 4 if tiny else 1
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.train = {
            "precision": "fp32" if tiny else "bf16",
            "device": self.device.type,
            "seq_len": 512 // self.scale,
            "batch_size": 8,
        }

    def start(self, spec: ModelSpec | None = None) -> Start:
        """Random weights."""
        return Start(spec=spec or self.spec)

    def timed(self, step: Callable[[], object], steps: int = STEPS) -> float:
        """Median seconds of a step."""
        seconds = []
        for number in range(steps + 2):
            self.synchronise()
            began = time.perf_counter()
            step()
            self.synchronise()
            if number > 1:
                seconds.append(time.perf_counter() - began)
        return float(np.median(seconds))

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def dpo(self) -> dict[str, float]:
        """Steps of 8 pairs."""
        length, rng = 512 // self.scale, np.random.default_rng(0)
        recipe = from_dict(DPORecipe, {"train": {**self.train, "compile": self.device.type == "cuda"}})
        engine = make_engine(recipe, self.start(), self.device)
        shape = (8, 2 * length)
        tokens = rng.integers(0, self.spec.vocab_size, shape)
        inside = np.tile(np.arange(length, dtype=np.int32), 2)
        batch = PreferenceBatch(
            tokens=tokens,
            targets=np.roll(tokens, -1, axis=1),
            loss_mask=np.broadcast_to((inside >= length // 2) & (inside < length - 1), shape).copy(),
            documents=np.broadcast_to(np.repeat(np.arange(2, dtype=np.int32), length), shape).copy(),
            positions=np.broadcast_to(inside, shape).copy(),
            ends=np.tile(np.array([length - 1, 2 * length - 1]), (8, 1)),
            present=np.ones((8, 2), dtype=bool),
            ranks=np.tile(np.array([1, 0], dtype=np.float32), (8, 1)),
            grades=np.full(8, -1),
            probabilities=np.ones(8, dtype=np.float32),
            reference=np.full((8, 2), -1000, dtype=np.float32),
            mismatched_reference=np.full(8, np.nan, dtype=np.float32),
        )
        seconds = self.timed(lambda: engine.step(batch))
        return {"pairs_per_second": 8 / seconds, "tokens_per_second": 8 * 2 * length / seconds, **self.memory()}

    def policy(self) -> LoadedModel:
        """A model that ends nothing by itself."""
        module = luban.build_model(self.spec, seed=0).to(device=self.device, dtype=self.dtype).eval()
        return LoadedModel(spec=self.spec, module=module, tokenizer=None, name="random", path=Path("."), manifest=None)

    def prompts(self, count: int) -> list[list[int]]:
        rng = np.random.default_rng(1)
        return rng.integers(0, self.spec.vocab_size, (count, 128 // self.scale)).tolist()

    def rollouts(self) -> dict[str, float]:
        """64 answers to 64 prompts."""
        policy, written = self.policy(), 128 // self.scale
        sampler = Sampler(policy, policy.module, 64, 2 * written)
        prompts, seeds = self.prompts(64), iter(range(100))
        seconds = self.timed(lambda: sampler.write(prompts, Sampling(max_tokens=written, seed=next(seeds))), 3)
        return {"tokens_per_second": 64 * written / seconds, **self.memory()}

    def round(self, rl: RL) -> dict[str, float]:
        """Whole rounds: rollouts to update."""
        recipe = from_dict(
            RLRecipe,
            {"train": {**self.train, "seq_len": 256 // self.scale, "batch_size": 64}, "rl": {"max_tokens": 16}},
        )
        recipe = replace(recipe, rl=rl, objective=rl.objective())
        engine, policy = make_engine(recipe, self.start(), self.device), self.policy()
        critic = None
        if isinstance(rl, PPO):
            critic = Critic(recipe, rl, self.start(replace(self.spec, head=Value())), self.device)
        rows = Prompts(ids=self.prompts(64), rows=[{} for _ in range(64)])
        with tempfile.TemporaryDirectory() as folder:
            actor = RandomActor(recipe, engine, policy, critic, rows, Path(folder))
            loader = RoundLoader(
                rl,
                make=actor.round,
                folder=Path(folder) / "rollouts",
                batch_size=64,
                seed=0,
                pad_id=0,
                learn=None if critic is None else critic.learn,
            )
            batches = loader.iterate()

            def once() -> None:
                for _ in range(loader.steps):
                    engine.step(next(batches))

            seconds = self.timed(once, 3)
        return {"seconds_per_round": seconds, "rollout_seconds": actor.seconds / 5, **self.memory()}

    def memory(self) -> dict[str, float]:
        """Peak on the device, in GiB."""
        if self.device.type != "cuda":
            return {}
        return {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}

    def transformers_generate(self) -> dict[str, float]:
        """transformers' generate on the same shape and prompts."""
        from transformers import LlamaConfig, LlamaForCausalLM

        vocabulary, width, layers, heads, key_heads, inner = SHAPES["tiny" if self.scale > 1 else "1b"]
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            intermediate_size=inner,
        )
        model = LlamaForCausalLM(config).to(device=self.device, dtype=self.dtype).eval()
        ids = torch.tensor(self.prompts(64), device=self.device)
        written = 128 // self.scale

        def generate() -> None:
            model.generate(ids, max_new_tokens=written, min_new_tokens=written, do_sample=True, pad_token_id=0)

        return {"generate_tokens_per_second": 64 * written / self.timed(generate, 2)}


class RandomActor(Actor):
    """An actor over random weights, whose prompts are token ids."""

    def __init__(self, recipe, engine, policy, critic, prompts: Prompts, folder: Path):
        self.recipe, self.rl, self.engine, self.critic = recipe, recipe.rl, engine, critic
        self.rewards, self.prompts, self.folder, self.seed = Rewards((Shares(),), (1.0,)), prompts, folder, 0
        self.shards, self.rows, self.seconds = PadZero(), 64, 0.0
        self.sampler = Sampler(policy, engine.module.model, recipe.rl.answers, recipe.train.seq_len)
        self.reference = TokenLogprobs(policy.module.requires_grad_(False), engine.module.attention).eval()

    def write(self, *arguments):
        """Timed."""
        began = time.perf_counter()
        found = super().write(*arguments)
        self.seconds += time.perf_counter() - began
        return found


class PadZero:
    """Shards of which only the padding's id is asked."""

    pad_id = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--what", nargs="+", default=["dpo", "rollouts", "grpo", "ppo"])
    args = parser.parse_args()
    bench = Bench(args.tiny)
    written = 128 // bench.scale
    measures = {
        "dpo": bench.dpo,
        "rollouts": bench.rollouts,
        "grpo": lambda: bench.round(GRPO(prompts=8, samples=8, max_tokens=written)),
        "ppo": lambda: bench.round(PPO(prompts=64, samples=1, max_tokens=written, epochs=4)),
    }
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"
    print(json.dumps({"device": name, "torch": torch.__version__}))
    for what in args.what:
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        print(json.dumps({"what": what, **measures[what]()}), flush=True)
    if args.peer:
        print(json.dumps({"what": "transformers", **bench.transformers_generate()}), flush=True)


if __name__ == "__main__":
    main()
