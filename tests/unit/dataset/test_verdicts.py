"""Blocking checks of versions: Dagster and the pipelines agree, and no refused version becomes current."""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from cifar_assets.assets.record import previous_digests
from cifar_assets.checks.data import classes_balanced
from cifar_assets.contracts import BASELINE_PROCESSED_KEY
from cifar_assets.dataset.stores import stores_below
from cifar_assets.dataset.versions.processed import build_processed, read_processed
from cifar_assets.dataset.versions.raw import build_raw_version, current_raw_digest, make_current
from cifar_assets.dataset.versions.splits import SplitConfig
from cifar_assets.dataset.versions.verdicts import judge_processed, judge_raw
from cifar_assets.pipeline_steps import __main__ as steps
from resources.errors import DataError
from resources.object_store import FolderStore
from resources.object_store.resource import LocalObjectStore
from resources.verdict import objections
from tests.fixtures.cifar10 import (
    PROCESSED_DATASET,
    RAW_DATASET,
    processed_dataset,
    processed_dataset_checks,
    raw_dataset,
    raw_dataset_checks,
)


@pytest.fixture
def nine_classes(make, tmp_path: Path) -> str:
    """A source without pictures of the last class."""
    path = tmp_path / "nine" / "train.parquet"
    path.parent.mkdir()
    path.write_bytes(make.parquet(make.images(90), make.labels(90) % 9))
    return str(path)


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def materialize(
    root: Path, instance: dg.DagsterInstance, source: str, copies: bool = False
) -> dg.ExecuteInProcessResult:
    definitions = dg.Definitions(
        assets=[raw_dataset, processed_dataset],
        asset_checks=[raw_dataset_checks, processed_dataset_checks],
        jobs=[dg.define_asset_job("data", dg.AssetSelection.assets(RAW_DATASET, PROCESSED_DATASET))],
        resources={"object_store": LocalObjectStore(path=str(root))},
    )
    ops = {
        "cifar10__raw_dataset": {"config": {"source": source}},
        "cifar10__processed_dataset": {"config": {"write_baseline_copies": copies}},
    }
    return definitions.resolve_job_def("data").execute_in_process(
        instance=instance, run_config={"ops": ops}, raise_on_error=False
    )


def plan(root: Path, folder: Path, dataset: str = "current") -> int:
    """The pipelines' first step."""
    return steps.main(["--store", str(root), "data", "--run=r", f"--dataset={dataset}", f"--outputs={folder}"])


def test_data_without_a_class_is_refused_by_both_and_the_old_version_stays_current(
    tmp_path: Path, source: str, nine_classes: str, instance: dg.DagsterInstance, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "store"
    assert materialize(root, instance, source).success
    good = previous_digests(instance, RAW_DATASET)[0]
    result = materialize(root, instance, nine_classes)
    assert not result.success
    bad = previous_digests(instance, RAW_DATASET)[0]
    assert bad != good
    found = {each.check_name: each for each in result.get_asset_check_evaluations()}
    assert not found["splits_filled"].passed
    assert "no images of truck" in str(found["splits_filled"].description)
    assert found["objects_intact"].passed
    assert len(previous_digests(instance, PROCESSED_DATASET)) == 1

    raw = FolderStore(root / "raw-data")
    assert current_raw_digest(raw) == good
    assert plan(root, tmp_path / "outputs") == 0
    with pytest.raises(DataError, match="no images of truck"):
        make_current(raw, bad)
    assert current_raw_digest(raw) == good
    assert objections(judge_raw(raw, bad)) == [f"splits_filled: {found['splits_filled'].description}"]


def test_rejected_processed_version_also_stops_the_pipelines(
    tmp_path: Path, source: str, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    root = tmp_path / "store"
    assert materialize(root, instance, source, copies=True).success
    processed = FolderStore(root / "processed-data")
    before = processed.read(BASELINE_PROCESSED_KEY)
    assert plan(root, tmp_path / "outputs") == 0
    command = ["--store", str(root), "processed", f"--plan={tmp_path / 'outputs' / 'plan'}"]
    assert steps.main(command) == 0

    monkeypatch.setattr("cifar_assets.dataset.versions.verdicts._MEAN_RANGE", (0.9, 0.95))
    processed.write(BASELINE_PROCESSED_KEY, b"the copy before")
    assert not materialize(root, instance, source, copies=True).success
    assert processed.read(BASELINE_PROCESSED_KEY) == b"the copy before" != before
    capsys.readouterr()
    assert steps.main(command) == steps.EXIT_FAILED
    assert "statistics_in_range: Means" in capsys.readouterr().err


def test_a_test_split_without_a_class_is_a_warning(tmp_path: Path, make, raw: FolderStore) -> None:
    source = make.parquet_source(tmp_path / "source", test=9)  # labels 0 to 8
    version = build_raw_version(raw, str(source))
    assert objections(judge_raw(raw, version.digest)) == []
    stores = stores_below(FolderStore(tmp_path / "store"))
    built = build_processed(raw, stores.processed, version.digest)
    assert objections(judge_processed(raw, stores.processed, built.digest)) == []
    found = classes_balanced(read_processed(stores.processed, built.digest), 100)
    assert not found.passed
    assert "test has no truck" in found.reason


def test_a_version_without_validation_images_is_refused(source: str, raw: FolderStore, processed: FolderStore) -> None:
    digest = build_raw_version(raw, source).digest
    built = build_processed(raw, processed, digest, SplitConfig(validation_fraction=0))
    (reason,) = objections(judge_processed(raw, processed, built.digest))
    assert "nothing_lost: 60 train, 0 validation, 20 test images" in reason


def test_many_damaged_objects_are_counted(tmp_path: Path, source: str, raw: FolderStore) -> None:
    digest = build_raw_version(raw, source).digest
    for info in raw.list("objects/"):
        raw.write(info.key, b"x")
    (reason,) = objections({"objects_intact": judge_raw(raw, digest)["objects_intact"]})
    assert reason.count("expected sha256") == 2


def test_a_version_that_is_not_stored_gives_reasons(tmp_path: Path, raw: FolderStore, processed: FolderStore) -> None:
    assert len(objections(judge_raw(raw, "f" * 64))) == 2
    assert len(objections(judge_processed(raw, processed, "f" * 64))) == 3


def test_judging_a_raw_version_writes_nothing(source: str, raw: FolderStore) -> None:
    """The pipelines' pods may only read the raw bucket."""
    digest = build_raw_version(raw, source).digest
    for info in raw.list("index/"):
        raw.delete(info.key)
    before = [info.key for info in raw.list()]
    assert objections(judge_raw(raw, digest)) == []
    assert [info.key for info in raw.list()] == before
