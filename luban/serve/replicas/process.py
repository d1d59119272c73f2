"""One replica: `luban serve` as a process of its own, on a port of its own."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence

from luban.core.log import say

SERVING = re.compile(r"^serving .* at (http://\S+)  \(")
PR_SET_PDEATHSIG = 1  # prctl.h
UNSAID = re.compile(r"^(serving |loading |warning: no --api-key)")  # the front says it for all


class Replica:
    """A child process; `address` is None until it has loaded its model.

    Args:
        number: of the replica, from 0.
        words: the command line behind `luban`.
        environment: of the process.
        changed: called from another thread when it has loaded, or has ended.
    """

    def __init__(
        self, number: int, words: Sequence[str], environment: Mapping[str, str], changed: Callable[[Replica], None]
    ):
        self.number = number
        self.address: str | None = None
        self.process = subprocess.Popen(
            [sys.executable, "-m", "luban", *words],
            stderr=subprocess.PIPE,
            text=True,
            env=dict(environment),
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            start_new_session=True,  # signals of the terminal come through the front, once each
        )
        threading.Thread(target=self._listen, args=(changed,), daemon=True).start()

    def _listen(self, changed: Callable[[Replica], None]) -> None:
        """Pass on what it says, until it ends."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := SERVING.match(line):
                self.address = found[1]
                changed(self)
            elif not UNSAID.match(line):
                say(f"replica {self.number}: {line.rstrip()}")
        self.process.wait()
        self.address = None
        changed(self)

    @property
    def code(self) -> int | None:
        """Its exit code; None: it runs."""
        return self.process.poll()

    def end(self, signal_number: int) -> None:
        """Send it a signal."""
        if self.code is None:
            self.process.send_signal(signal_number)


def _end_with_parent() -> None:
    """In a child on Linux: it is killed when the front is, which then can't do it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def environments(count: int, *, device: str, key: str, gpus: int = 1) -> list[dict[str, str]]:
    """The environment of each replica: `gpus` of its own where there are any, else its share of the cores.

    Raises UsageError for more replicas than GPUs.
    """
    from luban.core.errors import UsageError

    kept = {name: value for name, value in os.environ.items() if not name.startswith("LUBAN_SERVE_")}
    kept["LUBAN_API_KEY"] = key
    if not device.startswith("cuda"):
        threads = os.environ.get("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // count, 1)))
        return [{**kept, "OMP_NUM_THREADS": threads}] * count
    import torch

    seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    there = seen.split(",") if seen else []
    if count * gpus > len(there):
        most = len(there) // gpus
        raise UsageError(
            f"--replicas {count} needs {count * gpus} GPUs, and there are {len(there)}"
            + (f": use --replicas {most}" if most else "")
        )
    own = (there[first : first + gpus] for first in range(0, count * gpus, gpus))
    return [{**kept, "CUDA_VISIBLE_DEVICES": ",".join(each)} for each in own]
