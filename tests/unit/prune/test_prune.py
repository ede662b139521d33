"""Pruning announces and removes unused data, and never removes data in use."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Never

import dagster as dg
import pytest

from cifar_assets.assets.record import DATA_VERSION_TAG
from cifar_assets.dataset.versions.processed import read_processed
from cifar_assets.dataset.versions.raw import current_raw_digest, make_current, read_raw
from cifar_assets.dataset.versions.reader import open_split
from cifar_assets.model_package import read_manifest
from cifar_assets.prune import run as prune_run
from cifar_assets.prune.rules import Policy
from cifar_assets.prune.run import PruneError
from resources.mlflow.resource import LocalMlflow
from resources.object_store import FolderStore
from resources.object_store.folder import TEMPORARY_PREFIX
from resources.object_store.resource import LocalObjectStore
from tests.fixtures.cifar10 import INFERENCE_SERVICE, PROCESSED_DATASET, RAW_DATASET, TRAINED_MODEL, prune_job
from tests.fixtures.models import store_model
from tests.fixtures.workspace import ROOT
from tests.unit.prune.conftest import KEPT, Generation, Serving, World, png


def is_whole(world: World, generation: Generation) -> bool:
    """Whether the model and all data it was made from can be read."""
    stores = world.stores
    if not stores.models.exists(f"{generation.model}/manifest.json"):
        return False
    read_manifest(stores.models.at(generation.model), generation.model)
    open_split(stores.processed, generation.processed, "train")
    make_current(stores.raw, generation.raw)
    return True


def is_gone(world: World, generation: Generation) -> bool:
    prefixes = (f"models/{generation.model}", f"processed-data/{generation.processed}")
    return not any(key.startswith((*prefixes, f"raw-data/versions/{generation.raw}")) for key in world.all_keys())


def test_dry_run_names_everything_and_changes_nothing(world: World) -> None:
    before = world.all_keys()
    removals = world.prune(apply=False)
    assert world.all_keys() == before
    assert all(line.startswith("Would remove ") for line in world.lines)
    for generation in world.generations[:-KEPT]:
        for digest in (generation.raw, generation.processed, generation.model):
            assert any(digest in line for line in world.lines)
    listed = {(removal.kind, removal.name) for removal in removals}
    applied = world.prune(apply=True)
    assert {(removal.kind, removal.name) for removal in applied} == listed
    assert sum(removal.size for removal in applied) > 0
    assert world.prune(apply=True) == []


def test_the_newest_versions_stay_whole_and_older_ones_go(world: World) -> None:
    world.prune()
    assert all(is_whole(world, generation) for generation in world.generations[-KEPT:])
    assert all(is_gone(world, generation) for generation in world.generations[:-KEPT])
    shards = {
        f"processed-data/{shard.file}"
        for generation in world.generations[-KEPT:]
        for shard in read_processed(world.stores.processed, generation.processed).files
    }
    assert {key for key in world.all_keys() if "/shards/" in key} == shards
    objects = {
        f"raw-data/{item.key}"
        for generation in world.generations[-KEPT:]
        for item in read_raw(world.stores.raw, generation.raw).objects
    }
    assert {key for key in world.all_keys() if "/objects/" in key} == objects


def test_landing_zone_rejected_objects_and_pointers_are_never_removed(world: World) -> None:
    world.stores.raw.write("rejected/cat/x.png", b"bad")
    world.stores.raw.write("landing/old.png", b"nobody reads this")
    world.grow_old()
    before = world.all_keys()
    world.prune(keep_versions=1)
    after = world.all_keys()
    for prefix in ("raw-data/landing/", "raw-data/rejected/", "raw-data/current.json", "raw-data/landing-read.json"):
        assert {key for key in before if key.startswith(prefix)} == {key for key in after if key.startswith(prefix)}


def serve(world: World, generation: Generation) -> Serving:
    return Serving(digest=generation.model)


def crown(world: World, generation: Generation) -> None:
    register(world, generation)
    client, name = world.mlflow.client(), world.mlflow.registered_model
    client.set_registered_model_alias(name, "champion", "1")


def register(world: World, generation: Generation) -> None:
    client, name = world.mlflow.client(), world.mlflow.registered_model
    world.mlflow.prepare()
    client.create_registered_model(name)
    client.create_model_version(name, "file:///none", tags={"model_digest": generation.model})


def pin_model(world: World, generation: Generation) -> None:
    world.stores.models.write(f"pinned/{generation.model}", b"")


def deploy(world: World, generation: Generation) -> None:
    record(world, INFERENCE_SERVICE, generation.model)
    record(world, INFERENCE_SERVICE, world.generations[-1].model)


def train(world: World, generation: Generation) -> None:
    record(world, TRAINED_MODEL, generation.model)


def name_in_a_run(world: World, generation: Generation) -> None:
    config = {"ops": {"x": {"config": {"model_digest": generation.model}}}}
    world.instance.add_run(dg.DagsterRun(job_name="deploy", run_config=config, status=dg.DagsterRunStatus.STARTED))


def record(world: World, key: dg.AssetKey, digest: str) -> None:
    world.instance.report_runless_asset_event(dg.AssetMaterialization(key, tags={DATA_VERSION_TAG: digest}))


@pytest.mark.parametrize("use", [serve, register, crown, pin_model, deploy, train, name_in_a_run])
def test_a_model_in_use_stays_with_all_it_came_from(
    use: Callable[[World, Generation], Serving | None], world: World
) -> None:
    old = world.generations[0]
    serving = use(world, old)
    world.prune(serving=serving)
    assert is_whole(world, old)
    assert all(is_gone(world, generation) for generation in world.generations[1:-KEPT])


@pytest.mark.parametrize("folder", ["", "flowers/"])
def test_the_start_of_a_stored_model_stays(world: World, folder: str) -> None:
    old = world.generations[0]
    store_model(world.stores.models.at(folder) if folder else world.stores.models, start_model=old.model)
    world.prune()
    assert is_whole(world, old)
    assert is_gone(world, world.generations[1])


def test_a_declared_start_stays(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    old = world.generations[0]
    monkeypatch.setenv("DATA_SETS", f"[{{name: flowers, source: x, start_from: '{old.model}'}}]")
    world.prune()
    assert is_whole(world, old)


@pytest.mark.parametrize("use", ["pinned", "current", "materialized raw", "materialized processed", "RETRAIN_CONFIG"])
def test_data_in_use_stays(use: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    old = world.generations[0]
    if use == "pinned":
        world.stores.models.write(f"pinned/{old.processed}", b"")
    elif use == "current":
        make_current(world.stores.raw, old.raw)
    elif use == "materialized raw":
        record(world, RAW_DATASET, old.raw)
    elif use == "materialized processed":
        record(world, PROCESSED_DATASET, old.processed)
    else:
        monkeypatch.setenv("RETRAIN_CONFIG", f'{{"dataset_digest": "{old.processed}"}}')
    world.prune()
    make_current(world.stores.raw, old.raw)
    if use not in ("current", "materialized raw"):
        open_split(world.stores.processed, old.processed, "train")


def test_recent_objects_are_not_removed(world: World) -> None:
    world.prune(min_age_hours=(time.time() + 86_400) / 3600)
    assert all(is_whole(world, generation) for generation in world.generations)


def test_a_version_built_again_while_pruning_survives(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    old = world.generations[0]
    orphans = prune_run.orphans

    def build_first(*arguments):
        for number in range(1, len(world.generations)):
            world.stores.raw.delete(f"landing/cat/{number}.png")
        assert world.build() == old
        return orphans(*arguments)

    monkeypatch.setattr(prune_run, "orphans", build_first)
    world.prune()
    assert is_whole(world, old)


def test_a_version_published_again_since_it_was_listed_survives(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    old = world.generations[0]
    models = prune_run.prune_models

    def publish_between(*arguments):
        selection = models(*arguments)
        for number in range(1, len(world.generations)):
            world.stores.raw.delete(f"landing/cat/{number}.png")
        assert world.build() == old
        return selection

    monkeypatch.setattr(prune_run, "prune_models", publish_between)
    world.prune()
    assert is_whole(world, old)


def test_an_object_in_use_again_is_young_again(world: World) -> None:
    """A build that found the objects of an old version may still use them."""
    old = world.generations[0]
    shard = read_processed(world.stores.processed, old.processed).shards["train"][-1]
    for number in range(1, len(world.generations)):
        world.stores.raw.delete(f"landing/cat/{number}.png")
    assert world.build() == old
    info = world.stores.processed.stat(shard.file)
    assert info is not None
    assert time.time() - info.last_modified.timestamp() < 600


def test_unreachable_service_stops_pruning(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    before = world.all_keys()

    class Away(Serving):
        def status(self) -> Never:
            raise ConnectionError("no route to host")

    with pytest.raises(PruneError, match=r"Nothing was removed.*no route to host"):
        world.prune(serving=Away())
    (world.folder / "mlflow").mkdir(exist_ok=True)
    (world.folder / "mlflow" / "mlflow.db").write_bytes(b"not a database")
    with pytest.raises(PruneError, match="Nothing was removed"):
        world.prune()
    assert world.all_keys() == before


def test_damaged_manifest_stops_pruning(world: World) -> None:
    world.stores.models.write(f"{world.generations[-1].model}/manifest.json", b"{}")
    before = world.all_keys()
    with pytest.raises(PruneError, match=world.generations[-1].model):
        world.prune()
    assert world.all_keys() == before


def test_old_training_leftovers_are_removed(world: World) -> None:
    models = world.stores.models
    old = {
        f"{'f' * 64}/model.onnx": b"of a model that was never finished",
        f"checkpoints/{'a' * 64}/step-000000001-{'b' * 64}.safetensors": b"x",
        "pipes/messages/job-1/process/00000000.jsonl": b"{}",
        "pipes/read/job-1/mark": b"{}",
        f"jobs/{'1' * 64}.json": b"a note of an earlier release",
        "resnet18_cifar10.pth": b"weights",
    }
    for key, data in old.items():
        models.write(key, data)
    world.grow_old()
    models.write(f"checkpoints/{'c' * 64}/step-000000001-{'d' * 64}.safetensors", b"young")
    for number, generation in enumerate(world.generations):
        path = models.local_path(f"{generation.model}/manifest.json")
        assert path is not None
        os.utime(path, (number, number))
    world.prune()
    left = {info.key for info in models.list()}
    assert left & old.keys() == {"resnet18_cifar10.pth"}
    assert f"checkpoints/{'c' * 64}/step-000000001-{'d' * 64}.safetensors" in left


def log_model(world: World, generation: Generation) -> str:
    """A finished MLflow run with an artifact, registered as the trainer registers it; the run's id."""
    client = world.mlflow.client()
    experiment = client.get_experiment_by_name(world.mlflow.experiment)
    number = (
        experiment.experiment_id
        if experiment
        else client.create_experiment(world.mlflow.experiment, world.mlflow.artifact_uri())
    )
    run = client.create_run(number, start_time=1)
    path = world.folder / "model.onnx"
    path.write_bytes(b"weights")
    client.log_artifact(run.info.run_id, str(path), "model")
    client.set_terminated(run.info.run_id, "FINISHED", 2)
    client.create_model_version(
        world.mlflow.registered_model,
        f"{run.info.artifact_uri}/model",
        run.info.run_id,
        tags={"model_digest": generation.model},
    )
    return run.info.run_id


