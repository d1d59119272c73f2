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
luban serve smollm2 --cors https://chat.example.org --allowed-host models.example.org
curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" -d '{"messages": [{"role": "user", "content": "Hello"}]}'
"""
KEY_VARIABLE = "LUBAN_API_KEY"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the verb takes."""

    model: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")
    ]  # a run, a checkpoint, a Hugging Face directory, a GGUF file, or smollm2
    host: str = "127.0.0.1"  # address to listen at
    port: int = 8000  # the next free one is taken where it is in use; 0: any
    api_key: str | None = None  # clients must send it; none: LUBAN_API_KEY from the environment
    allowed_host: tuple[str, ...] = ()  # names of this server, besides addresses, localhost and the machine's own
    cors: tuple[str, ...] = ()  # sites whose pages may use this server, such as https://chat.example.org
    device: str = "cpu"  # such as cpu or cuda
    dtype: str = "float32"  # precision of the weights: float32, bfloat16, float16, int8 (CPU)


def run(argv: Sequence[str]) -> None:
    """Serve until interrupted."""
    args = parse(Arguments, argv, verb="serve", about="An OpenAI-compatible API and a chat page.", examples=EXAMPLES)
    from luban.core.errors import UsageError
    from luban.load.model import load_model
    from luban.serve.run import serve

    if not 0 <= args.port < 1 << 16:
        raise UsageError(f"--port must be from 0 (any) to 65535, {args.port} given")
    key = args.api_key or os.environ.get(KEY_VARIABLE)
    model = load_model(args.model, device=args.device, dtype=args.dtype)
    serve(model, host=args.host, port=args.port, api_key=key, hosts=args.allowed_host, origins=args.cors)
