"""Signals that ask a run to save and stop."""

import signal
import threading
import time
from typing import Any


class StopRequest:
    """SIGTERM, Ctrl-C, SIGUSR1 and a terminal that closes ask the run to save and stop.

    A second one stops it at once. Signals within ``patience`` seconds are one request, because a
    launcher passes on what the whole process group was sent already.
    """

    def __init__(self, patience: float = 3.0) -> None:
        self.name = ""  # of the signal that came
        self._patience, self._asked_at = patience, 0.0
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return bool(self.name)

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if not self.name:
            self.name, self._asked_at = signal.Signals(number).name, now
        elif now - self._asked_at > self._patience:
            self.__exit__()
            signal.raise_signal(number)
