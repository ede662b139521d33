"""Interrupts that Python drops."""

import subprocess
import sys

DROPPED_IN_A_DESTRUCTOR = """
import signal
from dagster import DagsterExecutionInterruptedError
from resources.interrupts import sleep

def interrupt(number, frame):
    raise DagsterExecutionInterruptedError()

class Interrupted:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, interrupt)
sleep(0)
Interrupted()
print("dropped", flush=True)
sleep(0)
print("dropped for good")
"""


def test_an_interrupt_that_a_destructor_dropped_is_raised_by_the_next_sleep() -> None:
    done = subprocess.run([sys.executable, "-c", DROPPED_IN_A_DESTRUCTOR], capture_output=True, text=True, check=False)
    assert done.stdout == "dropped\n"
    assert done.returncode == 1
    assert "DagsterExecutionInterruptedError" in done.stderr


def test_other_errors_of_a_destructor_are_printed() -> None:
    code = "import resources.interrupts\nclass C:\n  def __del__(self): raise ValueError('reason')\nC()\nprint('on')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "on\n"
    assert "ValueError: reason" in done.stderr
