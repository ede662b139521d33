"""How long work tells how far it is."""

import logging
import time
from collections.abc import Callable

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, how much is done and how much there is (None where that is unknown)."""

_INTERVAL_SECONDS = 5.0

logger = logging.getLogger(__name__)


def quiet(what: str, done: int, total: int | None) -> None:
    """Reports nothing."""


def logged() -> Progress:
    """A progress callback that logs a line per interval and one at the end of each piece of work."""
    last: dict[str, float] = {}

    def report(what: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        finished = total is not None and done >= total
        if not finished and now - last.setdefault(what, now) < _INTERVAL_SECONDS:
            return
        last[what] = now
        logger.info("%s: %s%s", what, f"{done:,}", f" of {total:,}" if total is not None else "")

    return report
