from pathlib import Path

import pytest
from PIL import Image

from cifar_assets.contracts import CLASSES
from cifar_assets.dataset.__main__ import main
from cifar_assets.dataset.formats.images import pixel_digest
from cifar_assets.dataset.stores import Stores
from cifar_assets.dataset.versions.baseline_copies import write_baseline_processed, write_baseline_raw
from cifar_assets.dataset.versions.lineage import (
    changes_since,
    find_image,
    images_of,
    model_lineage,
    models_by_dataset,
)
from cifar_assets.dataset.versions.processed import ProcessedVersion, build_processed
from cifar_assets.dataset.versions.raw import RawVersion, build_raw_version
from cifar_assets.dataset.versions.splits import SPLIT_NAMES
from cifar_assets.model_package import IDENTITY_FILES, ModelManifest, write_package
from resources.digests import sha256_bytes
from resources.object_store import FolderStore
from tests.fixtures.models import store_model


class World:
    """Two versions, the second with landed data, and a model trained on each."""

    def __init__(self, make, raw: FolderStore, processed: FolderStore, source: str):
        self.models = FolderStore(raw.root.parent / "models")
        self.stores = Stores(raw, processed, self.models)
        self.first = self.build(source)
        self.landed_image = make.images(1, 6)[0]
        raw.write("landing/more.parquet", make.parquet(make.images(10, 5), make.labels(10)))
        raw.write("landing/cat/mine.png", make.png(self.landed_image))
        self.second = self.build(source)
        self.first_model = self.model(*self.first)
        self.second_model = self.model(*self.second)

    def build(self, source: str) -> tuple[RawVersion, ProcessedVersion]:
        raw = build_raw_version(self.stores.raw, source)
        return raw, build_processed(self.stores.raw, self.stores.processed, raw.digest)

    def model(self, raw: RawVersion, processed: ProcessedVersion) -> str:
        files = {name: f"{name} {processed.digest}".encode() for name in IDENTITY_FILES}
        manifest = ModelManifest(
            dataset_digest=processed.digest,
            raw_digest=raw.digest,
            seed=1,
            classes=CLASSES,
            files={name: sha256_bytes(data) for name, data in files.items()},
        )
        return write_package(self.models, manifest, files)


@pytest.fixture
def world(make, raw: FolderStore, processed: FolderStore, source: str) -> World:
    return World(make, raw, processed, source)


def test_from_a_model_to_objects_and_images(world: World) -> None:
    manifest, lineage = model_lineage(world.stores, world.second_model)
    assert manifest.digest == world.second_model
    raw, built = world.second
    assert (lineage.processed_digest, lineage.raw_digest) == (built.digest, raw.digest)
    assert [used.item for used in lineage.objects] == list(raw.manifest.objects)
    landed = {name for used in lineage.objects for name in used.landed_as}
    assert landed == {"landing/more.parquet"}
    assert sum(sum(used.images.values()) for used in lineage.objects) == 91
    images = [image for split in SPLIT_NAMES for image in images_of(world.stores, built.digest, split)]
    assert len({image.pixel_digest for image in images}) == 91
    assert {image.object_key for image in images} == {item.key for item in raw.manifest.objects}


def test_from_an_image_to_models(make, world: World) -> None:
    models = models_by_dataset(world.models)
    (use,) = find_image(world.stores, pixel_digest(world.landed_image))
    assert use.processed_digest == world.second[1].digest
    assert models[use.processed_digest] == [world.second_model]
    assert use.label == "cat"
    both = find_image(world.stores, pixel_digest(make.images(1)[0]))
    assert {models[use.processed_digest][0] for use in both} == {world.first_model, world.second_model}
    assert find_image(world.stores, "0" * 64) == []


def test_what_changed_between_versions(world: World) -> None:
    processed = world.stores.processed
    changes = changes_since(processed, world.second[1].digest, world.first[1].digest)
    assert sum(changes.added.values()) == 11
    assert changes.added["test"] == 0
    assert sum(changes.removed.values()) == 0
    back = changes_since(processed, world.first[1].digest, world.second[1].digest)
    assert back.removed == changes.added


