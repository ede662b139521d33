"""The cost of retraining on little new data, and interrupted and concurrent builds, in both kinds of store."""

import io
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar_assets.dataset.objects import GROUP_ROWS
from cifar_assets.dataset.sources import synthetic
from cifar_assets.dataset.stores import Stores, stores_below
from cifar_assets.dataset.versions.processed import build_processed, list_processed_versions
from cifar_assets.dataset.versions.raw import build_raw_version, current_raw_digest, list_raw_digests
from cifar_assets.dataset.versions.reader import open_split
from cifar_assets.dataset.versions.splits import SPLIT_NAMES
from cifar_assets.prune.rules import Policy, orphans, prune_processed, prune_raw, raw_of_processed
from resources.errors import StoreError
from resources.object_store import FolderStore, ObjectStore
from tests.fixtures.workspace import ROOT
from tests.unit.training.jobs import Workplace, fork_trainer

pytestmark = pytest.mark.timeout(1800)

NUM_ARRIVALS = 30
BYTES_PER_IMAGE = 3 * 3072
"""Bytes of a landed picture of noise: in its pack, with a header, and as pixels in a shard."""

BYTES_PER_VERSION = 64 << 10
"""Manifests and notes."""


@pytest.fixture(autouse=True)
def _small_and_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cifar_assets.dataset.landing.zone.SETTLED_SECONDS", -1.0)
    monkeypatch.setattr(synthetic, "TRAIN_ROWS", 2000)
    monkeypatch.setattr(synthetic, "TEST_ROWS", 200)


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """An empty store above the buckets."""
    if request.param == "folder":
        return FolderStore(tmp_path / "store")
    server = request.getfixturevalue("s3_server")
    return server.store(server.new_bucket())


class Written:
    """Bytes written to a kind of store, including objects that were deleted again."""

    def __init__(self, kind: type, monkeypatch: pytest.MonkeyPatch):
        self.total = 0
        write, upload = kind.write, kind.upload

        def counted_write(store: ObjectStore, key: str, data: bytes) -> None:
            self.total += len(data)
            write(store, key, data)

        def counted_upload(store: ObjectStore, key: str, path: Path) -> None:
            self.total += path.stat().st_size
            upload(store, key, path)

        monkeypatch.setattr(kind, "write", counted_write)
        monkeypatch.setattr(kind, "upload", counted_upload)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    image = np.random.RandomState(number).randint(0, 256, (32, 32, 3)).astype(np.uint8)
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def build(stores: Stores) -> tuple[str, str]:
    raw = build_raw_version(stores.raw, "synthetic:4").digest
    return raw, build_processed(stores.raw, stores.processed, raw).digest


def stored(root: ObjectStore) -> int:
    return sum(info.size for info in root.list())


def contents(root: ObjectStore) -> dict[str, bytes]:
    """All objects that a version consists of, without timestamps and derived records."""
    kept = ("versions/", "objects/", "shards/", "manifest.json", "rejected/")
    return {
        info.key: root.read(info.key)
        for info in root.list()
        if any(part in info.key for part in kept) and "provenance" not in info.key
    }


