"""Signals that ask a run to stop."""

import signal

from pix2seq.training.distributed import set_parent_death_signal


class StopRequest:
    """Records SIGTERM, SIGUSR1 and Ctrl-C, so that a run can save a checkpoint before it stops.

    True after the first signal. A second Ctrl-C raises KeyboardInterrupt.
    """

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._handle)
        set_parent_death_signal()

    def __bool__(self) -> bool:
        return self.signal != 0

    @property
    def name(self) -> str:
        """Name of the signal, for messages."""
        return signal.Signals(self.signal).name if self else "another process received a stop signal"

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, as in a shell, else 75 (EX_TEMPFAIL)."""
        return 130 if self.signal == signal.SIGINT else 75

    def _handle(self, number, frame):
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
