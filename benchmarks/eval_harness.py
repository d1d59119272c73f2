"""The same model, data and shots through `luban eval` and lm-evaluation-harness: equal answers, item by item.

    python -m venv harness && harness/bin/pip install lm_eval torch transformers
    python benchmarks/eval_harness.py --data DIR --harness harness/bin/python [--model smollm2] [--limit 20] [--work DIR]

Multiple choice (XQuAD questions with answers of the same article to choose from, 2 fixed shots), greedy text (two-digit
addition, 2 shots; exact match after a regex), a target's likelihood (last words of paragraphs) and rolling likelihood (WikiText-2
paragraphs), float32 on the CPU. Both programs read the same YAML files and the same JSON lines; the model is exported to the
Hugging Face layout. A tiny random LLaMA of context 64 is measured too, so that texts take several windows.

Checked: the same choice for every item, log-likelihoods within 1e-3 nats; every greedy text the same; rolling log-likelihoods
within 1e-4 of their value; and, within Luban, the same for batches of 1 and of 8,192 tokens and for items in another order.
DIR holds qa/xquad.en.json (github.com/google-deepmind/xquad) and text/wikitext2-valid.txt (pytorch/examples). Exits 1 where a
check fails.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MULTIPLE = """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: DIR/choice.jsonl, train: DIR/choice_shots.jsonl}}
test_split: test
fewshot_split: train
fewshot_config: {sampler: first_n}
num_fewshot: 2
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
GENERATE = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: DIR/sums.jsonl, train: DIR/sums_shots.jsonl}}
test_split: test
fewshot_split: train
fewshot_config: {sampler: first_n}
num_fewshot: 2
output_type: generate_until
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 16, do_sample: false}
filter_list: [{name: number, filter: [{function: regex, regex_pattern: "(-?[0-9]+)"}, {function: take_first}]}]
metric_list: [{metric: exact_match}]
"""
LAST = """
task: last
dataset_path: json
dataset_kwargs: {data_files: {test: DIR/last.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: "{{' ' + word}}"
metric_list: [{metric: acc}, {metric: perplexity}]
"""
ROLLING = """
task: texts
dataset_path: json
dataset_kwargs: {data_files: {test: DIR/texts.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
TASKS = {"choice": MULTIPLE, "sums": GENERATE, "last": LAST, "texts": ROLLING}
NAMES = {"bits_per_byte", "byte_perplexity", "word_perplexity", "acc", "acc_norm", "perplexity", "exact_match"}


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object a line."""
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_data(data: Path, folder: Path, limit: int) -> None:
    """The items and task files that both programs read."""
    rng = random.Random(0)
    rows = []
    for article in json.loads((data / "qa/xquad.en.json").read_text())["data"]:
        asked = [qa for paragraph in article["paragraphs"] for qa in paragraph["qas"]]
        answers = sorted({qa["answers"][0]["text"] for qa in asked})
        for qa in asked[:2]:
            right = qa["answers"][0]["text"]
            choices = rng.sample([a for a in answers if a != right], 3)
            gold = rng.randrange(4)
            choices.insert(gold, right)
            rows.append({"question": qa["question"], "choices": choices, "gold": gold})
    write_rows(folder / "choice.jsonl", rows[2 : 2 + limit])
    write_rows(folder / "choice_shots.jsonl", rows[:2])
    sums = [(rng.randrange(100), rng.randrange(100)) for _ in range(limit + 2)]
    rows = [{"question": f"What is {a} plus {b}?", "answer": str(a + b)} for a, b in sums]
    write_rows(folder / "sums.jsonl", rows[2:])
    write_rows(folder / "sums_shots.jsonl", rows[:2])
    lines = (data / "text/wikitext2-valid.txt").read_text(encoding="utf-8").splitlines()
    texts = [line.strip() for line in lines if 200 < len(line.strip()) < 700][:limit]
    write_rows(folder / "texts.jsonl", [{"text": text} for text in texts])
    cut = [text[:300].rsplit(" ", 1) for text in texts]
    write_rows(folder / "last.jsonl", [{"context": context, "word": word} for context, word in cut])
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.replace("DIR", str(folder)))


def tiny_model(folder: Path, tokenizer_of: Path) -> None:
    """A random LLaMA with the vocabulary of another model and a context of 64 tokens."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    config.max_position_embeddings = 64
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.initializer_range = 0.2
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder)


def theirs(python: str, model: Path, folder: Path, names: list[str], out: Path) -> dict[str, list[dict[str, Any]]]:
    """lm-evaluation-harness's samples by task, in the order of the data."""
    command = [python, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32"]
    command += ["--tasks", *names, "--include_path", str(folder), "--device", "cpu", "--batch_size", "4"]
    subprocess.run([*command, "--log_samples", "--output_path", str(out)], check=True, stdout=subprocess.DEVNULL)
    found = {}
    for name in names:
        (file,) = out.rglob(f"samples_{name}_*.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        found[name] = sorted(rows, key=lambda row: row["doc_id"])
    return found


def ours(model: Path, folder: Path, names: list[str], out: Path, *options: str) -> dict[str, list[dict[str, Any]]]:
    """Luban's rows by task."""
    files = [str(folder / f"{name}.yaml") for name in names]
    subprocess.run([sys.executable, "-m", "luban", "eval", str(model), *files, "--out", str(out), *options], check=True)
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    return {name: [row for row in rows if row["task"] == name] for name in names}


def compare(a: dict[str, list[dict[str, Any]]], b: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What is the same: Luban's rows `a`, the harness's samples `b`."""
    found: dict[str, Any] = {}
    if "choice" in a:
        pairs = list(zip(a["choice"], b["choice"], strict=True))
        found["choices equal"] = all(
            row["scores"]["acc"] == sample["acc"] and row["scores"]["acc_norm"] == sample["acc_norm"]
            for row, sample in pairs
        )
        gaps = [
            abs(choice["logprob"] - float(value[0][0]))
            for row, sample in pairs
            for choice, value in zip(row["choices"], sample["resps"], strict=True)
        ]
        found["choices, largest gap in nats"] = max(gaps)
        found["accuracy"] = sum(row["scores"]["acc"] for row, _ in pairs) / len(pairs)
    if "sums" in a:
        pairs = list(zip(a["sums"], b["sums"], strict=True))
        found["texts equal"] = all(row["raw"] == sample["resps"][0][0] for row, sample in pairs)
        found["exact match equal"] = all(row["scores"]["equal"] == sample["exact_match"] for row, sample in pairs)
    if "last" in a:
        pairs = list(zip(a["last"], b["last"], strict=True))
        found["last word, largest gap in nats"] = max(
            abs(row["answer"]["logprob"] - float(sample["resps"][0][0][0])) for row, sample in pairs
        )
        found["greedy equal"] = all(row["scores"]["acc"] == sample["acc"] for row, sample in pairs)
    pairs = list(zip(a["texts"], b["texts"], strict=True))
    found["rolling, largest relative gap"] = max(
        abs(row["scores"]["nats"] / -_number(sample["resps"][0][0]) - 1) for row, sample in pairs
    )
    return found


def _number(value: Any) -> float:
    return float(value[0] if isinstance(value, list) else value)


def check(found: dict[str, Any], what: str) -> bool:
    """Print what was found; whether it is as it must be."""
    limits = {"gap in nats": 1e-3, "relative gap": 1e-4}
    right = True
    for name, value in found.items():
        most = next((limit for end, limit in limits.items() if name.endswith(end)), None)
        fine = value if isinstance(value, bool) else most is None or value <= most
        right &= bool(fine)
        print(
            f"{what:<10} {name:<34} {value if isinstance(value, bool) else f'{value:.3g}'}{'' if fine else '  WRONG'}"
        )
    return right


def main() -> None:
    """Run both programs and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--harness", required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    write_data(args.data, work, args.limit)
    hf, tiny = work / "hf", work / "tiny"
    if not hf.exists():
        subprocess.run([sys.executable, "-m", "luban", "export", args.model, "--out", str(hf)], check=True)
    if not tiny.exists():
        tiny_model(tiny, hf)
    names = list(TASKS)
    a, b = ours(hf, work, names, work / "ours"), theirs(args.harness, hf, work, names, work / "theirs")
    right = check(compare(a, b), args.model)
    small = {**ours(tiny, work, ["texts"], work / "ours-tiny")}
    right &= check(compare(small, theirs(args.harness, tiny, work, ["texts"], work / "theirs-tiny")), "context 64")
    apart = ours(hf, work, ["choice", "texts"], work / "ours-1", "--batch-tokens", "1")
    gaps = [
        abs(one["logprob"] - other["logprob"])
        for x, y in zip(a["choice"], apart["choice"], strict=True)
        for one, other in zip(x["choices"], y["choices"], strict=True)
    ]
    same = all(x["picked"] == y["picked"] for x, y in zip(a["choice"], apart["choice"], strict=True))
    right &= check({"choices equal": same, "largest gap in nats": max(gaps)}, "batch of 1")
    sys.exit(not right)


if __name__ == "__main__":
    main()
