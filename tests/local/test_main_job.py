"""The whole pipeline on synthetic images without a cluster, with the commands of a user."""

import dagster as dg
import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from cifar_assets.assets.record import data_version, previous_digests
from cifar_assets.contracts import MODEL_NAME
from cifar_assets.dataset.versions.reader import open_split
from resources.inference_service.client import InferenceClient
from resources.mlflow.resource import CHAMPION_ALIAS, RUN_ID_TAG, LocalMlflow
from resources.object_store.resource import LocalObjectStore
from tests.fixtures.cifar10 import INFERENCE_SERVICE, PROCESSED_DATASET, RAW_DATASET, TRAINED_MODEL
from tests.fixtures.workspace import SMALL_TRAINING, Workspace, steady_requests

pytestmark = pytest.mark.timeout(1800)

ALL = [RAW_DATASET, PROCESSED_DATASET, TRAINED_MODEL, INFERENCE_SERVICE]
BLOCKING = ["objects_intact", "nothing_lost", "splits_disjoint", "accuracy_threshold", "onnx_equals_torch"]


@pytest.fixture(scope="module")
def first_run(workspace: Workspace) -> str:
    """Materializes everything with one command and returns its output."""
    done = workspace.materialize("*", {"trained_model": SMALL_TRAINING})
    assert done.returncode == 0, done.stdout
    return done.stdout


def client(workspace: Workspace) -> InferenceClient:
    return InferenceClient(f"http://127.0.0.1:{workspace.environment['INFERENCE_SERVICE_PORT']}", timeout=300)


def materialization(instance: dg.DagsterInstance, key: dg.AssetKey) -> dg.AssetMaterialization:
    event = instance.get_latest_materialization_event(key)
    assert event is not None
    assert event.asset_materialization is not None
    return event.asset_materialization


def value(instance: dg.DagsterInstance, key: dg.AssetKey, name: str) -> object:
    return materialization(instance, key).metadata[name].value


@pytest.mark.usefixtures("first_run")
class TestOneRun:
    def test_each_asset_names_its_input_version(self, workspace: Workspace) -> None:
        with workspace.instance() as instance:
            raw, processed, model, service = (data_version(materialization(instance, key)) for key in ALL)
            assert value(instance, PROCESSED_DATASET, "raw_digest") == raw
            assert value(instance, TRAINED_MODEL, "dataset_digest") == processed
            assert value(instance, TRAINED_MODEL, "raw_digest") == raw
            assert service == model

    def test_the_service_answers_with_that_model(self, workspace: Workspace) -> None:
        with workspace.instance() as instance:
            model = data_version(materialization(instance, TRAINED_MODEL))
            accuracy = float(str(value(instance, TRAINED_MODEL, "test_accuracy")))
            dataset = str(value(instance, TRAINED_MODEL, "dataset_digest"))
        test = open_split(LocalObjectStore().processed, dataset, "test")
        answers = client(workspace).predict_arrays(test.images)
        assert answers.model_digest == model
        right = float(np.mean(answers.probabilities.argmax(axis=1) == test.labels))
        assert right == pytest.approx(accuracy, abs=0.005)
        assert accuracy > 0.5

    def test_every_check_passed(self, workspace: Workspace) -> None:
        with workspace.instance() as instance:
            run = instance.get_runs(limit=1)[0]
            events = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION)
            evaluations = [event.get_dagster_event().asset_check_evaluation_data for event in events]
        assert set(BLOCKING) <= {evaluation.check_name for evaluation in evaluations}
        assert [evaluation.description for evaluation in evaluations if not evaluation.passed] == []

    def test_epochs_were_observed_while_it_ran(self, workspace: Workspace) -> None:
        with workspace.instance() as instance:
            records = instance.fetch_observations(TRAINED_MODEL, limit=10).records
            trained = instance.get_latest_materialization_event(TRAINED_MODEL)
        assert trained is not None
        epochs = [record.asset_observation.metadata["epoch"].value for record in records if record.asset_observation]
        assert sorted(map(int, map(str, epochs))) == [1, 2, 3, 4]
        assert min(record.timestamp for record in records) < trained.timestamp

    def test_mlflow_has_one_finished_run_and_the_champion(self, workspace: Workspace) -> None:
        mlflow = MlflowClient(LocalMlflow().uri)
        with workspace.instance() as instance:
            model = data_version(materialization(instance, TRAINED_MODEL))
            dagster_run = instance.get_runs(limit=1)[0].run_id
        experiment = mlflow.get_experiment_by_name("cifar10")
        assert experiment is not None
        runs = mlflow.search_runs([experiment.experiment_id])
        assert [run.info.status for run in runs] == ["FINISHED"]
        assert runs[0].data.tags[RUN_ID_TAG] == dagster_run
        champion = mlflow.get_model_version_by_alias(MODEL_NAME, CHAMPION_ALIAS)
        assert champion.tags["model_digest"] == model
        assert champion.tags["gate"] == "passed"


