"""What keys and values in 8 bits cost: a text's likelihood, the tokens that are chosen, and the memory of a token.

    python benchmarks/cache_precision.py --model smollm2 --text wikitext2-valid.txt [--passages 40] [--tokens 256] [--device cuda]

Passages of the text, each through `luban.Engine` with keys and values in the model's precision and in fp8, all of a passage's keys
read back from the cache: bits a byte, the mean of |difference| of a token's log-probability, and how many greedy answers of 32
tokens agree, and for how many tokens.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

import luban


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
    model = luban.load_model(call.model, device=call.device, dtype=call.dtype)
    tokenizer = model.need_tokenizer()
    ids = tokenizer.encode(call.text.read_text(encoding="utf-8"))
    step = max(1, (len(ids) - call.tokens) // call.passages)
    passages = [ids[i * step : i * step + call.tokens] for i in range(call.passages)]
    size = sum(len(tokenizer.decode(passage[1:]).encode()) for passage in passages)
    scored = luban.Sampling(max_tokens=1, temperature=0, prompt_logprobs=0, ignore_eos=True)
    greedy = luban.Sampling(max_tokens=call.answer, temperature=0, ignore_eos=True)
    logprobs, answers = {}, {}
    for kind in ("auto", "fp8"):
        engine = luban.Engine(model, cache_dtype=kind)
        found = engine.generate(passages, scored)
        logprobs[kind] = [entry.logprob for each in found for entry in each.prompt_logprobs[1:]]
        answers[kind] = [each.token_ids for each in engine.generate(passages, greedy)]
        bits = -sum(logprobs[kind]) / math.log(2) / size
        print(f"{kind:5s} {engine.budget.slot_bytes:7,} bytes a token, {bits:.4f} bits a byte", flush=True)
    whole, eight = (torch.tensor(logprobs[kind]) for kind in ("auto", "fp8"))
    alike = [
        next((i for i, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]), len(a))
        for a, b in zip(answers["auto"], answers["fp8"], strict=True)
    ]
    print(
        f"|difference| of a token's log-probability {(whole - eight).abs().mean():.4f} nats in the mean, of {len(whole)} tokens; "
        f"{sum(each == call.answer for each in alike)} of {len(alike)} greedy answers alike, {sum(alike) / len(alike):.1f} of {call.answer} tokens in the mean"
    )


if __name__ == "__main__":
    main()
