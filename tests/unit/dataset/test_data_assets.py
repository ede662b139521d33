"""The data assets: what Dagster records for valid data, and that it records nothing for invalid data."""

from pathlib import Path

import dagster as dg
import pytest

from cifar_assets.contracts import CLASSES
from resources.object_store import FolderStore
from resources.object_store.resource import LocalObjectStore
from tests.fixtures.cifar10 import PROCESSED_DATASET, RAW_DATASET, processed_dataset, raw_dataset
from tests.unit.dataset.test_hostile_archives import extras

ASSETS = [raw_dataset, processed_dataset]


def by(column: str, value: dg.MetadataValue) -> dict[object, dict[str, int]]:
    """The rows of a table by one of its columns; the others hold numbers."""
    assert isinstance(value, dg.TableMetadataValue)
    rows = [dict(record.data) for record in value.records]
    return {row.pop(column): {name: int(str(number)) for name, number in row.items()} for row in rows}


def materialize(
    root: Path, instance: dg.DagsterInstance, source: str, assets: list[dg.AssetsDefinition] = ASSETS
) -> dg.ExecuteInProcessResult:
    return dg.materialize(
        assets,
        selection=[each.key for each in assets],
        instance=instance,
        resources={"object_store": LocalObjectStore(path=str(root))},
        run_config={"ops": {"cifar10__raw_dataset": {"config": {"source": source}}}},
        raise_on_error=False,
    )


@pytest.mark.parametrize("kind", ["cut", "page", "hostile"])
def test_invalid_data_fails_the_run_and_records_nothing(kind: str, make, tmp_path: Path) -> None:
    good = make.archive()
    data = {
        "cut": good[: len(good) // 2],
        "page": b"<!DOCTYPE html><html>log in</html>",
        "hostile": make.tar(make.python_members(), extras("/")["parent folder"]),
    }[kind]
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(data)
    with dg.DagsterInstance.ephemeral() as instance:
        result = materialize(tmp_path / "store", instance, str(path))
        assert not result.success
        failure = result.failure_data_for_node("cifar10__raw_dataset")
        assert failure is not None
        assert str(path) in str(failure.error)
        assert instance.get_latest_materialization_event(RAW_DATASET) is None
        assert [event.node_name for event in result.all_events if event.is_step_start] == ["cifar10__raw_dataset"]

        path.write_bytes(good)
        assert materialize(tmp_path / "store", instance, str(path)).success
        assert instance.get_latest_materialization_event(PROCESSED_DATASET) is not None


def test_metadata_describe_the_version_and_its_changes(make, tmp_path: Path, source: str) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        assert materialize(tmp_path / "store", instance, source).success
        raw = FolderStore(tmp_path / "store" / "raw-data")
        raw.write("landing/new.parquet", make.parquet(make.images(10, 5), make.labels(10)))
        raw.write("landing/cat/bad.png", b"no image")
        assert materialize(tmp_path / "store", instance, source).success
        event = instance.get_latest_materialization_event(RAW_DATASET)
        assert event is not None
        assert event.asset_materialization is not None
        found = event.asset_materialization.metadata
        assert found["num_landed_rejected"].value == 1
        event = instance.get_latest_materialization_event(PROCESSED_DATASET)
    assert event is not None
    assert event.asset_materialization is not None
    metadata = event.asset_materialization.metadata
    assert metadata["dagster/row_count"].value == 90
    counts = by("class", metadata["counts"])
    assert list(counts) == list(CLASSES)
    assert sum(sum(row.values()) for row in counts.values()) == 90
    changes = by("split", metadata["changes"])
    assert changes["train"]["added"] + changes["validation"]["added"] == 10
    assert changes["test"] == {"added": 0, "removed": 0}
    assert "data:image/png;base64," in str(metadata["samples"].value)
