"""Being told to stop: SIGTERM, SIGUSR1 and Ctrl-C become a request that the run answers when it can save."""

import signal

from pix2seq.training.launcher import set_parent_death_signal


class StopRequest:
    """Catches the signals from its construction on. A second Ctrl-C ends the process at once."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._handle)
        set_parent_death_signal()

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
