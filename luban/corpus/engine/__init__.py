"""Building by parts: every part of the input is read and stepped on its own, by whichever worker is free.

The steps are cut into phases behind each `AcrossStep`. A phase's result for a part is a spill on disk; its
JSON file, written last, says that it is whole, so that a killed build goes on with the parts that lack one.
"""

from __future__ import annotations

from luban.core.errors import LubanError
from luban.core.registry import Registry

EXECUTORS = Registry(
    "executor",
    {
        "local": "luban.corpus.engine.local:LocalExecutor",
        "ray": "luban.corpus.engine.ray:RayExecutor",
    },
)


class WorkerLost(LubanError):
    """A worker died; what the others finished stays for the next call."""
