"""Time from the start of a Dagster step to the first line of its job, beside the same job created through the API.

    KUBECONFIG=... python tests/benchmarks/job_overhead.py [--runs 5]

For each kind of job that the cluster has, steps and bare create calls take turns. The times are those of Dagster's
STEP_START event, of the create call, and of the first log line by the node's clock, so they contain no polling. Run it
on the cluster's machine, or with synchronized clocks. Needs the image of the cluster tests. Aim: at most 2 s more.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import dagster as dg
from kubernetes import client as k8s
from kubernetes import config as k8s_config

from resources.kubernetes.job import JobClient
from tests.cluster.conftest import Minio
from tests.cluster.kinds import KINDS, JobKind, is_installed
from tests.cluster.kubectl import forwarded, kubectl, temporary_namespace, wait_for
from tests.cluster.story import ClusterStory
from tests.fixtures.ports import free_port

COMMAND = ("epochs", "1")


def first_line_at(client: JobClient[Any], namespace: str, name: str) -> float:
    """When a finished job wrote its first line, in seconds since the epoch."""
    (pod,) = client.pods(namespace, name)
    (container,) = [each for each in pod.containers if not each.init]
    log = client.log(namespace, pod.name, container.name)
    assert log
    return datetime.fromisoformat(log.partition(" ")[0]).timestamp()


def seconds_of_a_step(story: ClusterStory) -> float:
    """From STEP_START to the first line."""
    with story.run(story.config(*COMMAND)) as result:
        assert result.success
    (start,) = story.instance.all_logs(result.run_id, of_type=dg.DagsterEventType.STEP_START)
    (name,) = story.names()
    return first_line_at(story.jobs, story.namespace, name) - start.timestamp


def seconds_of_a_bare_job(story: ClusterStory) -> float:
    """From the create call to the first line."""
    name = "bare"
    manifest = story.kind.pipes.build_manifest(story.config(*COMMAND), name=name, namespace=story.namespace)
    started = time.time()
    assert story.jobs.create(manifest)

    def finished() -> bool:
        job = story.jobs.get(story.namespace, name)
        return bool(job and job.finished)

    wait_for("the end of the job", finished)
    return first_line_at(story.jobs, story.namespace, name) - started


@contextmanager
def stories(kinds: list[JobKind]) -> Iterator[list[ClusterStory]]:
    """One story for each kind, in a namespace with an object store."""
    api = k8s_config.new_client_from_config()
    with (
        temporary_namespace("job-overhead") as namespace,
        tempfile.TemporaryDirectory() as home,
        dg.DagsterInstance.local_temp(str(Path(home))) as instance,
    ):
        minio = Minio(namespace, free_port())
        minio.apply()
        minio.wait_until_ready()
        with forwarded(namespace, "svc/minio", minio.port, 9000):
            minio.store().ensure_buckets(["stories"])
            for kind in kinds:
                kind.prepare(namespace)
            yield [
                ClusterStory(kind, namespace, k8s.CoreV1Api(api), kind.client.production(), minio, instance)
                for kind in kinds
            ]


def show(story: ClusterStory, runs: int) -> None:
    """Measure one kind and print a row for each way, and their difference."""
    ways = {"step": seconds_of_a_step, "bare": seconds_of_a_bare_job}
    found: dict[str, list[float]] = {way: [] for way in ways}
    plural = story.kind.client.plural
    for number in range(runs + 1):
        for way, measure in ways.items():
            seconds = measure(story)
            if number:  # the first of each loads images and modules
                found[way].append(seconds)
            kubectl("-n", story.namespace, "delete", plural, "--all", "--wait=true")
            wait_for("removal of pods", lambda: not story.pods())
    for way, values in found.items():
        each = ", ".join(f"{value:.2f}" for value in values)
        print(f"{story.kind.name:<11} {way}: median {statistics.median(values):.2f} s of {each}")
    more = statistics.median(found["step"]) - statistics.median(found["bare"])
    print(f"{story.kind.name:<11} a step takes {more:.2f} s more", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    with stories([kind for kind in KINDS if is_installed(kind.client.group)]) as all_stories:
        for story in all_stories:
            show(story, options.runs)


if __name__ == "__main__":
    main()
