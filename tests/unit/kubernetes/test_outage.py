"""How long an API server that does not answer is tolerated."""

import logging

import pytest

from resources.kubernetes.diagnosis import Outage
from resources.kubernetes.errors import ApiUnavailableError


def test_outage_is_logged_once_and_limited_from_its_first_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    seconds = iter([0, 9, 100, 109, 200, 210])
    outage = Outage(lambda: next(seconds), 10, logger=logging.getLogger("test"), meanwhile="work continues")
    error = ApiUnavailableError("no answer")
    for _ in range(2):
        outage.endure(error)
        outage.endure(error)
        outage.end()
    assert [record.levelname for record in caplog.records].count("WARNING") == 2
    outage.endure(error)
    with pytest.raises(ApiUnavailableError):
        outage.endure(error)
