"""`python signalled.py STEP CALLS SIGNAL luban's words`: the command, sent a signal CALLS function calls after step STEP was
logged. A parent that waits for the step and then signals may be kept waiting until the command has ended."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])
from calls import signal_after  # noqa: E402

from luban.cli.main import main  # noqa: E402
from luban.core.log import Metrics  # noqa: E402

if __name__ == "__main__":  # data loaders' processes import this file as well
    step, calls, number = map(int, sys.argv[1:4])
    if number == signal.SIGHUP:  # which the tests' own parent may ignore, as nohup does
        signal.signal(number, signal.SIG_DFL)
    write = Metrics.write

    def write_and_arm(self, **row) -> None:
        write(self, **row)
        if row["step"] == step and "loss" in row:
            signal_after(calls, number)

    Metrics.write = write_and_arm
    sys.exit(main(sys.argv[4:]))