def artifacts(world: World) -> int:
    return len([path for path in (world.folder / "mlflow").rglob("model.onnx") if path.is_file()])


@pytest.fixture
def tracked(world: World) -> list[str]:
    world.mlflow.prepare()
    world.mlflow.client().create_registered_model(world.mlflow.registered_model)
    return [log_model(world, generation) for generation in world.generations]


def test_registered_models_stay_with_all_they_came_from(world: World, tracked: list[str]) -> None:
    world.prune()
    assert all(is_whole(world, generation) for generation in world.generations)
    assert artifacts(world) == len(tracked)


def test_registered_models_without_an_alias_retire_on_demand(world: World, tracked: list[str]) -> None:
    client, name = world.mlflow.client(), world.mlflow.registered_model
    client.set_registered_model_alias(name, "champion", "1")
    world.prune(retire_registered=True)
    left = {version.version for version in client.search_model_versions(f"name = '{name}'")}
    assert {str(version) for version in left} == {"1", "4", "5"}
    assert artifacts(world) == 3
    assert client.get_run(tracked[1]).info.lifecycle_stage == "deleted"
    assert [is_whole(world, generation) for generation in world.generations] == [True, False, False, True, True]


def test_a_version_retires_whose_run_mlflow_gc_removed(world: World, tracked: list[str]) -> None:
    client, name = world.mlflow.client(), world.mlflow.registered_model
    client.delete_run(tracked[0])
    client._tracking_client.store._hard_delete_run(tracked[0])  # pyright: ignore[reportAttributeAccessIssue]
    world.prune(retire_registered=True)
    left = {version.version for version in client.search_model_versions(f"name = '{name}'")}
    assert {str(version) for version in left} == {"4", "5"}


