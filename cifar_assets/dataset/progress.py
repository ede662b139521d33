"""How long work says how far it is."""

import logging
import time

_INTERVAL_SECONDS = 5.0

_last_seconds = 0.0
_log = logging.getLogger(__name__)


def report(what: str, done: int, total: int | None = None) -> None:
    """Log what is being done, how much is done and of how much: at most a line per interval, and one at the end."""
    global _last_seconds
    now = time.monotonic()
    if done == total or now - _last_seconds >= _INTERVAL_SECONDS:
        _last_seconds = now
        _log.info("%s: %s%s", what, f"{done:,}", f" of {total:,}" if total is not None else "")
