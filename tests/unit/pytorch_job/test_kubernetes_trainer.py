"""The trainer over PyTorchJobs does what the local one does: same spec, same messages, same result."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from cifar_assets.deployment import trainer_for
from cifar_assets.training.recipes import RECIPES
from cifar_assets.training.spec import JobSpec
from resources.errors import ConfigError, TrainingError
from resources.kubernetes.errors import ApiUnavailableError, SettingsError
from resources.kubernetes.job import JobClient
from resources.kubernetes.pipes import PipesJobClient
from resources.mlflow.target import MlflowTarget
from resources.object_store.resource import LocalObjectStore
from resources.pipes_store import STORE_URI_PARAM
from resources.trainer.contract import EXIT_RESUME
from resources.trainer.interface import TrainingScale
from resources.trainer.kubernetes import (
    KubernetesTrainer,
    build_trainer_collector,
)
from tests.fixtures.settings import settings_of
from tests.unit.pytorch_job.fake_cluster import KINDS, PYTORCH_JOB, TRAIN_JOB, FakeCluster, Kind, runs_and_succeeds
from tests.unit.pytorch_job.test_messages import process
from tests.unit.pytorch_job.test_pipes import failing

DIGEST = "a" * 64
SPEC = JobSpec(
    dataset_uri=f"s3://processed-data/{DIGEST}/",
    dataset_digest=DIGEST,
    recipe=next(iter(RECIPES.values())),
    output_uri="s3://models/",
    mlflow=MlflowTarget(tracking_uri="http://localhost:5000", tags={"dagster_run_id": "run"}),
)
STORE = {
    "AWS_ENDPOINT_URL": "http://localhost:9000",
    "AWS_ACCESS_KEY_ID": "the-access-key",
    "AWS_SECRET_ACCESS_KEY": "the-secret-key",
}
OPENS_STORE: dict[str, dict[str, Any]] = {
    "pytorch_job": {"env_secrets": ["object-store"]},
    "train_job": {"runtime": "of-the-namespace", "runtime_kind": "TrainingRuntime"},
}
RESULT = {"type": "result", "model_digest": DIGEST, "model_uri": f"s3://models/{DIGEST}/", "mlflow_run_id": "m"}


def trainer_in(folder: Path, *kinds: Kind, **settings: Any) -> KubernetesTrainer:
    """A trainer with settings for these kinds, whose pods get the store's credentials."""
    jobs = {kind.key: kind.config(image="trainer:1", **OPENS_STORE[kind.key]) for kind in kinds}
    return KubernetesTrainer(object_store=LocalObjectStore(path=str(folder)), namespace="space", **jobs, **settings)