def test_artifacts_of_runs_deleted_in_mlflow_go_unless_a_version_has_them(world: World, tracked: list[str]) -> None:
    client, name = world.mlflow.client(), world.mlflow.registered_model
    for run_id in tracked[:2]:
        client.delete_run(run_id)
    client.delete_model_version(name, "1")
    removals = world.prune()
    assert [removal.name for removal in removals if removal.kind == "MLflow artifacts"] == [tracked[0]]
    assert artifacts(world) == len(tracked) - 1


def test_version_in_mlflow_of_another_store_stays(world: World, tracked: list[str]) -> None:
    client, name = world.mlflow.client(), world.mlflow.registered_model
    client.create_model_version(name, "file:///none", tags={"model_digest": "e" * 64})
    world.prune(min_age_hours=0, retire_registered=True)
    assert "6" in {str(version.version) for version in client.search_model_versions(f"name = '{name}'")}


def test_records_of_traffic_go_after_their_days(world: World) -> None:
    records = FolderStore(world.folder / "store" / "served-traffic")
    old = ["2026-01-01/000000-a.parquet", "2026-01-01/000100-b.parquet", "2026-01-02/000000-c.parquet"]
    new = ["2026-01-02/235900-d.parquet", "2026-01-03/000000-e.parquet"]
    two_days_ago = time.time() - 2 * 86_400
    for key in old + new:
        records.write(key, b"record")
    for path in (records.root / key for key in old):
        os.utime(path, (two_days_ago, two_days_ago))
    world.prune(traffic_days=3)
    assert len(list(records.list())) == 5
    world.prune(traffic_days=1)
    assert [info.key for info in records.list()] == new


