"""The same work in TRL: steps of DPO and rounds of GRPO of `post_training.py`'s model, for its figures to stand beside.

    python benchmarks/trl_peer.py [--tiny] [--what dpo grpo]

Needs trl and datasets. bf16 weights, random; 8 pairs of 512 tokens, half of each the answer, reference log-probabilities computed
before; rounds of 8 prompts × 8 answers of 128 tokens behind 128, written by transformers' generate, a reference model, one update.
Seconds are medians between the ends of steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time

import torch
from datasets import Dataset
from post_training import SHAPES
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

STEPS = 7  # the first two aren't timed


class Clock(TrainerCallback):
    """Times of the ends of steps."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, *arguments, **more):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def seconds(self) -> float:
        """Median of a step."""
        return statistics.median(b - a for a, b in zip(self.ends[1:], self.ends[2:], strict=False))


class Peer:
    """Measurements of TRL. Args: tiny: of a model for a CPU, and lengths a quarter of those above."""

    def __init__(self, tiny: bool):
        self.scale = 4 if tiny else 1
        self.tiny, self.shape = tiny, SHAPES["tiny" if tiny else "1b"]
        words = {f"w{i}": i for i in range(self.shape[0])}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w1", eos_token="w2")

    def model(self) -> LlamaForCausalLM:
        """Random weights."""
        vocabulary, width, layers, heads, key_heads, inner = self.shape
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            intermediate_size=inner,
            pad_token_id=1,
            eos_token_id=2,
            bos_token_id=2,
        )
        return LlamaForCausalLM(config).to(torch.float32 if self.tiny else torch.bfloat16)

    def text(self, count: int, tokens: int) -> list[str]:
        """Random words, of which none is special."""
        ids = torch.randint(3, self.shape[0], (count, tokens)).tolist()
        return [" ".join(f"w{i}" for i in row) for row in ids]

    def settings(self, folder: str, **more) -> dict:
        """What both trainers are told."""
        return {
            "output_dir": folder,
            "max_steps": STEPS,
            "bf16": not self.tiny,
            "use_cpu": self.tiny,
            "report_to": [],
            "save_strategy": "no",
            "logging_steps": STEPS,
            "optim": "adamw_torch_fused",
            "gradient_checkpointing": False,
            **more,
        }

    def dpo(self) -> dict[str, float]:
        """Steps of 8 pairs."""
        half, count = 256 // self.scale, 8 * STEPS
        rows = {name: self.text(count, half - (name != "prompt")) for name in ("prompt", "chosen", "rejected")}
        clock = Clock()
        with tempfile.TemporaryDirectory() as folder:
            config = DPOConfig(
                **self.settings(folder, per_device_train_batch_size=8),
                max_length=512 // self.scale,
                precompute_ref_log_probs=True,
            )
            model = self.model()
            trainer = DPOTrainer(
                model=model,
                args=config,
                train_dataset=Dataset.from_dict(rows),
                processing_class=self.tokenizer,
                callbacks=[clock],
            )
            trainer.train()
        return {"pairs_per_second": 8 / clock.seconds(), "tokens_per_second": 8 * 4 * half / clock.seconds()}

    def grpo(self) -> dict[str, float]:
        """Rounds of 64 answers."""
        clock = Clock()
        with tempfile.TemporaryDirectory() as folder:
            config = GRPOConfig(
                **self.settings(folder, per_device_train_batch_size=64),
                num_generations=8,
                max_completion_length=128 // self.scale,
                beta=0.04,
                model_init_kwargs={"dtype": "float32" if self.tiny else "bfloat16"},
                generation_kwargs={"min_new_tokens": 128 // self.scale},
            )
            self.model().save_pretrained(f"{folder}/model")  # the reference is read from a folder
            trainer = GRPOTrainer(
                model=f"{folder}/model",
                args=config,
                reward_funcs=lambda completions, **_: [float(len(text) % 2) for text in completions],
                train_dataset=Dataset.from_dict({"prompt": self.text(8 * STEPS, 128 // self.scale)}),
                processing_class=self.tokenizer,
                callbacks=[clock],
            )
            trainer.train()
        return {"seconds_per_round": clock.seconds()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--what", nargs="+", default=["dpo", "grpo"])
    args = parser.parse_args()
    peer = Peer(args.tiny)
    for what in args.what:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        found = getattr(peer, what)()
        if torch.cuda.is_available():
            found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        print(json.dumps({"peer": what, **found}), flush=True)


if __name__ == "__main__":
    main()
