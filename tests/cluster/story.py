"""A Dagster run against the cluster, in a process that can be signaled and that another one can replace."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.execution.job_execution_result import JobExecutionResult
from dagster._core.storage.tags import RESUME_RETRY_TAG
from kubernetes import client as k8s

from resources.kubernetes.diagnosis import WatchLimits
from resources.kubernetes.job import JobClient
from resources.kubernetes.job_config import JobConfig
from resources.object_store.s3 import S3Store
from tests.cluster.conftest import Minio, pods_of
from tests.cluster.kinds import KINDS, JobKind
from tests.cluster.kubectl import wait_for

LIMITS = WatchLimits(
    poll_interval_seconds=0.5,
    unschedulable_timeout_seconds=10,
    blocked_timeout_seconds=10,
    start_timeout_seconds=300,
    outage_timeout_seconds=300,
)


@dataclass
class ClusterStory:
    """One test on the cluster."""

    kind: JobKind
    namespace: str
    core: Any
    jobs: JobClient[Any]
    minio: Minio
    instance: dg.DagsterInstance
    epochs: list[tuple[int, bool]] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    client: JobClient[Any] | None = None
    limits: WatchLimits = LIMITS

    def config(self, *command: str, **settings: Any) -> JobConfig:
        return self.kind.config(*command, **settings)

    def run(self, config: JobConfig, *, parent: JobExecutionResult | str | None = None) -> JobExecutionResult:
        return run_story(self, config, parent if isinstance(parent, str | None) else parent.run_id)

    def failure(self, config: JobConfig) -> str:
        with self.run(config) as result:
            assert not result.success
            (event,) = [event for event in result.all_node_events if event.is_step_failure]
            data = event.step_failure_data
            return str(data.user_failure_data.description if data.user_failure_data else data.error)

    def names(self) -> list[str]:
        return [job.name for job in self.jobs.find(self.namespace)]

    def pods(self) -> list[Any]:
        return pods_of(self.core, self.namespace, self.kind)

    def is_heard(self) -> bool:
        """Whether the first message of a job has reached Dagster."""
        return self.has_logged("the story begins")

    def has_logged(self, text: str) -> bool:
        """Whether a line of any run's log contains a text."""
        logs = [entry for run in self.instance.get_runs() for entry in self.instance.all_logs(run.run_id)]
        return any(text in entry.user_message for entry in logs)

    def running(self) -> bool:
        return any(pod.status.phase == "Running" for pod in self.pods())

    def when(self, condition: Callable[[], Any], action: Callable[[], None]) -> threading.Thread:
        """Calls something in another thread once a condition holds; the run continues in this one."""

        def wait_and_act() -> None:
            wait_for("the moment to act", condition)
            action()

        thread = threading.Thread(target=wait_and_act, daemon=True)
        thread.start()
        return thread

    def cancel(self) -> None:
        (run,) = self.instance.get_runs(filters=dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED]))
        self.instance.report_run_canceling(run)
        os.kill(os.getpid(), signal.SIGTERM)

    def status(self, result: JobExecutionResult) -> dg.DagsterRunStatus:
        run = self.instance.get_run_by_id(result.run_id)
        assert run
        return run.status

    def in_another_process(self, config: JobConfig, home: Path) -> subprocess.Popen[bytes]:
        """The same run as `run`, as a process that can be killed. Its Dagster instance is that of this story."""
        environment = {
            **os.environ,
            **self.minio.environment(),
            "DAGSTER_HOME": str(home),
            "STORY_KIND": self.kind.name,
            "STORY_NAMESPACE": self.namespace,
            "STORY_CONFIG": config.model_dump_json(),
        }
        log = (home / "worker.log").open("wb")
        command = [sys.executable, "-m", "tests.cluster.story"]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


CURRENT: list[tuple[ClusterStory, JobConfig]] = []


@dg.asset
def trained(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    """Runs the job of the current story."""
    story, config = CURRENT[-1]

    def on_message(payload: Any, replayed: bool) -> None:
        story.epochs.append((payload["epoch"], replayed))

    invocation = story.kind.pipes(
        message_store=story.minio.store().at("stories"),
        client=story.client or story.jobs,
        namespace=story.namespace,
        limits=story.limits,
    ).run(
        context=context,
        config=config,
        name_prefix="story",
        on_message=on_message,
        on_log_line=lambda line: story.lines.append(f"{line.replica}: {line.text}"),
    )
    story.metadata = dict(invocation.metadata)
    return dg.MaterializeResult(metadata={"epochs": len(invocation.get_custom_messages()), **invocation.metadata})


def story_job() -> dg.JobDefinition:
    """The job of all stories."""
    jobs = [dg.define_asset_job("story", executor_def=dg.in_process_executor)]
    return dg.Definitions(assets=[trained], jobs=jobs).resolve_job_def("story")


def run_story(story: ClusterStory, config: JobConfig, parent_run_id: str | None) -> JobExecutionResult:
    """Run the story's job in this process; with a parent, as its retry from failure."""
    CURRENT.append((story, config))
    options, tags = None, {}
    if parent_run_id:
        options = dg.ReexecutionOptions(parent_run_id=parent_run_id)
        tags = {RESUME_RETRY_TAG: "true"}
    return dg.execute_job(
        dg.reconstructable(story_job),
        instance=story.instance,
        raise_on_error=False,
        reexecution_options=options,
        tags=tags,
    )


class _ForwardedMinio(Minio):
    """The store from its environment variables, for a process that did not set it up."""

    def __init__(self, namespace: str):
        super().__init__(namespace, int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2]))

    def store(self) -> S3Store:
        return S3Store.from_environment()


def main() -> None:
    """The run as a separate process: see ClusterStory.in_another_process."""
    namespace = os.environ["STORY_NAMESPACE"]
    (kind,) = [each for each in KINDS if each.name == os.environ["STORY_KIND"]]
    config = type(kind.config()).model_validate_json(os.environ["STORY_CONFIG"])
    with dg.DagsterInstance.get() as instance:
        jobs = kind.client.production()
        story = ClusterStory(kind, namespace, k8s.CoreV1Api(), jobs, _ForwardedMinio(namespace), instance)
        with run_story(story, config, None) as result:
            sys.exit(0 if result.success else 1)


if __name__ == "__main__":
    from tests.cluster import story as imported  # the asset function looks up its story in the importable module

    imported.main()
