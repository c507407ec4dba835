"""Being told to stop: SIGTERM, SIGUSR1 and Ctrl-C become a request that the run answers when it can save."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # from linux/prctl.h


class Stopped(Exception):
    """The run was told to stop in the middle of an evaluation. Raised on all ranks together."""


class StopRequest:
    """Catches the signals from its construction on. A second Ctrl-C ends the process at once."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._handle)
        if "ACCELERATE_MIXED_PRECISION" in os.environ:  # set by `accelerate launch`
            ask_to_be_told_when_the_launcher_dies()

    def __bool__(self) -> bool:
        return self.signal != 0

    @property
    def name(self) -> str:
        return signal.Signals(self.signal).name if self else "another process was told to stop"

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, as in a shell; otherwise 75, "try again later"."""
        return 130 if self.signal == signal.SIGINT else 75

    def _handle(self, number, frame):
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


def ask_to_be_told_when_the_launcher_dies() -> None:
    """`accelerate launch` with one process dies of SIGTERM and does not pass it on. The kernel does, where it can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
