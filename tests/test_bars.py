"""Progress where nobody is looking: a few plain lines."""

import io
import sys

import pytest

from sculpt import bars


@pytest.fixture
def clock(monkeypatch):
    """The seconds since the start, which the test decides."""
    now = [0.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    return now


def test_lines_come_ever_less_often_and_the_last_says_how_it_ended(clock, capsys):
    with bars.bar(title="fitting", total=4000) as done:
        for _ in range(4000):
            clock[0] += 1
            done.update()
            done.set_postfix(best="0.5")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "fitting: 5 of 4,000, best=0.5, 5 s" and lines[-1] == "fitting: 4,000 of 4,000, best=0.5, 4000 s"
    assert [int(line.partition(":")[2].split()[0].replace(",", "")) for line in lines[:5]] == [5, 15, 35, 75, 155]
    assert len(lines) == 6 + (4000 - 315) // 300 + 1  # doubling up to five minutes, then every five minutes, and the end


def test_what_is_quick_says_nothing_and_what_is_hidden_neither(clock, capsys):
    assert list(bars.bar(range(3), "quick", 3)) == [0, 1, 2]
    for _ in bars.bar(range(30), "hidden", 30, show=False):
        clock[0] += 10
    assert capsys.readouterr().err == ""


def test_a_loop_that_is_left_says_where(clock, capsys):
    for k in bars.bar(range(30), "drawing", 30):
        clock[0] += 10
        if k == 3:
            break
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["drawing: 1 of 30, 10 s", "drawing: 2 of 30, 20 s", "drawing: 3 of 30, 40 s"]


def test_a_terminal_has_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with bars.bar(title="t", total=3, delay=0) as done:
        done.update()
    assert "\r" in sys.stderr.getvalue() and "1/3" in sys.stderr.getvalue()
