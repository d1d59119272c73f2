"""`luban serve MODEL`: the OpenAI-compatible API and the chat page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from luban.core.arguments import parse

EXAMPLES = """
luban serve runs/demo/chat
luban serve runs/a --port 9000 --api-key "$KEY"
curl http://127.0.0.1:8000/v1/chat/completions -H "Authorization: Bearer $KEY" -d '{"messages": [...]}'
"""
KEY_VARIABLE = "LUBAN_API_KEY"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the verb takes."""

    model: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")
    ]  # a run, a checkpoint or a Hugging Face directory
    host: str = "127.0.0.1"  # address to listen at
    port: int = 8000  # the next free one is taken where it is in use; 0: any
    api_key: str | None = None  # clients must send it; none: LUBAN_API_KEY from the environment
    device: str = "cpu"  # such as cpu or cuda
    dtype: str = "float32"  # precision of the weights: float32, bfloat16, float16, int8 (CPU)


def run(argv: Sequence[str]) -> None:
    """Serve until interrupted."""
    args = parse(Arguments, argv, verb="serve", about="An OpenAI-compatible API and a chat page.", examples=EXAMPLES)
    from luban.load.model import load_model
    from luban.serve.run import serve

    key = args.api_key or os.environ.get(KEY_VARIABLE)
    serve(load_model(args.model, device=args.device, dtype=args.dtype), host=args.host, port=args.port, api_key=key)
