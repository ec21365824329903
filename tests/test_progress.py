"""Progress never touches stdout, yields the very items it is given, and says how far it came when it stops."""

import io
import sys

import pytest

from safedig.progress import say, track


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
