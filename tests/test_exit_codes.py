"""A command ends with one line and a code where its caller is mistaken or stops it; our own faults stay faults."""

import pytest

from safedig.config import UsageError
from safedig.exit_codes import exit_code


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
