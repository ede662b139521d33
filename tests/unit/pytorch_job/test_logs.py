"""Every line of every replica is shown once, in order, whatever interrupts the reading."""

import logging
from typing import Any

import pytest

from resources.kubernetes.job import JobClient
from resources.kubernetes.logs import TAIL_LINES, ReplicaLogs
from tests.unit.pytorch_job.fake_cluster import (
    RUNNING,
    FakeCluster,
    api_error,
    container_status,
    pod_body,
    terminated,
)

POD = "job-master-0"


@pytest.fixture
def logs(client: JobClient[Any], cluster: FakeCluster) -> ReplicaLogs:
    cluster.pods["job"] = [pod_body("job", container_statuses=[container_status(RUNNING)])]
    return ReplicaLogs(client, "space", cluster.clock, logging.getLogger("test"))


def poll(logs: ReplicaLogs, client: JobClient[Any]) -> list[str]:
    return [line.text for line in logs.poll(client.pods("space", "job"))]


def stamped(*lines: str, second: int = 0) -> str:
    return "".join(f"2026-01-01T00:00:{second:02d}.{i:09d}Z {line}\n" for i, line in enumerate(lines, start=1))


def test_lines_that_overlap_are_shown_once(logs: ReplicaLogs, client: JobClient[Any], cluster: FakeCluster) -> None:
    cluster.logs[POD] = stamped("a", "b")
    assert poll(logs, client) == ["a", "b"]
    assert poll(logs, client) == []
    cluster.logs[POD] = stamped("a", "b", "c")
    assert poll(logs, client) == ["c"]


def test_lines_of_one_time_stamp_are_all_shown(logs: ReplicaLogs, client: JobClient[Any], cluster: FakeCluster) -> None:
    stamp = "2026-01-01T00:00:00.5Z"
    cluster.logs[POD] = f"{stamp} one\n{stamp} two\n"
    assert poll(logs, client) == ["one", "two"]
    cluster.logs[POD] += f"{stamp} three\n"
    assert poll(logs, client) == ["three"]


def test_unfinished_line_waits_for_its_end(logs: ReplicaLogs, client: JobClient[Any], cluster: FakeCluster) -> None:
    cluster.logs[POD] = stamped("whole") + "2026-01-01T00:00:01.0Z ha"
    assert poll(logs, client) == ["whole"]
    cluster.logs[POD] += "lf\n"
    assert poll(logs, client) == ["half"]


def test_last_line_of_an_ended_container_needs_no_end(
    logs: ReplicaLogs, client: JobClient[Any], cluster: FakeCluster
) -> None:
    cluster.pods["job"] = [pod_body("job", container_statuses=[container_status(terminated(1))])]
    cluster.logs[POD] = "2026-01-01T00:00:01.0Z no newline"
    assert poll(logs, client) == ["no newline"]
    assert poll(logs, client) == []


def test_restarted_container_gives_the_rest_of_the_old_log_first(
    logs: ReplicaLogs, client: JobClient[Any], cluster: FakeCluster
) -> None:
    cluster.logs[POD] = stamped("old 1")
    assert poll(logs, client) == ["old 1"]
    cluster.logs[f"{POD}/previous"] = stamped("old 1", "old 2")
    cluster.logs[POD] = stamped("new 1", second=5)
    cluster.pods["job"] = [pod_body("job", container_statuses=[container_status(RUNNING, restarts=1)])]
    assert poll(logs, client) == ["old 2", "new 1"]
    assert poll(logs, client) == []


def test_bare_sentence_in_place_of_a_log_is_passed_over(
    logs: ReplicaLogs, client: JobClient[Any], cluster: FakeCluster
) -> None:
    cluster.logs[POD] = stamped("a")
    assert poll(logs, client) == ["a"]
    cluster.logs[POD] = "unable to retrieve container logs for containerd://x"
    assert poll(logs, client) == []
    cluster.logs[POD] = stamped("a", "b")
    assert poll(logs, client) == ["b"]


def test_api_outage_loses_no_line(logs: ReplicaLogs, client: JobClient[Any], cluster: FakeCluster) -> None:
    cluster.logs[POD] = stamped("a")
    pods = client.pods("space", "job")

    def fail(call: str) -> None:
        raise api_error(503)

    cluster.failing = fail
    assert list(logs.poll(pods)) == []
    cluster.failing = lambda call: None
    cluster.clock.sleep(5)
    assert poll(logs, client) == ["a"]


def test_log_that_cannot_be_read_does_not_hold_up_the_others(
    logs: ReplicaLogs, client: JobClient[Any], cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each read of a log on a node that is down takes as long as a request may take."""
    names = [f"worker-{n}" for n in range(8)]
    cluster.pods["job"] = [pod_body("job", name, container_statuses=[container_status(RUNNING)]) for name in names]
    cluster.logs |= {f"job-{name}": stamped(name) for name in names}
    read = cluster.read_namespaced_pod_log
    taken: list[str] = []

    def slow(name: str, *args: Any, **kwargs: Any) -> Any:
        if name != "job-worker-7":
            taken.append(name)
            cluster.clock.sleep(10)
            raise api_error(500, "dial tcp 10.0.0.7:10250: i/o timeout")
        return read(name, *args, **kwargs)

    monkeypatch.setattr(cluster, "read_namespaced_pod_log", slow)
    shown: list[str] = []
    begin = cluster.clock()
    while not shown and cluster.clock() - begin < 600:
        before = cluster.clock()
        shown = poll(logs, client)
        assert cluster.clock() - before <= 30
        cluster.clock.sleep(2)
    assert shown == ["worker-7"]
    assert list(logs.drain(client.pods("space", "job"), cluster.clock.sleep)) == []


def test_tails_outlive_the_pods(logs: ReplicaLogs, client: JobClient[Any], cluster: FakeCluster) -> None:
    cluster.logs[POD] = stamped(*(f"line {i}" for i in range(100)))
    poll(logs, client)
    cluster.pods.clear()
    poll(logs, client)
    assert logs.tails["master-0"][-1] == "line 99"
    assert len(logs.tails["master-0"]) == TAIL_LINES
