"""The collector deletes only abandoned jobs and old messages."""

import logging
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Never

import dagster as dg
import pytest

from resources.errors import StoreError
from resources.kubernetes.collector import CollectorTarget, build_job_collector, collect_messages, is_abandoned
from resources.kubernetes.errors import KubernetesError
from resources.kubernetes.job import JobClient
from resources.kubernetes.naming import MANAGED_BY_LABEL, RUN_ID_LABEL
from resources.object_store import FolderStore
from tests.unit.pytorch_job.fake_cluster import FakeCluster, api_error

FAILURE, CANCELED, SUCCESS = (
    dg.DagsterRunStatus.FAILURE,
    dg.DagsterRunStatus.CANCELED,
    dg.DagsterRunStatus.SUCCESS,
)


def create(client: JobClient[Any], name: str, run_id: str, *, managed: bool = True, launch: str = "launch") -> None:
    labels = {RUN_ID_LABEL: run_id} | ({MANAGED_BY_LABEL: client.resource.managed_by()} if managed else {})
    metadata = {
        "name": name,
        "namespace": "space",
        "labels": labels,
        "annotations": {client.resource.launch_annotation(): launch},
    }
    client.create({"metadata": metadata})


@pytest.mark.parametrize(
    ("status", "seconds", "abandoned"),
    [
        (CANCELED, 61, True),
        (CANCELED, 59, False),
        (SUCCESS, 61, True),
        (FAILURE, 899, False),
        (FAILURE, 901, True),
    ],
)
def test_job_is_abandoned_when_its_run_ended_long_enough_ago(
    status: dg.DagsterRunStatus, seconds: float, abandoned: bool
) -> None:
    assert is_abandoned(status, seconds, failure_grace_seconds=900) is abandoned


def test_old_messages_go_unless_their_job_exists_or_one_of_them_is_new(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    week_ago = datetime.now(UTC) - timedelta(days=7)
    for key in ("messages/old/w/0.jsonl", "read/old/run.json", "messages/live/w/0.jsonl", "messages/new/w/0.jsonl"):
        store.write(key, b"x")
        age = 0 if "new" in key else 8 * 86400
        stamp = datetime.now(UTC).timestamp() - age
        os.utime(tmp_path / key, (stamp, stamp))
    store.write("read/new/run.json", b"x")
    assert collect_messages(store, ["live"], older_than=week_ago) == 2
    assert {info.key for info in store.list()} == {
        "messages/live/w/0.jsonl",
        "messages/new/w/0.jsonl",
        "read/new/run.json",
    }


def test_sensor_collects_by_the_instances_runs(
    client: JobClient[Any], cluster: FakeCluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    sensor = build_job_collector(
        "collector",
        lambda context: CollectorTarget(client, "space", FolderStore(tmp_path)),
        failure_grace_seconds=0,
    )

    @dg.job
    def training() -> None: ...

    with dg.DagsterInstance.ephemeral() as instance:
        failed = instance.create_run_for_job(training, status=dg.DagsterRunStatus.STARTED)
        going = instance.create_run_for_job(training, status=dg.DagsterRunStatus.STARTED)
        instance.report_run_failed(failed)
        create(client, "leftover", failed.run_id)
        create(client, "wanted", going.run_id)
        create(client, "of-another-instance", "unknown")
        create(client, "finished", failed.run_id)
        cluster.condition("finished", "Succeeded")
        create(client, "foreign", failed.run_id, managed=False)
        result: Any = sensor(dg.build_sensor_context(instance=instance))
    assert set(cluster.jobs) == {"wanted", "of-another-instance", "finished", "foreign"}
    assert "leftover" in result.skip_message


def test_job_that_cannot_be_deleted_is_named_and_does_not_block_others(
    client: JobClient[Any], cluster: FakeCluster, tmp_path: Path
) -> None:
    class Away(FolderStore):
        def list(self, prefix: str = "") -> Never:
            raise StoreError("the store is away", transient=True)

    refused: list[str] = []

    def refuse_once(call: str) -> None:
        if call == "delete" and not refused:
            refused.append(call)
            raise api_error(500, "etcdserver: request timed out")

    cluster.failing = refuse_once
    sensor = build_job_collector(
        "collector", lambda context: CollectorTarget(client, "space", Away(tmp_path)), failure_grace_seconds=0
    )

    @dg.job
    def training() -> None: ...

    with dg.DagsterInstance.ephemeral() as instance:
        failed = instance.create_run_for_job(training, status=dg.DagsterRunStatus.STARTED)
        instance.report_run_failed(failed)
        for name in ("first", "second", "third"):
            create(client, name, failed.run_id)
        with pytest.raises(KubernetesError) as caught:
            sensor(dg.build_sensor_context(instance=instance))
    assert list(cluster.jobs) == ["first"]
    for text in ("deleted: second, third", f"Could not delete {client.resource.kind} space/first", "the store is away"):
        assert text in str(caught.value)
