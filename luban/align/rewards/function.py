"""A Python function as a reward, in a process of its own, so that one that hangs or crashes ends nothing else."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from luban.align.rewards.base import Answer
from luban.core.errors import ConfigError, TrainingError

START_SECONDS = 120.0  # for the function's imports


class FunctionReward:
    """`function(prompt, answer, row) -> float`: the row's prompt, the answer's text, the row of the file.

    Raises:
        ConfigError: no such file or function, or one that can't be imported.
    """

    def __init__(self, file: Path, function: str, timeout: float):
        if not file.is_file():
            raise ConfigError(f"there is no file {file} with a reward function {function}")
        self.name, self.file, self.timeout = function, file, timeout
        command = [sys.executable, "-m", "luban.align.rewards.worker", str(file), function]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        )  # Ctrl-C of the run is not for it
        self._pending = b""
        started = self._read(START_SECONDS)
        if started is None or "error" in started:
            self.close()
            raise ConfigError(f"reward function {function} of {file}: {(started or {}).get('error', 'no answer')}")

    def scores(self, answers: Sequence[Answer]) -> list[float]:
        """One number an answer.

        Raises:
            TrainingError: the function raised, gave no number, took longer than the timeout or ended its process.
        """
        found = []
        for answer in answers:
            asked = {"row": answer.row, "answer": answer.text}
            try:
                os.write(self.process.stdin.fileno(), json.dumps(asked).encode() + b"\n")  # type: ignore[union-attr]
            except BrokenPipeError:
                raise self._failed("its process has ended", answer) from None
            reply = self._read(self.timeout)
            if reply is None:
                ended = self.process.poll() is not None
                self.close()
                why = "its process has ended" if ended else f"it took more than {self.timeout:g} s (rl.reward_timeout)"
                raise self._failed(why, answer)
            if "error" in reply:
                raise self._failed(reply["error"], answer)
            found.append(reply["score"])
        return found

    def _failed(self, why: str, answer: Answer) -> TrainingError:
        return TrainingError(
            f"reward function {self.name} of {self.file} failed on the answer {answer.text[:80]!r}: {why}. The step was not "
            f"applied"
        )

    def _read(self, seconds: float) -> dict | None:
        """The worker's next line; None where it ends or is silent for so long."""
        out = self.process.stdout
        assert out is not None
        while b"\n" not in self._pending:
            ready, _, _ = select.select([out], [], [], seconds)
            piece = os.read(out.fileno(), 1 << 16) if ready else b""
            if not piece:
                return None
            self._pending += piece
        line, _, self._pending = self._pending.partition(b"\n")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def __del__(self):
        if hasattr(self, "process") and self.process.poll() is None:
            self.close()
