"""Progress never touches stdout, yields the very items it is given, and says how far it came when it stops."""

import io
import sys

import pytest

from safedig.config import UsageError
from safedig.progress import exit_code, say, track


class Terminal(io.StringIO):
    def isatty(self):
        return True


def a_terminal(monkeypatch):
    """Put a terminal at stderr; from within the test, since pytest's own capture comes after the fixtures."""
    stream = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_off_a_terminal_there_is_one_line_at_each_end(capsys):
    assert list(track([3, 1, 2], "drawing")) == [3, 1, 2]
    out, err = capsys.readouterr()
    first, last = err.splitlines()
    assert out == "" and first == "drawing (0/3) …" and last.startswith("drawing: 3/3 in ")


def test_a_length_can_be_told_or_stay_unknown(capsys):
    list(track((n for n in range(2)), "told", total=2))
    list(track((n for n in range(2)), "unknown"))
    assert [line.split(" in ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "told (0/2) …", "told: 2/2", "unknown …", "unknown: 2",
    ]  # fmt: skip


def test_it_says_how_far_it_came_when_the_work_fails(capsys):
    def failing():
        yield 1
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        list(track(failing(), "drawing", total=5))
    assert "drawing: 1/5 in" in capsys.readouterr().err


def test_on_a_terminal_there_is_a_bar_and_stdout_stays_empty(monkeypatch, capsys):
    terminal = a_terminal(monkeypatch)
    assert list(track(range(4), "drawing")) == [0, 1, 2, 3]
    assert "drawing" in terminal.getvalue() and "4/4" in terminal.getvalue() and "\x1b[" in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_bars_nest_on_a_terminal(monkeypatch):
    terminal = a_terminal(monkeypatch)
    inner = [list(track(range(2), "inner")) for _ in track(range(3), "outer")]
    assert inner == [[0, 1]] * 3
    assert "inner" in terminal.getvalue() and "outer" in terminal.getvalue()


def test_a_bar_that_is_left_early_lets_go_of_the_terminal(monkeypatch):
    a_terminal(monkeypatch)
    for item in track(range(10), "left"):
        if item == 2:
            break
    assert list(track(range(2), "next")) == [0, 1]


def test_nothing_is_consumed_before_it_is_asked_for(capsys):
    track(iter(()), "never started")
    assert capsys.readouterr().err == ""


def test_a_message_is_one_line_on_stderr(capsys):
    say("loading tiny-flux")
    assert capsys.readouterr() == ("", "loading tiny-flux\n")


@pytest.mark.parametrize(
    ("command", "code", "line"),
    [
        (lambda: "done", 0, ""),
        (lambda: refused("--seed −1\nis none: give another."), 2, "measure.py: --seed −1 is none: give another.\n"),
        (lambda: stopped(), 130, "measure.py: interrupted; the same command goes on.\n"),
    ],
)
def test_a_mistake_and_an_interruption_are_one_line_each_and_a_code(command, code, line, capsys):
    assert exit_code(command, "measure.py", "goes on") == code
    assert capsys.readouterr() == ("", line)


def test_control_a_fault_of_our_own_is_not_dressed_up():
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: 1 // 0, "measure.py")


def refused(message):
    raise UsageError(message)


def stopped():
    raise KeyboardInterrupt
