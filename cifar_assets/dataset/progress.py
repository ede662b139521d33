"""Progress logging for long-running work."""

import logging
import time

_INTERVAL_SECONDS = 5.0

_last_seconds = 0.0
_log = logging.getLogger(__name__)


def report(what: str, done: int, total: int | None = None) -> None:
    """Log the activity with the amount done and the total: at most one line per interval, and one at the end."""
    global _last_seconds
    now = time.monotonic()
    if done == total or now - _last_seconds >= _INTERVAL_SECONDS:
        _last_seconds = now
        _log.info("%s: %s%s", what, f"{done:,}", f" of {total:,}" if total is not None else "")
