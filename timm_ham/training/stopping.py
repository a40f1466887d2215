"""Signals to stop, as something that the training loop asks after at a step of its own choosing."""

import signal
import threading
from contextlib import contextmanager
from typing import Iterator

__all__ = ['StopRequest', 'StoppedError', 'stop_requests']


class StoppedError(Exception):
    """The run was told to stop, and its state is written.

    signal: Which signal it was; by convention a command then exits with status 128 + signal: 130 after Ctrl-C,
        143 after SIGTERM, by which clusters announce that they take the machine away.
    """

    def __init__(self, number: int):
        super().__init__(f'stopped by {signal.Signals(number).name}')
        self.signal = number


class StopRequest:
    """signal: The number of the first signal to stop that came, 0 before that."""

    def __init__(self) -> None:
        self.signal = 0

    def handle(self, number: int, frame: object) -> None:
        """Note the signal. A second Ctrl-C does not wait, other repetitions are ignored: launchers pass signals on."""
        if number == signal.SIGINT and self.signal == number and threading.current_thread().name == 'MainThread':
            raise KeyboardInterrupt
        self.signal = self.signal or number


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Take SIGINT and SIGTERM as requests while it is open. Only a program's main thread can: elsewhere none comes."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
