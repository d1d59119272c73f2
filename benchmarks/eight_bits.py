"""What 8 bits cost, in weights and in keys and values: a text's likelihood, the tokens that are chosen, the memory of a token.

    python benchmarks/eight_bits.py --model smollm2 --text wikitext2-valid.txt [--passages 40] [--tokens 256] [--device cuda]

Passages of the text, each through `luban.Engine`: as the model is; with keys and values in fp8, all of a passage's keys read back from the
cache; with weights as a GPU has them in int8 and in fp8 (`luban.nn.scaled_weight`; a CPU multiplies by the same numbers). Beside the
first case: the mean of |difference| of a token's log-probability, and how far greedy answers agree.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

import luban
from luban.nn.linear import matmul_owners
from luban.nn.scaled_weight import Float8Scaled, Int8Scaled

CASES = {"as it is": ("auto", None), "cache fp8": ("fp8", None), "weights int8": ("auto", Int8Scaled)}
CASES |= {"weights fp8": ("auto", Float8Scaled), "weights and cache fp8": ("fp8", Float8Scaled)}


def agreed(ours: list[int], theirs: list[int]) -> int:
    """Tokens before the first that differs."""
    return next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), len(ours))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--passages", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=256, help="of a passage")
    parser.add_argument("--answer", type=int, default=32, help="tokens of a greedy answer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    call = parser.parse_args()
    scored = luban.Sampling(max_tokens=1, temperature=0, prompt_logprobs=0, ignore_eos=True)
    greedy = luban.Sampling(max_tokens=call.answer, temperature=0, ignore_eos=True)
    logprobs, answers = {}, {}
    for name, (cache, weights) in CASES.items():
        model = luban.load_model(call.model, device=call.device, dtype=call.dtype)
        tokenizer = model.need_tokenizer()
        ids = tokenizer.encode(call.text.read_text(encoding="utf-8"))
        step = max(1, (len(ids) - call.tokens) // call.passages)
        passages = [ids[i * step : i * step + call.tokens] for i in range(call.passages)]
        size = sum(len(tokenizer.decode(passage[1:]).encode()) for passage in passages)
        for _, owner in list(matmul_owners(model.module)) if weights else ():
            owner.pack(weights)
        engine = luban.Engine(model, cache_dtype=cache)
        found = engine.generate(passages, scored)
        logprobs[name] = torch.tensor([entry.logprob for each in found for entry in each.prompt_logprobs[1:]])
        answers[name] = [each.token_ids for each in engine.generate(passages, greedy)]
        first, alike = (
            next(iter(logprobs)),
            [agreed(a, b) for a, b in zip(answers["as it is"], answers[name], strict=True)],
        )
        print(
            f"{name:22s} {engine.budget.slot_bytes:7,} bytes a token of the cache, {-float(logprobs[name].sum()) / math.log(2) / size:.4f} "
            f"bits a byte, |difference| {(logprobs[name] - logprobs[first]).abs().mean():.4f} nats a token, "
            f"{sum(each == call.answer for each in alike)} of {len(alike)} answers alike, {sum(alike) / len(alike):.1f} of {call.answer} tokens",
            flush=True,
        )


if __name__ == "__main__":
    main()
