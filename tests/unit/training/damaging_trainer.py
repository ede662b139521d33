"""A trainer of three epochs that writes damaged messages too: `python -m tests.unit.training.damaging_trainer`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from dagster_pipes import open_dagster_pipes

from resources.pipes_store import PipesStoreMessageWriter

WITHOUT_RESULT = "TRAINER_WITHOUT_RESULT"
"""Environment variable: it reports no model."""
_INVALID: tuple[Any, ...] = (
    {"method": "log", "params": 5},
    {"method": "log", "params": {"message": "text", "level": "unknown"}},
    {"method": "unknown", "params": {}},
    {"method": "report_asset_check", "params": {"asset_key": 1}},
    {"method": "report_custom_message", "params": {"epoch": 1}},
)


class DamagedMessages(PipesStoreMessageWriter):
    """Writes a line that is cut short and messages with invalid content before each message."""

    @contextmanager
    def open(self, params: Any) -> Iterator[Any]:
        with super().open(params) as channel:
            yield SimpleNamespace(write_message=lambda message: self._write(channel, message))

    @staticmethod
    def _write(channel: Any, message: Any) -> None:
        channel._lines.put('{"__dagster_pipes_version": "0.\n')
        for each in (*_INVALID, message):
            channel.write_message(each)


if __name__ == "__main__":
    with open_dagster_pipes(message_writer=DamagedMessages()) as pipes:
        for epoch in range(1, 4):
            pipes.report_custom_message({"type": "epoch", "epoch": epoch, "epochs": 3})
        if not os.environ.get(WITHOUT_RESULT):
            pipes.report_custom_message({"type": "result", "model_digest": "0" * 64, "model_uri": "file:///unused/"})
