"""A reward over HTTP."""

from __future__ import annotations

import http.client
import json
import urllib.request
from collections.abc import Sequence

from luban.align.rewards.base import Answer
from luban.core.errors import TrainingError


class Endpoint:
    """POST {"answers": [{"row": …, "answer": …}, …]} → {"scores": [number, …]}."""

    name = "http"

    def __init__(self, address: str, timeout: float):
        self.address, self.timeout = address, timeout

    def scores(self, answers: Sequence[Answer]) -> list[float]:
        """One number an answer. Raises TrainingError where the endpoint doesn't answer in time, or with something else."""
        body = json.dumps({"answers": [{"row": a.row, "answer": a.text} for a in answers]}).encode()
        request = urllib.request.Request(self.address, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout * max(1, len(answers))) as reply:
                scores = json.load(reply)["scores"]
            if len(scores) != len(answers):
                raise ValueError(f"{len(scores)} scores for {len(answers)} answers")
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            raise TrainingError(f"the reward at {self.address} failed: {error}. The step was not applied") from None
        return scores
