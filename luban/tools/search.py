"""Search as a tool: a model asks a `Retriever` for passages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from luban.core.protocols import Retriever
from luban.tools.tool import Tool

FIELDS = ("title", "text", "source")  # of a passage that the model reads


def search_tool(retriever: Retriever, *, k: int = 3, about: str = "Searches a collection of texts.") -> Tool:
    """A tool `search(query)` that gives the `k` best passages, each with title, text and source where it has them."""

    def search(query: str) -> list[dict[str, Any]]:
        return [_shown(passage) for passage in retriever.search(query, k)]

    schema = {
        "type": "object",
        "properties": {"query": {"type": "string", "minLength": 1, "maxLength": 300}},
        "required": ["query"],
        "additionalProperties": False,
    }
    return Tool(name="search", description=about, parameters=schema, function=search)


def _shown(passage: Any) -> dict[str, Any]:
    """What the model reads of a passage."""
    if isinstance(passage, str):
        return {"text": passage}
    if hasattr(passage, "row"):  # a hit of an index, whose passage lies inside
        passage = passage.row()
    elif is_dataclass(passage) and not isinstance(passage, type):
        passage = asdict(passage)
    if not isinstance(passage, Mapping):
        passage = vars(passage)
    return {name: passage[name] for name in FIELDS if passage.get(name)}
