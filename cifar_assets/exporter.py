"""`python -m cifar_assets.exporter`: Dagster's state as metrics for Prometheus. docs/alerts.md describes them."""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from cifar_assets.assets.keys import INFERENCE_SERVICE, TRAINED_MODEL
from cifar_assets.assets.record import DATA_VERSION_TAG, ENDED, materializations
from resources.dagster_private import AssetCheckStatus, TickStatus

PORT = 9464
CLUSTER_SENSOR = "trainer_collector"
"""Only a cluster's code location defines it. The exporter, which has no settings of a cluster, does not."""
_EVALUATED = {AssetCheckStatus.SUCCEEDED, AssetCheckStatus.FAILED}
_ENDED_TICKS = [TickStatus.SUCCESS, TickStatus.SKIPPED, TickStatus.FAILURE]


class DagsterCollector(Collector):
    """Reads the instance at each scrape, which fails if the instance's storage does not respond.

    Of jobs, checks, sensors and schedules, only those that the repository defines.
    """

    def __init__(self, instance: dg.DagsterInstance, repository: dg.RepositoryDefinition):
        self._instance = instance
        self._repository = repository
        self._trained_at: dict[tuple[str, str], float] = {}

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """All metrics."""
        yield from self._runs()
        yield self._ticks()
        yield from self._checks()
        yield self._heartbeats()
        yield from self._deployed_model()

    def _runs(self) -> Iterator[GaugeMetricFamily]:
        failed = _gauge("dagster_last_run_failed", "1 if the job's last ended run failed, otherwise 0.", "job_name")
        ended = _gauge("dagster_last_run_end_timestamp_seconds", "When the job's last ended run ended.", "job_name")
        for name in self._repository.job_names:
            for record in self._instance.get_run_records(dg.RunsFilter(job_name=name, statuses=[*ENDED]), limit=1):
                failed.add_metric([name], record.dagster_run.status == dg.DagsterRunStatus.FAILURE)
                ended.add_metric([name], record.end_time or record.update_timestamp.timestamp())
        yield failed
        yield ended

    def _ticks(self) -> GaugeMetricFamily:
        own = (*self._repository.sensor_defs, *self._repository.schedule_defs)
        defined = {CLUSTER_SENSOR, *(each.name for each in own)}
        newest: dict[str, tuple[float, bool]] = {}
        for state in self._instance.all_instigator_state():
            if state.is_running and state.name in defined:
                ids = state.instigator_origin_id, state.selector_id
                for tick in self._instance.get_ticks(*ids, limit=1, statuses=_ENDED_TICKS):
                    found = tick.timestamp, tick.status == TickStatus.FAILURE
                    newest[state.name] = max(found, newest.get(state.name, found))  # of several code locations
        failed = _gauge(
            "dagster_last_tick_failed", "1 if the last tick of the sensor or schedule, which is on, failed.", "name"
        )
        for name, (_, is_failure) in newest.items():
            failed.add_metric([name], is_failure)
        return failed

    def _checks(self) -> Iterator[GaugeMetricFamily]:
        labels = "asset", "check"
        passed = _gauge("dagster_check_passed", "1 if the asset check passed when it last ran, otherwise 0.", *labels)
        judged = _gauge("dagster_check_timestamp_seconds", "When the asset check last ran.", *labels)
        history = self._instance.event_log_storage.get_asset_check_execution_history
        for key in sorted(self._repository.asset_graph.asset_check_keys):
            for record in history(key, limit=1, status=_EVALUATED):
                values = [key.asset_key.to_user_string(), key.name]
                passed.add_metric(values, record.status == AssetCheckStatus.SUCCEEDED)
                judged.add_metric(values, record.create_timestamp)
        yield passed
        yield judged

    def _heartbeats(self) -> GaugeMetricFamily:
        beats = _gauge("dagster_daemon_heartbeat_timestamp_seconds", "Last heartbeat of each daemon.", "daemon")
        for name, beat in self._instance.get_daemon_heartbeats().items():
            beats.add_metric([name], beat.timestamp)
        return beats

    def _deployed_model(self) -> Iterator[GaugeMetricFamily]:
        labels = "data_set", "digest"
        model = _gauge("cifar10_deployed_model_info", "The model that inference_service deployed last.", *labels)
        trained = _gauge(
            "cifar10_deployed_model_trained_timestamp_seconds", "When this model was first materialized.", *labels
        )
        for key in sorted(self._repository.asset_graph.get_all_asset_keys()):
            if key.path[-1] != INFERENCE_SERVICE:
                continue
            event = self._instance.get_latest_materialization_event(key)
            tags = event.asset_materialization.tags if event and event.asset_materialization else None
            if event and (digest := (tags or {}).get(DATA_VERSION_TAG)):
                model.add_metric([key.path[0], digest], 1)
                trained.add_metric([key.path[0], digest], self._trained(key.path[0], digest, event.timestamp))
        yield model
        yield trained

    def _trained(self, data_set: str, digest: str, deployed_at: float) -> float:
        if (data_set, digest) not in self._trained_at:  # reads the history of all trainings
            made = materializations(self._instance, dg.AssetKey([data_set, TRAINED_MODEL]), limit=None)
            first = min((m.timestamp for m in made if m.digest == digest), default=deployed_at)
            self._trained_at[data_set, digest] = first
        return self._trained_at[data_set, digest]


def _gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, labels=labels)


def main() -> None:
    """Serve the metrics of the instance in DAGSTER_HOME, or in the current folder, until terminated."""
    parser = argparse.ArgumentParser(prog="python -m cifar_assets.exporter", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=PORT)
    options = parser.parse_args()
    from cifar_assets.definitions import defs  # reads the settings

    registry = CollectorRegistry()
    with dg.DagsterInstance.from_config(os.environ.get("DAGSTER_HOME") or str(Path.cwd())) as instance:
        registry.register(DagsterCollector(instance, defs.get_repository_def()))
        _, thread = start_http_server(options.port, options.host, registry)
        thread.join()


if __name__ == "__main__":
    main()