def test_cost_of_thirty_small_arrivals_is_bounded(root: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = stores_below(root)
    build(stores)
    first, written = stored(root), Written(type(root), monkeypatch)
    brought = 0
    for number in range(NUM_ARRIVALS):
        data = png(number)
        stores.raw.write(f"landing/cat/{number}.png", data)
        brought += len(data)
        build(stores)
    # each arrival rewrites its group: half of the thirty pictures on average
    bound = NUM_ARRIVALS * (NUM_ARRIVALS / 2 * BYTES_PER_IMAGE + BYTES_PER_VERSION)
    growth = stored(root) - first - brought
    print(f"{first:,} bytes at first; {brought:,} brought; {growth:,} more stored, {written.total:,} written")
    assert growth < bound
    assert written.total - brought < bound
    assert bound < NUM_ARRIVALS * first / 10

    policy = Policy(keep_versions=1, min_age_hours=0)
    processed = prune_processed(stores.processed, set(), policy)
    raw = prune_raw(stores.raw, raw_of_processed(stores.processed, processed.kept), policy)
    for removal in (*processed.removals, *raw.removals):
        removal.remove()
    for removal in orphans(stores, processed.kept, raw.kept, policy):
        removal.remove()
    assert stored(root) - first - brought < NUM_ARRIVALS * BYTES_PER_IMAGE + BYTES_PER_VERSION
    (left,) = list_processed_versions(stores.processed)
    assert sum(len(open_split(stores.processed, left, split)) for split in SPLIT_NAMES) == 2200 + NUM_ARRIVALS


def test_cost_of_an_arrival_is_independent_of_earlier_landings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = stores_below(FolderStore(tmp_path / "store"))
    for number in range(1000):
        stores.raw.write(f"landing/cat/{number}.png", png(number))
    build(stores)
    written = Written(FolderStore, monkeypatch)
    stores.raw.write("landing/dog/new.png", png(5000))
    build(stores)
    # the record of the landing zone and the provenance have some lines of text for each landed object
    assert written.total < (GROUP_ROWS + 1) * BYTES_PER_IMAGE + BYTES_PER_VERSION + 1001 * 800


class Interrupted(FolderStore):
    """Refuses all changes from the n-th on, like a full disk or an unreachable server."""

    left = 0

    def _count(self) -> None:
        type(self).left -= 1
        if type(self).left < 0:
            raise StoreError("No space left on device.")

    def at(self, prefix: str) -> "Interrupted":
        return Interrupted(super().at(prefix).root)

    def write(self, key: str, data: bytes) -> None:
        self._count()
        super().write(key, data)

    def upload(self, key: str, path: Path) -> None:
        self._count()
        super().upload(key, path)

    def create(self, key: str, data: bytes) -> None:
        self._count()
        super().create(key, data)

    def copy(self, key: str, to_key: str, etag: str | None = None) -> None:
        self._count()
        super().copy(key, to_key, etag)

    def delete(self, key: str, etag: str | None = None) -> bool:
        self._count()
        return super().delete(key, etag)


def land(stores: Stores) -> None:
    for number in range(3):
        stores.raw.write(f"landing/cat/{number}.png", png(number))
    stores.raw.write("landing/dog/bad.png", b"bad")


def test_store_failure_at_any_write_leaves_no_partial_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "TRAIN_ROWS", 100)
    monkeypatch.setattr(synthetic, "TEST_ROWS", 20)
    clean = FolderStore(tmp_path / "clean")
    land(stores_below(clean))
    expected, content = build(stores_below(clean)), contents(clean)
    changes = 0
    for changes in range(100):
        root = FolderStore(tmp_path / str(changes))
        land(stores_below(root))
        Interrupted.left = changes
        try:
            build(stores_below(Interrupted(root.root)))
        except StoreError:
            stores = stores_below(root)
            for digest in list_processed_versions(stores.processed):
                open_split(stores.processed, digest, "train")
            assert current_raw_digest(stores.raw) in (None, expected[0])
            kept = {root.read(info.key) for info in root.list() if re.search(r"dog/bad[^/]*\.png$", info.key)}
            assert kept == {b"bad"}
            assert build(stores) == expected
            assert contents(root) == content
        else:
            break
        shutil.rmtree(root.root)
    assert 10 < changes < 99


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system with enough space for the raw data."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder], check=False)
    if mounted.returncode:
        pytest.skip("mounting a file system is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_full_disk_leaves_no_version_and_the_next_attempt_completes(small_disk: Path, tmp_path: Path) -> None:
    store = FolderStore(small_disk / "store")
    stores = stores_below(store)
    raw = build_raw_version(stores.raw, "synthetic:4").digest
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - (2 << 20)))
    with pytest.raises(StoreError, match="Check free space") as caught:
        build_processed(stores.raw, stores.processed, raw)
    assert str(small_disk) in str(caught.value)
    assert list_processed_versions(stores.processed) == []
    assert list(small_disk.rglob(".writing-*")) == []
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    digest = build_processed(stores.raw, stores.processed, raw).digest
    clean = stores_below(FolderStore(tmp_path / "clean"))
    assert build(clean) == (raw, digest)
    assert {info.key for info in stores.processed.list()} == {info.key for info in clean.processed.list()}


