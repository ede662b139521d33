"""How long silence is put up with."""

import logging

import pytest

from resources.kubernetes.diagnosis import Outage
from resources.kubernetes.errors import ApiUnavailableError


def test_silence_is_told_once_and_has_its_limit_from_the_first_call_without_an_answer(
    caplog: pytest.LogCaptureFixture,
):
    seconds = iter([0, 9, 100, 109, 200, 210])
    outage = Outage(lambda: next(seconds), 10, logger=logging.getLogger("test"), meanwhile="work goes on")
    error = ApiUnavailableError("no answer")
    for _ in range(2):
        outage.endure(error)
        outage.endure(error)
        outage.end()
    assert [record.levelname for record in caplog.records].count("WARNING") == 2
    outage.endure(error)
    with pytest.raises(ApiUnavailableError):
        outage.endure(error)
