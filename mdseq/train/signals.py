"""Stopping a run from outside: finish the step, save, and leave."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from typing import Any, Self

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Launchers pass one Ctrl-C on in several ways at once; only what comes later was meant as a second one.
IMPATIENCE_SECONDS = 3.0


def stop_status(number: int) -> int:
    """Exit status of a run that a signal has stopped, as shells count."""
    return 128 + number


class StopSignals:
    """A context: inside, a signal asks for a stop; one more, IMPATIENCE_SECONDS later, stops at once, without saving.

    A thread takes the signals: the main one would not be asked while it waits in a collective.

    Attributes:
        received: The first signal; 0 if none has come to this process.
    """

    def __init__(self) -> None:
        self.received = 0
        self._handlers: dict[signal.Signals, Any] = {}
        self._outlet, self._inlet = socket.socketpair()
        self._inlet.setblocking(False)
        self._thread = threading.Thread(target=self._take, name="signals", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._wakeup = signal.set_wakeup_fd(self._inlet.fileno())
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._inlet.close()
        self._thread.join()
        self._outlet.close()

    def _take(self) -> None:
        first = 0.0
        while numbers := self._outlet.recv(1):
            if numbers[0] not in STOP_SIGNALS:
                continue
            if not self.received:
                self.received, first = numbers[0], time.monotonic()
            elif time.monotonic() - first > IMPATIENCE_SECONDS:
                os._exit(stop_status(numbers[0]))
