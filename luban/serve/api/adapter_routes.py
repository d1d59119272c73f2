"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, with the bodies and answers of vLLM's, where the server takes them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field

from luban.serve.api.errors import UnknownModel

if TYPE_CHECKING:
    from luban.serve.adapters import AdapterPool
    from luban.serve.api.service import Service

LONGEST_NAME = 256  # characters


class LoadAdapterBody(BaseModel):
    """An adapter that requests may ask for from now on, and where the server finds it."""

    model_config = ConfigDict(extra="forbid")
    lora_name: str = Field(min_length=1, max_length=LONGEST_NAME)
    lora_path: str = Field(min_length=1)  # a run of adapters or a PEFT directory
    load_inplace: bool = False  # in the place of one that has the name


class UnloadAdapterBody(BaseModel):
    """An adapter that no further request may ask for."""

    model_config = ConfigDict(extra="forbid")
    lora_name: str
    lora_int_id: int | None = None  # of vLLM's; the name says which


class AdapterRoutes:
    """The two routes of one server."""

    def __init__(self, service: Service):
        self.service = service

    def add_to(self, app: FastAPI) -> None:
        """Answer them."""
        app.post("/v1/load_lora_adapter", response_class=PlainTextResponse)(self.load)
        app.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)(self.unload)

    async def load(self, body: LoadAdapterBody) -> str:
        """Read and check an adapter between the engine's steps."""
        name, path = body.lora_name, body.lora_path
        await self._between_steps(lambda pool: pool.add(name, path, replace=body.load_inplace))
        return f"Success: LoRA adapter '{name}' added successfully."

    async def unload(self, body: UnloadAdapterBody) -> str:
        """Requests that have it keep it."""
        if body.lora_name not in self.service.adapters():
            served = ", ".join(self.service.adapters())
            raise UnknownModel(f"there is no adapter '{body.lora_name}'{f': served are {served}' if served else ''}")
        await self._between_steps(lambda pool: pool.remove(body.lora_name))
        return f"Success: LoRA adapter '{body.lora_name}' removed successfully."

    async def _between_steps(self, function: Callable[[AdapterPool], None]) -> None:
        """Run a function of the engine's adapters in the thread that runs the model."""
        service, pool = self.service, self.service.writer().adapters
        service.require_open(0)
        assert service.worker is not None and pool is not None  # else the server had not begun
        service.active += 1
        try:
            await service.worker.between_steps(partial(function, pool))
        finally:
            service.active -= 1
