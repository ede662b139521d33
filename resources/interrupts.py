"""Waiting that notices an interrupt even if Python dropped it.

The exception raised by a signal handler is printed and ignored if it occurs in a destructor or a weakref callback
(docs.python.org: sys.unraisablehook). Dagster sends only one signal to cancel a step, so the step would continue.
"""

import sys
import time

_dropped: list[BaseException] = []


def _keep_interrupt(unraisable: "sys.UnraisableHookArgs") -> None:
    if unraisable.exc_value and not isinstance(unraisable.exc_value, (Exception, GeneratorExit)):
        _dropped.append(unraisable.exc_value)
    else:
        sys.__unraisablehook__(unraisable)


sys.unraisablehook = _keep_interrupt


def sleep(seconds: float) -> None:
    """Like time.sleep, but first raises an interrupt that was dropped since the previous call."""
    if _dropped:
        raise _dropped.pop()
    time.sleep(seconds)
