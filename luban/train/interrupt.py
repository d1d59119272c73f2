"""Ctrl-C, SIGTERM and SIGHUP ask training to stop after the running step; a second Ctrl-C stops at once."""

from __future__ import annotations

import signal

from luban.core.errors import LubanError
from luban.core.log import say


class Interrupted(LubanError):
    """Training stopped because it was asked to; everything is saved."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + number  # 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP


class StopRequest:
    """`with StopRequest() as stop: … if stop.signal: save and leave`."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the last: the terminal was closed

    def __init__(self):
        self.signal: int | None = None

    def __enter__(self) -> StopRequest:
        ignored = {number for number in self.SIGNALS if signal.getsignal(number) is signal.SIG_IGN}  # as by nohup
        self._before = {number: signal.signal(number, self._ask) for number in self.SIGNALS if number not in ignored}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        say(f"\n{signal.Signals(number).name}: saving after this step")