@pytest.mark.usefixtures("first_run")
class TestGate:
    def test_materializing_the_service_alone_is_refused_below_the_threshold(self, workspace: Workspace) -> None:
        served = client(workspace).served_model()
        with steady_requests(client(workspace)) as answers:
            done = workspace.materialize("cifar10/inference_service", ACCURACY_THRESHOLD="0.999")
        assert done.returncode != 0
        assert "Not deployed: Test accuracy 0." in done.stdout
        assert "the threshold 0.9990" in done.stdout
        assert answers.failures == []
        assert answers.digests == {served.model_digest}
        assert client(workspace).served_model() == served
        version = MlflowClient(LocalMlflow().uri).search_model_versions(f"name = '{MODEL_NAME}'")[0]
        assert version.tags["gate"] == "refused"

    def test_the_same_run_stops_at_the_blocking_check(self, workspace: Workspace) -> None:
        served = client(workspace).served_model()
        with workspace.instance() as instance:
            before = len(previous_digests(instance, INFERENCE_SERVICE))
        with steady_requests(client(workspace)) as answers:
            done = workspace.materialize(
                "cifar10/trained_model,cifar10/inference_service",
                {"trained_model": {**SMALL_TRAINING, "seed": 1}},
                ACCURACY_THRESHOLD="0.999",
            )
        assert done.returncode != 0
        assert answers.failures == []
        assert answers.num_answered > 1
        assert answers.digests == {served.model_digest}
        assert client(workspace).served_model() == served
        with workspace.instance() as instance:
            assert len(previous_digests(instance, INFERENCE_SERVICE)) == before
            newest = data_version(materialization(instance, TRAINED_MODEL))
        assert newest != served.model_digest

    @pytest.mark.parametrize(("threshold", "num_requested"), [("0.999", 0), ("0.0", 1)])
    def test_automation_deploys_a_new_model_only_if_its_check_passed(
        self, workspace: Workspace, threshold: str, num_requested: int
    ) -> None:
        from cifar_assets.definitions import defs

        with workspace.instance() as instance:
            before = dg.evaluate_automation_conditions(defs, instance)
            assert before.get_num_requested(INFERENCE_SERVICE) == 0
            done = workspace.materialize(
                "cifar10/trained_model",
                {"trained_model": {**SMALL_TRAINING, "seed": 1, "reuse": True}},
                ACCURACY_THRESHOLD=threshold,
            )
            assert (done.returncode == 0) == (num_requested == 1), done.stdout
            after = dg.evaluate_automation_conditions(defs, instance, cursor=before.cursor)
            assert after.get_num_requested(INFERENCE_SERVICE) == num_requested

    @pytest.mark.parametrize("threshold", ["80", "-0.1", "0,8"])
    def test_invalid_threshold_is_rejected_before_the_run(self, workspace: Workspace, threshold: str) -> None:
        with workspace.instance() as instance:
            runs = instance.get_runs_count()
        done = workspace.materialize("*", ACCURACY_THRESHOLD=threshold)
        assert done.returncode != 0
        assert "ACCURACY_THRESHOLD: " in done.stdout
        with workspace.instance() as instance:
            assert instance.get_runs_count() == runs

    def test_accepted_model_replaces_the_old_one_and_rollback_restores_it(self, workspace: Workspace) -> None:
        old = client(workspace).served_model().model_digest
        with steady_requests(client(workspace)) as answers:
            assert workspace.materialize("cifar10/inference_service").returncode == 0
        new = client(workspace).served_model().model_digest
        assert new != old
        assert answers.failures == []
        assert answers.digests == {old, new}
        done = workspace.materialize("cifar10/inference_service", {"inference_service": {"rollback": True}})
        assert done.returncode == 0, done.stdout
        assert client(workspace).served_model().model_digest == old
        pinned = {"inference_service": {"model_digest": new}}
        assert workspace.materialize("cifar10/inference_service", pinned).returncode == 0
        assert client(workspace).served_model().model_digest == new

    def test_a_model_that_is_not_stored_is_named(self, workspace: Workspace) -> None:
        done = workspace.materialize("cifar10/inference_service", {"inference_service": {"model_digest": "f" * 64}})
        assert done.returncode != 0
        assert "f" * 64 in done.stdout