def test_concurrent_builds_produce_the_same_version(tmp_path: Path) -> None:
    land(stores_below(FolderStore(tmp_path / "store")))
    code = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from cifar_assets.dataset.landing import zone
        from cifar_assets.dataset.sources import synthetic
        from cifar_assets.dataset.versions.processed import build_processed
        from cifar_assets.dataset.versions.raw import build_raw_version
        from cifar_assets.dataset.stores import stores_below
        from resources.object_store import FolderStore
        zone.SETTLED_SECONDS = -1.0
        synthetic.TRAIN_ROWS, synthetic.TEST_ROWS = 2000, 200
        stores = stores_below(FolderStore(Path(sys.argv[1])))
        print("ready", flush=True)
        sys.stdin.readline()
        raw = build_raw_version(stores.raw, "synthetic:4").digest
        print(raw, build_processed(stores.raw, stores.processed, raw).digest)
        """
    )
    command = [sys.executable, "-c", code, str(tmp_path / "store")]
    pipe = subprocess.PIPE
    builds = [subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) for _ in range(4)]
    for each in builds:
        assert each.stdout is not None
        assert each.stdout.readline() == "ready\n"
    answers = []
    for each in builds:
        assert each.stdin is not None
        each.stdin.write("go\n")
        each.stdin.flush()
    for each in builds:
        answers.append(each.communicate()[0].split())
        assert each.returncode == 0
    clean = FolderStore(tmp_path / "clean")
    land(stores_below(clean))
    assert [tuple(answer) for answer in answers] == [build(stores_below(clean))] * 4
    assert contents(FolderStore(tmp_path / "store")) == contents(clean)


def test_ten_thousand_landed_objects(tmp_path: Path) -> None:
    stores = stores_below(FolderStore(tmp_path / "store"))
    for folder in range(10):
        (stores.raw.local_path("landing") or tmp_path).joinpath("cat", str(folder)).mkdir(parents=True)
    for number in range(10_000):
        path = stores.raw.local_path(f"landing/cat/{number % 10}/{number}.png")
        assert path is not None
        path.write_bytes(png(number))
    before = peak_bytes()
    _, processed = build(stores)
    assert peak_bytes() - before < 200 << 20
    assert sum(len(open_split(stores.processed, processed, split)) for split in SPLIT_NAMES) == 12_200
    assert len(list_raw_digests(stores.raw)) == 1
    stores.raw.write("landing/dog/new.png", png(20_000))
    opened: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        original = FolderStore.open
        patch.setattr(FolderStore, "open", lambda store, key: [opened.append(key), original(store, key)][1])
        build(stores)
    landed = [key for key in opened if key.startswith("landing/")]
    assert len(landed) <= 2 * (GROUP_ROWS + 1)


def peak_bytes() -> int:
    """Peak memory of this process since the last call."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    Path("/proc/self/clear_refs").write_text("5")
    assert found
    return int(found[1]) << 10


def test_weights_do_not_depend_on_the_number_of_shards(tmp_path: Path) -> None:
    weights = []
    for rows in (3, 96):
        place = Workplace.make(tmp_path / str(rows), shard_rows=rows)
        process = fork_trainer(place.spec(recipe_fields={"epochs": 2}))
        process.join()
        assert process.exitcode == 0
        ((_, manifest),) = place.published().items()
        weights.append(manifest.files["model.safetensors"])
    assert weights[0] == weights[1]
