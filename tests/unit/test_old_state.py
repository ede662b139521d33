"""State that an earlier release wrote, opened by this one.

`state_bb9b3f1.json` holds the buckets, a sensor's cursor and a pipeline's plan as the code of commit bb9b3f1 wrote them
for eight images of a folder and three landed ones: text as it is, other files compressed. Paths were made neutral.
"""

import base64
import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cifar_assets.contracts import CLASSES
from cifar_assets.dataset.consistency import Known, check_source
from cifar_assets.dataset.index import dump_index, index_of, parse_index
from cifar_assets.dataset.landing.join import join_landed
from cifar_assets.dataset.stores import Stores, stores_below
from cifar_assets.dataset.versions.lineage import changes_since, images_of, model_lineage
from cifar_assets.dataset.versions.processed import build_processed, read_processed
from cifar_assets.dataset.versions.raw import current_raw_digest, list_raw_versions, read_provenance, read_raw
from cifar_assets.dataset.versions.reader import open_split
from cifar_assets.dataset.versions.splits import SPLIT_NAMES
from cifar_assets.dataset.versions.verdicts import judge_processed, judge_raw
from cifar_assets.gate import judge_model
from cifar_assets.landing_decision import LandingCursor
from cifar_assets.model_package import read_manifest
from cifar_assets.pipeline_steps import __main__ as steps
from cifar_assets.pipeline_steps.plan import parse_plan
from cifar_assets.training.checkpoint import Position
from resources.digests import canonical_json, sha256_bytes
from resources.errors import DataError
from resources.object_store import FolderStore
from resources.verdict import objections

STATE = Path(__file__).parents[1] / "fixtures" / "state_bb9b3f1.json"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FolderStore:
    monkeypatch.setattr("cifar_assets.dataset.landing.zone.SETTLED_SECONDS", -1.0)
    store = FolderStore(tmp_path / "store")
    for key, content in json.loads(STATE.read_text()).items():
        text = isinstance(content, str)
        store.write(key, content.encode() if text else zlib.decompress(base64.b64decode(content["zlib"])))
    return store


@pytest.fixture
def stores(root: FolderStore) -> Stores:
    return stores_below(root)


@pytest.fixture
def digests(root: FolderStore) -> dict[str, str]:
    return json.loads(root.read("digests.json"))


def test_a_raw_version_is_found_and_used(stores: Stores, digests: dict[str, str]) -> None:
    assert current_raw_digest(stores.raw) == digests["raw"]
    ((digest, (manifest, provenance)),) = list_raw_versions(stores.raw).items()
    assert (digest, manifest.rows, provenance.source) == (digests["raw"], 10, "/old/source")
    (objection,) = objections(judge_raw(stores.raw, digests["raw"]))
    assert "no images of frog, horse, ship, truck" in objection  # its ten images are of six classes
    assert read_raw(stores.raw, digests["raw"]).rows == 10


def test_joined_landed_data_is_joined_again(stores: Stores, digests: dict[str, str]) -> None:
    manifest = read_raw(stores.raw, digests["raw"])
    sources = [item for item in manifest.objects if item.role == "source"]
    *_, known = check_source([(item, index_of(stores.raw, item, manifest)) for item in sources])
    objects, report = join_landed(stores.raw, known, manifest)
    assert sum(item.used_rows for item in objects) == 2
    assert report.rejected == []


def test_a_processed_version_is_read_and_compared(stores: Stores, digests: dict[str, str]) -> None:
    old = digests["processed"]
    manifest = read_processed(stores.processed, old)
    assert (manifest.classes, manifest.image_size) == (CLASSES, 32)
    assert sum(manifest.count(split) for split in SPLIT_NAMES) == 10
    (objection,) = objections(judge_processed(stores.raw, stores.processed, old))
    assert "0 validation" in objection  # that commit allowed a split to be empty
    assert sum(len(open_split(stores.processed, old, split)) for split in SPLIT_NAMES) == 10
    new = build_processed(stores.raw, stores.processed, digests["raw"])
    changes = changes_since(stores.processed, new.digest, old)
    assert {*changes.added.values(), *changes.removed.values()} == {0}
    for split in SPLIT_NAMES:
        before, after = (
            sorted(image.pixel_digest for image in images_of(stores, digest, split)) for digest in (old, new.digest)
        )
        assert before == after


