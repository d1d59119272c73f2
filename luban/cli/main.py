"""`luban VERB …`: a table of verbs, each imported when it is called."""

from __future__ import annotations

import errno
import importlib
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from luban.core.errors import LubanError, TrainingError, UsageError, nearest
from luban.core.log import discard, mute, say

VERBS = {
    "demo": "the whole life, on text this machine already has",
    "corpus": "raw text → a clean, split, documented corpus",
    "tokenizer": "train, import and look at tokenizers",
    "data": "pack a corpus into training shards",
    "pretrain": "train a model from a recipe",
    "sft": "instruction tuning from a recipe",
    "reward": "train a reward model on preferences",
    "dpo": "train a model on preferences: DPO, IPO, KTO, ORPO, SimPO",
    "rl": "reinforcement learning from rewards: PPO, GRPO, RLOO, Quark",
    "score": "score answers with a reward model",
    "import": "a Hugging Face model → a checkpoint",
    "export": "a model → the Hugging Face layout",
    "generate": "continue a prompt",
    "chat": "talk to a model in the terminal",
    "serve": "an OpenAI-compatible API and a chat page",
    "sql": "ask a database in words",
    "bench": "throughput and latency of a server, communication between processes",
    "rag": "index texts, search them, answer from them with sources",
    "eval": "measure a model",
    "judge": "compare models' answers by a judge: win rates, ratings",
    "annotate": "preferences from simulated annotators, or from people at a page",
    "tamer": "teach an agent in a gridworld by feedback, at the keyboard or by an oracle",
    "plan": "how to spread a model over a cluster: time, memory, price of the best plans",
    "account": "FLOPs, GPU-hours, money, energy and carbon of a run",
    "simulate": "a cluster network under a workload: collectives, congestion control",
    "scaling": "scaling laws fitted to runs; the best model for a budget",
    "report": "one page of pictures from run directories",
    "inspect": "kind, files, metrics and lineage of an artifact",
    "systems": "every system Luban implements, and the evidence",
    "doctor": "what this machine has and what is missing",
}


OLDEST = (3, 11)  # Python


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code: 0 done, 1 refused or failed, 2 misunderstood, 130 interrupted, 141 the output
    was closed."""
    words = list(sys.argv[1:] if argv is None else argv)
    if sys.version_info < OLDEST:
        say(f"luban: Python {OLDEST[0]}.{OLDEST[1]} or newer is needed, {sys.executable} is {sys.version.split()[0]}")
        return 1
    rank = os.environ.get("RANK", "0") if "WORLD_SIZE" in os.environ else "0"
    if rank != "0":
        mute()  # of a run's processes the first speaks for all
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        code = _run(words) or 0
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # the work is done all the same
            discard(sys.stdout)
        return code
    except BrokenPipeError:  # what reads the output has enough of it, as head does
        discard(sys.stdout)
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        say("luban: interrupted")
        return 128 + signal.SIGINT
    except LubanError as error:
        if debug:
            raise
        say(f"luban: {' '.join(str(error).split())}")
        if rank != "0" and isinstance(error, TrainingError):
            print(f"luban: process {rank}: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if debug or missing in ("", "luban"):
            raise
        say(f"luban: {_not_installed(missing)}")
        return 1
    except OSError as error:
        if debug or error.errno is None:
            raise
        hint = ": free some space or choose another --out" if error.errno == errno.ENOSPC else ""
        say(f"luban: {error.strerror}: {error.filename or 'while writing'}{hint}")
        return 1


def _not_installed(package: str) -> str:
    """Which package this Python lacks, and the command that installs what Luban needs."""
    root = Path(__file__).parents[2]
    what = f"--editable {shlex.quote(str(root))}" if (root / "pyproject.toml").is_file() else "luban"
    return (
        f"the package '{package}', which Luban needs, is not installed for {sys.executable}: "
        f"{shlex.quote(sys.executable)} -m pip install {what}"
    )


def _overview_or_version(words: Sequence[str]) -> str | None:
    """What is printed where no verb is named."""
    if not words or words[0] in ("-h", "--help", "help"):
        return _overview()
    if words[0] in ("-V", "--version"):
        from luban import __version__

        return __version__
    return None


def _run(words: Sequence[str]) -> int | None:
    if (said := _overview_or_version(words)) is not None:
        print(said)
        return 0
    verb, *rest = words
    if verb not in VERBS:
        raise UsageError(f"unknown verb '{verb}'{nearest(verb, VERBS)}; see luban --help")
    return importlib.import_module(f"luban.cli.{verb}").run(rest)


def _overview() -> str:
    rows = "\n".join(f"  {verb:<10} {about}" for verb, about in VERBS.items())
    return (
        "Luban: one code base for a language model's whole life.\n\n"
        f"usage: luban VERB …\n\n{rows}\n\n"
        "luban VERB --help shows a verb's options and examples. --debug shows tracebacks.\n"
        "Examples:\n  luban demo\n  luban pretrain tiny_pretrain_cpu --data.path shards --out runs/a\n"
        "  luban chat runs/a"
    )


if __name__ == "__main__":
    sys.exit(main())