def test_a_batch_to_label_goes_as_a_whole_after_its_last_label(world: World) -> None:
    two_days_ago = time.time() - 2 * 86_400
    keys = [f"to-label/2026-01-01T000000/{name}" for name in ("a.png", "labels.json", "manifest.json")]
    for key in keys:
        world.stores.raw.write(key, b"{}")
        os.utime(world.folder / "store/raw-data" / key, (two_days_ago, two_days_ago))
    labels = world.folder / "store/raw-data" / keys[1]
    os.utime(labels, None)
    world.prune(traffic_days=1)
    assert [info.key for info in world.stores.raw.list("to-label/")] == keys
    os.utime(labels, (two_days_ago, two_days_ago))
    world.prune(traffic_days=1)
    assert list(world.stores.raw.list("to-label/")) == []


def test_temporary_files_and_compute_logs_go_when_they_are_old(world: World) -> None:
    temporary = world.folder / "tmp"
    manager = world.instance.compute_log_manager
    log = Path(manager.get_captured_local_path(["run-1", "compute_logs", "step"], "err"))  # pyright: ignore[reportAttributeAccessIssue]
    old_paths = [temporary / "cifar-landed-abc" / "object", temporary / f"cifar-shards-{os.getuid()}" / "old"]
    new_paths = [temporary / f"cifar-shards-{os.getuid()}" / "new", temporary / "other" / "file"]
    for path in (*old_paths, *new_paths, log):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    for path in (*old_paths, old_paths[0].parent, log, new_paths[1]):
        os.utime(path, (0, 0))
    world.prune()
    assert [path.exists() for path in (*old_paths, *new_paths, log)] == [False, False, True, True, False]