def test_a_model_is_judged_and_traced(stores: Stores, digests: dict[str, str]) -> None:
    assert objections(judge_model(stores.models, digests["model"], 0.5)) == []
    assert read_manifest(stores.models.at(digests["model"]), digests["model"]).image_size == 32
    assert model_lineage(stores, digests["model"])[1].raw_digest == digests["raw"]


def test_a_plan_is_continued(
    root: FolderStore, digests: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = parse_plan(root.read("plan.json").decode())
    # the trainer's ALGORITHM was raised since: its training begins again instead of using an earlier result
    assert plan.spec.identity != digests["identity"]
    path = tmp_path / "store" / "plan.json"
    assert steps.main(["--store", str(tmp_path / "store"), "processed", f"--plan={path}"]) == 1
    assert f"{digests['processed']} is refused. nothing_lost: 8 train, 0 validation" in capsys.readouterr().err


def test_a_cursor_is_read(root: FolderStore) -> None:
    cursor, note = LandingCursor.load(root.read("cursor.json").decode())
    assert note == ""
    assert (len(cursor.covered), cursor.sequence) == (2, 1)


def with_a_field_more(data: bytes) -> bytes:
    return json.dumps({**json.loads(data), "more": {"fields": 1}}).encode()


def of_another_version(data: bytes) -> bytes:
    return json.dumps({**json.loads(data), "version": 99}).encode()


@pytest.mark.parametrize("change", [with_a_field_more, of_another_version, lambda _: b"[1", lambda _: b"[]"])
def test_derived_state_of_another_release_is_rebuilt(
    stores: Stores, digests: dict[str, str], change: Callable[[bytes], bytes]
) -> None:
    """Nothing that only saves work stops a build, whatever it holds."""
    _, report = join_landed(stores.raw, Known(), read_raw(stores.raw, digests["raw"]))
    report.record.save(stores.raw)
    for key in ("landing-read.json", f"versions/{digests['raw']}/provenance.json"):
        stores.raw.write(key, change(stores.raw.read(key)))
    objects, report = join_landed(stores.raw, Known(), read_raw(stores.raw, digests["raw"]))
    assert (sum(item.used_rows for item in objects), report.rejected) == (2, [])
    assert read_provenance(stores.raw, digests["raw"]).version == 1
    assert len(list_raw_versions(stores.raw)) == 1


def test_a_manifest_of_an_unknown_kind_is_named(stores: Stores, digests: dict[str, str]) -> None:
    data = canonical_json({**read_raw(stores.raw, digests["raw"]).model_dump(mode="json"), "kind": "cifar10-raw/9"})
    digest = sha256_bytes(data)
    stores.raw.write(f"versions/{digest}/manifest.json", data)
    with pytest.raises(DataError, match="cifar10-raw/1"):
        read_raw(stores.raw, digest)
    assert [*list_raw_versions(stores.raw)] == [digests["raw"]]


def test_an_index_of_another_version_is_not_used(stores: Stores, digests: dict[str, str]) -> None:
    item = read_raw(stores.raw, digests["raw"]).objects[0]
    index = index_of(stores.raw, item, read_raw(stores.raw, digests["raw"]))
    data = dump_index(index)
    again = parse_index(data, 10)
    assert again is not None
    assert np.array_equal(again.digests, index.digests)
    assert parse_index(data.replace(b'"version":2', b'"version":9'), 10) is None


def test_a_checkpoints_position_is_read_with_and_without_a_version() -> None:
    position = Position(epoch=2, step=3)
    first_form = position.model_dump(exclude={"version"})
    assert Position.model_validate(first_form) == Position.model_validate(position.model_dump()) == position
    with pytest.raises(ValueError, match="version"):
        Position.model_validate({**first_form, "version": 99})