@pytest.fixture
def trainer(tmp_path: Path, cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> KubernetesTrainer:
    def connected(trainer: KubernetesTrainer, kind: str) -> PipesJobClient[Any]:
        assert kind == cluster.kind.key
        return cluster.kind.pipes(
            message_store=trainer.object_store.models.at("pipes/"),
            client=cluster.kind.client(cluster, cluster),
            namespace="space",
            limits=trainer.limits(),
            clock=cluster.clock,
            sleeper=cluster.clock.sleep,
        )

    monkeypatch.setattr(KubernetesTrainer, "pipes_client", connected)
    return trainer_in(tmp_path, cluster.kind)


@pytest.fixture
def train(trainer: KubernetesTrainer) -> Iterator[Callable[..., dg.ExecuteInProcessResult]]:
    with dg.DagsterInstance.ephemeral() as instance:

        def run(**settings: Any) -> dg.ExecuteInProcessResult:
            @dg.asset(name="trained", **settings)
            def trained(context: dg.AssetExecutionContext, trainer: KubernetesTrainer) -> dg.MaterializeResult:
                result = trainer.train(context, SPEC, TrainingScale(), STORE)
                return dg.MaterializeResult(metadata={"model_digest": result.model_digest})

            assets: list[Any] = [trained]
            return dg.materialize(assets, resources={"trainer": trainer}, instance=instance, raise_on_error=False)

        yield run


def say(cluster: FakeCluster, folder: Path, *messages: dict[str, Any]) -> None:
    (job,) = cluster.jobs.values()
    launch_id = job["metadata"]["annotations"][cluster.kind.job.launch_annotation()]
    with process({STORE_URI_PARAM: (folder / "models/pipes/messages" / launch_id).as_uri()}) as pipes:
        for message in messages:
            pipes.report_custom_message(message)


def test_epochs_become_observations_and_the_result_is_returned(
    train: Callable[..., dg.ExecuteInProcessResult],
    cluster: FakeCluster,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    cluster.on_created = runs_and_succeeds()
    epoch = {"type": "epoch", "epoch": 1, "epochs": 1, "train_loss": 0.5}
    cluster.clock.after(5, lambda: say(cluster, tmp_path, epoch, RESULT))
    result = train()
    assert result.success
    (materialization,) = result.asset_materializations_for_node("trained")
    assert materialization.metadata["model_digest"].value == DIGEST
    assert f"Training as a {cluster.kind.job.kind}." in capfd.readouterr().err
    observations = [e for e in result.all_events if e.is_asset_observation]
    assert [o.asset_observation_data.asset_observation.metadata["train_loss"].value for o in observations] == [0.5]


def test_time_in_a_queue_is_metadata_of_the_model(
    train: Callable[..., dg.ExecuteInProcessResult], cluster: FakeCluster, tmp_path: Path, kind: Kind
) -> None:
    def act(cluster: FakeCluster, name: str) -> None:
        cluster.condition(name, "Suspended")
        cluster.clock.after(100, lambda: runs_and_succeeds()(cluster, name))

    cluster.on_created = act
    cluster.clock.after(105, lambda: say(cluster, tmp_path, RESULT))
    (materialization,) = train().asset_materializations_for_node("trained")
    assert {"model_digest", f"{kind.key}_queue_seconds"} <= set(materialization.metadata)


def test_collector_uses_the_trainer_that_dagster_resolves(
    trainer: KubernetesTrainer, client: JobClient[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KubernetesTrainer, "connect", lambda trainer, kind: client)
    with dg.build_sensor_context(resources={"trainer": trainer}) as context:
        result = build_trainer_collector().evaluate_tick(context)
    assert result.skip_message
    assert f"Leftover {client.resource.kind}s deleted: none" in result.skip_message


def test_job_without_a_result_is_an_error(
    train: Callable[..., dg.ExecuteInProcessResult], cluster: FakeCluster
) -> None:
    cluster.on_created = runs_and_succeeds()
    result = train()
    (failure,) = [e for e in result.all_node_events if e.is_step_failure]
    assert TrainingError.__name__ in str(failure.step_failure_data.error)


@pytest.mark.parametrize(("exit_code", "allowed"), [(1, False), (2, False), (EXIT_RESUME, True), (137, True)])
def test_retry_is_allowed_only_where_the_training_was_ended_or_asks_for_it(
    train: Callable[..., dg.ExecuteInProcessResult], cluster: FakeCluster, exit_code: int, allowed: bool
) -> None:
    cluster.on_created = failing(exit_code)
    result = train(retry_policy=dg.RetryPolicy(max_retries=1))
    assert cluster.num_created == (2 if allowed else 1)
    (failure,) = [e for e in result.all_node_events if e.is_step_failure]
    data = failure.step_failure_data.user_failure_data
    assert data
    assert data.metadata["exit_code"].value == exit_code
    assert "RuntimeError: broken" in str(data.description)
    assert ("or its process requests a restart" in str(data.description)) == allowed


def test_cluster_that_is_not_configured_is_a_failure_without_a_retry(tmp_path: Path, kind: Kind) -> None:
    @dg.asset(retry_policy=dg.RetryPolicy(max_retries=3))
    def trained(context: dg.AssetExecutionContext, trainer: KubernetesTrainer) -> None:
        trainer.train(context, SPEC, TrainingScale(), STORE)

    trainer = trainer_in(tmp_path, kind, kubeconfig_file=str(tmp_path / "missing"))
    result = dg.materialize([trained], resources={"trainer": trainer}, raise_on_error=False)
    assert not [event for event in result.all_node_events if event.event_type == dg.DagsterEventType.STEP_UP_FOR_RETRY]
    (failure,) = [event for event in result.all_node_events if event.is_step_failure]
    data = failure.step_failure_data.user_failure_data
    assert data
    assert "Set KUBECONFIG" in str(data.description)


def test_a_cancelled_training_is_removed_and_not_retried(trainer: KubernetesTrainer, cluster: FakeCluster) -> None:
    cluster.on_created = runs_and_succeeds(seconds=3600)
    seen: list[type[BaseException]] = []
    with dg.DagsterInstance.ephemeral() as instance:

        def cancel() -> None:
            (run,) = instance.get_runs()
            instance.report_run_canceling(run)
            os.kill(os.getpid(), signal.SIGTERM)

        @dg.asset(retry_policy=dg.RetryPolicy(max_retries=2))
        def trained(context: dg.AssetExecutionContext, trainer: KubernetesTrainer) -> None:
            try:
                trainer.train(context, SPEC, TrainingScale(), STORE)
            except BaseException as error:
                seen.append(type(error))
                raise

        cluster.clock.after(20, cancel)
        result = dg.materialize([trained], resources={"trainer": trainer}, instance=instance, raise_on_error=False)
        run = instance.get_run_by_id(result.run_id)
        assert run
        assert run.status == dg.DagsterRunStatus.CANCELED
    assert seen == [dg.Failure], "Dagster's retry starts nothing"
    assert (cluster.num_created, cluster.jobs) == (1, {})


def test_credentials_are_never_in_the_manifest(
    train: Callable[..., dg.ExecuteInProcessResult], cluster: FakeCluster
) -> None:
    cluster.on_created = runs_and_succeeds()
    train()
    text = json.dumps(cluster.jobs)
    assert "the-secret-key" not in text
    assert "the-access-key" not in text
    assert "http://localhost:9000" in text
    if cluster.kind is PYTORCH_JOB:  # the others' Secret is in their TrainingRuntime
        assert '{"secretRef": {"name": "object-store"}}' in text


def test_job_without_a_secret_for_the_store_is_refused(tmp_path: Path, kind: Kind) -> None:
    jobs: dict[str, Any] = {kind.key: kind.config(image="x")}
    trainer = KubernetesTrainer(object_store=LocalObjectStore(path=str(tmp_path)), namespace="space", **jobs)
    with pytest.raises(ConfigError, match=r"env_secrets.*TrainingRuntime"):
        trainer.job_config(kind.key, SPEC, TrainingScale(), STORE)
    assert trainer.job_config(kind.key, SPEC, TrainingScale(), {}).env["CIFAR_JOB_SPEC"] == SPEC.model_dump_json()


def test_scale_of_the_run_reaches_the_job(trainer: KubernetesTrainer, kind: Kind) -> None:
    scale = TrainingScale(replicas=3, nproc_per_node=2, cpu="4", memory="9Gi", gpu=2)
    config = trainer.job_config(kind.key, SPEC, scale, STORE)
    assert (config.replicas, config.nproc_per_node, config.cpu, config.memory, config.gpu) == (3, 2, "4", "9Gi", 2)
    assert config.command == ["python", "-m", "cifar_assets.training.launch"]
    assert trainer.job_config(kind.key, SPEC, TrainingScale(), STORE).command == []


def test_fields_omitted_from_the_scale_keep_the_value_of_the_trainer(tmp_path: Path, kind: Kind) -> None:
    environment = {"TRAINER_IMAGE": "x", "TRAINER_JOB": '{"gpu": 1, "replicas": 2, "nproc_per_node": 2, "cpu": "4"}'}
    trainer = trainer_for(settings_of(environment), LocalObjectStore(path=str(tmp_path)))
    config = trainer.job_config(kind.key, SPEC, TrainingScale(replicas=3, gpu=0), STORE)
    assert (config.gpu, config.replicas, config.nproc_per_node, config.cpu) == (0, 3, 2, "4")
    assert config.command == ["python", "-m", "cifar_assets.training.launch"]
    assert trainer.job_config(kind.key, SPEC, TrainingScale(), STORE).gpu == 1


def test_torchrun_starts_single_processes_if_the_operator_sets_no_rank(trainer: KubernetesTrainer, kind: Kind) -> None:
    command = trainer.job_config(kind.key, SPEC, TrainingScale(replicas=2), STORE).command
    assert command == ([] if kind is PYTORCH_JOB else ["python", "-m", "cifar_assets.training.launch"])


@pytest.mark.parametrize(
    ("installed", "used"), [(KINDS, PYTORCH_JOB), ((PYTORCH_JOB,), PYTORCH_JOB), ((TRAIN_JOB,), TRAIN_JOB)]
)
def test_kind_is_the_first_that_the_cluster_has(
    tmp_path: Path, installed: tuple[Kind, ...], used: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = FakeCluster(installed=installed)
    clients = {kind.key: kind.client(cluster, cluster) for kind in KINDS}
    monkeypatch.setattr(KubernetesTrainer, "connect", lambda trainer, kind: clients[kind])
    trainer = trainer_in(tmp_path, *KINDS)
    assert trainer.kind() == used.key
    assert trainer.collector_target().client is clients[used.key]


def test_configured_kind_is_used_without_discovery(tmp_path: Path, kind: Kind) -> None:
    assert trainer_in(tmp_path, kind).kind() == kind.key


def test_cluster_without_any_kind_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(installed=())
    monkeypatch.setattr(
        KubernetesTrainer, "connect", lambda trainer, kind: KINDS[kind == "train_job"].client(cluster, cluster)
    )
    with pytest.raises(SettingsError, match="install the Kubeflow training operator or Kubeflow Trainer"):
        trainer_in(tmp_path, *KINDS).kind()


def test_discovery_tolerates_an_api_outage(
    train: Callable[..., dg.ExecuteInProcessResult],
    trainer: KubernetesTrainer,
    cluster: FakeCluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = iter([503, 503])

    def kind(trainer: KubernetesTrainer) -> str:
        for status in answers:
            raise ApiUnavailableError(f"HTTP {status}")
        return cluster.kind.key

    waited: list[float] = []
    monkeypatch.setattr(KubernetesTrainer, "kind", kind)
    monkeypatch.setattr("resources.trainer.kubernetes.sleep", waited.append)
    cluster.on_created = runs_and_succeeds()
    cluster.clock.after(5, lambda: say(cluster, tmp_path, RESULT))
    assert train().success
    assert len(waited) == 2


def test_invalid_scale_is_refused_naming_the_field(trainer: KubernetesTrainer, kind: Kind) -> None:
    with pytest.raises(ConfigError, match="memory"):
        trainer.job_config(kind.key, SPEC, TrainingScale(memory="4GB"), STORE)


def test_pods_get_their_own_addresses_of_the_platform(tmp_path: Path, kind: Kind) -> None:
    environment = {
        "TRAINER_IMAGE": "trainer:2",
        "TRAINER_JOB": '{"cpu": "2"}',
        "TRAINER_KIND": kind.key.replace("_", ""),
        "TRAINER_STORE_ENDPOINT_URL": "http://minio:9000",
        "TRAINER_MLFLOW_TRACKING_URI": "http://mlflow:5000",
    }
    trainer = trainer_for(settings_of(environment), LocalObjectStore(path=str(tmp_path)))
    config = trainer.job_config(kind.key, SPEC, TrainingScale(), STORE)
    assert (config.image, config.cpu) == ("trainer:2", "2")
    assert config.env["AWS_ENDPOINT_URL"] == "http://minio:9000"
    spec = JobSpec.model_validate_json(config.env["CIFAR_JOB_SPEC"])
    assert spec.mlflow
    assert spec.mlflow.tracking_uri == "http://mlflow:5000"
    assert spec.identity == SPEC.identity


def test_fields_of_one_kind_select_that_kind(tmp_path: Path) -> None:
    def kinds(**environment: str) -> list[str]:
        trainer = trainer_for(settings_of({"TRAINER_IMAGE": "x", **environment}), LocalObjectStore(path=str(tmp_path)))
        return [kind.key for kind in KINDS if getattr(trainer, kind.key)]

    assert kinds() == ["pytorch_job", "train_job"]
    assert kinds(TRAINER_KIND="trainjob") == ["train_job"]
    assert kinds(TRAINER_JOB='{"run_policy": {"backoff_limit": 1}}') == ["pytorch_job"]
    assert kinds(TRAINER_JOB='{"runtime": "mine"}') == ["train_job"]
    with pytest.raises(ConfigError, match=r"TRAINER_JOB.*TrainJobConfig.*run_policy"):
        kinds(TRAINER_KIND="trainjob", TRAINER_JOB='{"run_policy": {}}')


def test_wrong_field_of_the_job_is_refused_by_name(tmp_path: Path) -> None:
    settings = settings_of({"TRAINER_IMAGE": "x", "TRAINER_JOB": '{"cpuu": "1"}'})
    with pytest.raises(ConfigError, match=r"TRAINER_JOB.*cpuu"):
        trainer_for(settings, LocalObjectStore(path=str(tmp_path)))
