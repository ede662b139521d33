"""Jobs in a queue of Kueue on a real cluster."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from resources.kubernetes.job import JobClient
from tests.cluster.conftest import Minio
from tests.cluster.kinds import JobKind
from tests.cluster.kubectl import wait_for
from tests.cluster.queue import QUEUE, other_work, queue_with
from tests.cluster.story import ClusterStory

SUSPENDED_LINE = f"waits in queue {QUEUE}"


@pytest.fixture(scope="module")
def queue(namespace: str) -> Iterator[str]:
    with queue_with(namespace, cpu="100m") as name:
        yield name


@pytest.fixture
def story(
    kind: JobKind,
    queue: str,
    namespace: str,
    core: Any,
    jobs: JobClient[Any],
    minio: Minio,
    tmp_path: Path,
    no_jobs_left: None,
) -> Iterator[ClusterStory]:
    (tmp_path / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        yield ClusterStory(kind, namespace, core, jobs, minio, instance)


def test_queued_job_starts_when_the_quota_allows_and_reports_its_wait(story: ClusterStory) -> None:
    with ExitStack() as other:
        other.enter_context(other_work(story.namespace, "80m"))
        thread = story.when(lambda: story.has_logged(SUSPENDED_LINE), other.close)
        with story.run(story.config("epochs", "2", queue=QUEUE)) as result:
            thread.join(300)
            assert result.success
    assert float(story.metadata[f"{story.kind.key}_queue_seconds"].value) > 0
    assert "insufficient unused quota for cpu" in story.metadata[f"{story.kind.key}_queue_reason"].value


def test_cancel_while_queued(story: ClusterStory) -> None:
    with other_work(story.namespace, "80m"):
        story.when(lambda: story.has_logged(SUSPENDED_LINE), story.cancel)
        with story.run(story.config("epochs", "2", queue=QUEUE)) as result:
            assert story.status(result) == dg.DagsterRunStatus.CANCELED
        wait_for("removal", lambda: not story.names() and not story.pods(), 60)


def test_preempted_job_continues_when_the_quota_allows(story: ClusterStory) -> None:
    def preempt() -> None:
        with other_work(story.namespace, "80m", urgent=True):
            wait_for("the end of the job's pods", lambda: not story.pods())

    thread = story.when(lambda: len(story.epochs) >= 3, preempt)
    with story.run(story.config("epochs", "15", queue=QUEUE)) as result:
        thread.join(300)
        assert result.success
    assert len(story.names()) == 1
    assert [epoch for epoch, _ in story.epochs][-15:] == list(range(15))
    assert len(story.epochs) > 15, "it was not stopped"
    assert float(story.metadata[f"{story.kind.key}_queue_seconds"].value) > 0
