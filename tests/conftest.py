"""What several kinds of tests share."""

import sys

import pytest
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

pytest_plugins = ["tests.fixtures.s3", "tests.fixtures.workspace"]


@pytest.fixture(autouse=True, scope="module")
def _no_instance_of_another_module() -> None:
    """Dagster loads definitions with the instance entered last, and fails where that one is gone."""
    if "dagster" in sys.modules:
        from dagster._core.storage.defs_state.base import _current_storage

        _current_storage.set(None)


settings.register_profile(
    "ci",
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("long", max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("ci")


class FileByFile(LoadFileScheduling):
    """Gives a worker its next file when one test of the file at hand is left.

    By itself xdist does so at two: a file behind one of two slow tests then waits for minutes, with a worker idle.
    """

    def _reschedule(self, node: WorkerController) -> None:
        if not self.workqueue or self._pending_of(self.assigned_work[node]) < 2:
            super()._reschedule(node)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> FileByFile | None:
    return FileByFile(config, log) if config.getvalue("dist") == "loadfile" else None