def run(world: World, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["--store", str(world.models.root.parent), *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_commands(make, world: World, capsys, tmp_path: Path) -> None:
    code, out, _ = run(world, capsys, "versions")
    assert code == 0
    assert [line[:66].split() for line in out.splitlines()] in (
        [[world.first[0].digest], ["*", world.second[0].digest]],
        [["*", world.second[0].digest], [world.first[0].digest]],
    )

    code, out, _ = run(world, capsys, "model", world.second_model, "--images")
    assert code == 0
    assert world.second[0].digest in out
    assert "landed as landing/more.parquet" in out
    assert out.count(" row ") == 91

    picture = tmp_path / "mine.png"
    picture.write_bytes(make.png(world.landed_image))
    code, out, _ = run(world, capsys, "where", str(picture))
    assert code == 0
    assert "used in 1 places" in out
    assert world.second_model in out

    photograph = tmp_path / "photo.jpg"  # larger than a request may be
    Image.new("RGB", (5000, 4000)).save(photograph)
    code, out, _ = run(world, capsys, "where", str(photograph))
    assert code == 0
    assert "used in 0 places" in out

    code, out, _ = run(world, capsys, "dataset", world.first[1].digest)
    assert "source object" in out

    dataset, raw = world.second[1].digest, world.second[0].digest
    started = store_model(world.models, start_model=world.first_model, dataset=dataset, raw=raw)
    code, out, _ = run(world, capsys, "model", started)
    assert code == 0
    assert f"start      model {world.first_model}" in out


@pytest.mark.parametrize(
    "arguments",
    [("model", "latest"), ("model", "0" * 64), ("where", "no-such-file.png"), ("dataset", "x")],
)
def test_a_wrong_argument_is_one_line(arguments: tuple[str, ...], world: World, capsys) -> None:
    code, out, err = run(world, capsys, *arguments)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1


def test_the_well_known_raw_archive_holds_the_version(world: World, tmp_path: Path) -> None:
    key = write_baseline_raw(world.stores.raw, world.stores.processed, world.second[1].digest)
    assert key == "cifar10-dataset.tar.gz"
    path = tmp_path / "cifar-10-python.tar.gz"
    world.stores.raw.download(key, path)
    raw, processed = FolderStore(tmp_path / "again" / "raw"), FolderStore(tmp_path / "again" / "processed")
    built = build_processed(raw, processed, build_raw_version(raw, str(path)).digest)
    again = Stores(raw, processed, world.models)
    assert contents(again, built.digest) == contents(world.stores, world.second[1].digest)


def contents(stores: Stores, digest: str) -> set[tuple[str, str, str]]:
    images = (image for split in SPLIT_NAMES for image in images_of(stores, digest, split))
    return {(image.split, image.pixel_digest, image.label) for image in images}


def test_an_official_archive_is_copied_as_it_is(make, raw, processed, tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(make.archive())
    built = build_processed(raw, processed, build_raw_version(raw, str(path)).digest)
    assert raw.read(write_baseline_raw(raw, processed, built.digest)) == path.read_bytes()


def test_the_well_known_processed_archive_holds_manifest_and_shards(world: World, tmp_path: Path) -> None:
    import tarfile

    built = world.second[1]
    key = write_baseline_processed(world.stores.processed, built.digest)
    assert key == "cifar10-processed.tar.gz"
    world.stores.processed.download(key, tmp_path / "a.tar.gz")
    with tarfile.open(tmp_path / "a.tar.gz") as archive:
        names = archive.getnames()
        member = archive.extractfile("manifest.json")
        assert member is not None
        assert sha256_bytes(member.read()) == built.digest
    assert built.manifest.shards["train"][0].file in names


def test_a_command_ignores_variables_it_does_not_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCURACY_THRESHOLD", "80")
    monkeypatch.setenv("CIFAR_STORE", str(tmp_path))
    assert main(["versions"]) == 0
    assert capsys.readouterr().err == ""