def test_file_that_a_killed_writer_left_in_the_store_goes_when_it_is_old(world: World) -> None:
    folder = world.folder / "store" / "models" / "checkpoints" / "job"
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom resources.object_store.folder import write_atomically\n"
        "write_atomically(Path(sys.argv[1]), lambda file: os.kill(os.getpid(), signal.SIGKILL))"
    )
    subprocess.run([sys.executable, "-c", code, str(folder / "x")], cwd=ROOT, check=False)
    (left,) = folder.iterdir()
    in_use = left.with_name(f"{TEMPORARY_PREFIX}young")
    in_use.touch()
    os.utime(left, (0, 0))
    assert str(left) in {removal.name for removal in world.prune(apply=False)}
    world.prune()
    assert list(folder.iterdir()) == [in_use]


def test_the_job_reports_what_it_removed(world: World) -> None:
    resources = {"object_store": LocalObjectStore(path=str(world.folder / "store")), "mlflow": world.mlflow}
    config = {"ops": {"prune_unused": {"config": {"keep_versions": KEPT, "apply": True}}}}
    result = prune_job.execute_in_process(
        run_config=config, instance=world.instance, resources={**resources, "serving": Serving()}
    )
    (output,) = [event for event in result.all_events if event.event_type_value == "STEP_OUTPUT"]
    metadata = output.step_output_data.metadata
    assert metadata["applied"].value is True
    assert str(metadata["model"].value).startswith("3, ")
    assert is_gone(world, world.generations[0])


def test_the_defaults_keep_five_and_remove_nothing_by_themselves() -> None:
    assert Policy().keep_versions == 5
    assert Policy().min_age_hours == 24


def test_the_store_of_a_fresh_checkout_can_be_pruned(world: World) -> None:
    empty = World(
        world.folder / "fresh", world.stores, [], world.instance, LocalMlflow(path=str(world.folder / "none")), []
    )
    assert empty.prune() == []
    assert not (world.folder / "none").exists()
    assert current_raw_digest(FolderStore(world.folder / "fresh" / "store" / "raw-data")) is None


def test_a_landed_image_whose_pack_was_removed_is_packed_again(world: World) -> None:
    world.prune(keep_versions=1)
    world.stores.raw.write("landing/dog/new.png", png(100))
    assert is_whole(world, world.build())


def test_predictions_go_after_their_days(world: World) -> None:
    def keys() -> list[str]:
        return [info.key for info in world.stores.processed.list("predictions/")]

    two_days_ago = time.time() - 2 * 86_400
    for model, ages in {"a": ("old", "old"), "b": ("old", "new")}.items():
        for file, age in zip(("manifest.json", "part-start.parquet"), ages, strict=True):
            world.stores.processed.write(key := f"predictions/photos/{model * 64}/float32/{file}", b"{}")
            if age == "old":
                os.utime(world.folder / "store/processed-data" / key, (two_days_ago, two_days_ago))
    world.prune(prediction_days=3)
    assert len(keys()) == 4
    world.prune(prediction_days=1)
    assert keys() == [
        f"predictions/photos/{'b' * 64}/float32/{file}" for file in ("manifest.json", "part-start.parquet")
    ]


def test_pruning_finds_the_temporary_folders_that_killed_processes_leave() -> None:
    places = [ROOT / "cifar_assets", ROOT / "resources" / "argo", ROOT / "resources" / "trainer"]
    text = "".join(path.read_text() for place in places for path in place.rglob("*.py"))
    prefixes = re.findall(r"TemporaryDirectory\((.*?)\)", text)
    assert prefixes
    assert [each for each in prefixes if not each.startswith('prefix="cifar-')] == []
