"""Progress bars and lines."""

import io
import math
import sys

from pix2seq import progress as module
from pix2seq.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_quick_loops_print_nothing(capsys):
    assert list(progress(range(5), "work")) == [0, 1, 2, 3, 4]
    assert list(progress(iter("abc"), "work", total=3)) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


def test_long_loops_print_lines_without_a_terminal(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    for _ in progress(range(10), "work"):
        now[0] += 12
    assert capsys.readouterr().err.splitlines() == ["work: 3 of 10", "work: 6 of 10", "work: 9 of 10"]
    for _ in progress(iter(range(4)), "webcam", total=math.inf):
        now[0] += 12
    assert capsys.readouterr().err == "webcam: 3\n"


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(progress(range(3), "work")) == [0, 1, 2]
    assert "work" in terminal.getvalue()
