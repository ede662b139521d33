"""Shared parts: new data costs only its own size, and a version depends on content only."""

import io
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save

from cifar_assets.dataset.objects import GROUP_ROWS, grouped
from cifar_assets.dataset.versions import processed as processed_module
from cifar_assets.dataset.versions.processed import MANIFEST_FILE, build_processed, read_processed
from cifar_assets.dataset.versions.raw import build_raw_version
from cifar_assets.dataset.versions.reader import open_split
from cifar_assets.dataset.versions.splits import SPLIT_NAMES, SplitConfig
from resources.digests import canonical_json, sha256_bytes
from resources.errors import ObjectChangedError, StoreError
from resources.object_store import FolderStore
from resources.object_store.base import ObjectStore


def png(number: int) -> bytes:
    image = np.random.RandomState(number).randint(0, 256, (32, 32, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def names(groups: list[list[str]]) -> set[tuple[str, ...]]:
    return {tuple(group) for group in groups}


@given(st.sets(st.integers(0, 10_000), max_size=600), st.integers(20_000, 30_000), st.randoms())
def test_groups_do_not_depend_on_order_and_one_more_item_changes_one_group(
    numbers: set[int], other: int, random
) -> None:
    items = [sha256_bytes(str(number).encode()) for number in numbers]
    more = [*items, sha256_bytes(str(other).encode())]
    random.shuffle(more)
    before = grouped(items, lambda item: item, lambda item: 1)
    after = grouped(more, lambda item: item, lambda item: 1)
    assert [item for group in after for item in group] == sorted(more)
    assert all(len(group) <= GROUP_ROWS for group in after)
    changed = names(after) - names(before)
    assert sum(len(group) for group in changed) <= GROUP_ROWS + 1


def test_splitting_equal_digests_terminates() -> None:
    assert grouped(["0" * 64] * 3, lambda item: item, lambda item: GROUP_ROWS) == [["0" * 64] * 3]


def test_an_arrival_leaves_the_other_shards_and_objects_alone(
    make, raw, processed, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(100):
        raw.write(f"landing/cat/{number}.png", png(number))
    first = build_raw_version(raw, source)
    before = build_processed(raw, processed, first.digest).manifest
    raw.write("landing/dog/new.png", png(1000))
    second = build_raw_version(raw, source)
    read: list[str] = []
    read_rows = processed_module.read_rows
    monkeypatch.setattr(
        processed_module,
        "read_rows",
        lambda path, *rest, **more: [read.append(path.name), read_rows(path, *rest, **more)][1],
    )
    after = build_processed(raw, processed, second.digest).manifest
    new = {item.key for item in second.manifest.objects} - {item.key for item in first.manifest.objects}
    assert {f"objects/{name}" for name in read} == new
    assert sum(item.rows for item in second.manifest.objects if item.key in new) <= GROUP_ROWS + 1
    built = {shard.file for shard in after.files} - {shard.file for shard in before.files}
    assert len(built) <= 2 * len(new)
    assert sum(after.counts["train"].values()) + sum(after.counts["validation"].values()) == 60 + 101


def test_a_version_does_not_depend_on_the_arrivals_that_led_to_it(make, source: str, tmp_path: Path) -> None:
    digests = []
    for name, batches in (("one by one", 7), ("at once", 1)):
        root = FolderStore(tmp_path / name)
        raw, processed = root.at("raw"), root.at("processed")
        for batch in range(batches):
            for number in range(batch, 70, batches):
                raw.write(f"landing/frog/{number}.png", png(number))
            build_processed(raw, processed, build_raw_version(raw, source).digest)
        raw_digest = build_raw_version(raw, source).digest
        digests.append((raw_digest, build_processed(raw, processed, raw_digest).digest))
    assert digests[0] == digests[1]


def test_an_image_replaced_before_it_is_packed_is_judged_by_the_next_build(
    raw, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw.write("landing/cat/a.png", png(1))
    read = FolderStore.read_verified

    def replaced(store: FolderStore, key: str, sha256: str) -> bytes:
        store.write(key, png(2))
        return read(store, key, sha256)

    with monkeypatch.context() as patch:
        patch.setattr(FolderStore, "read_verified", replaced)
        with pytest.raises(ObjectChangedError, match=r"a\.png.* was replaced"):
            build_raw_version(raw, source)
    assert build_raw_version(raw, source).manifest.rows == 81


def test_a_shard_removed_while_a_version_is_built_is_noticed(
    raw, processed, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw_digest = build_raw_version(raw, source).digest
    shard = build_processed(raw, processed, raw_digest).manifest.shards["train"][0]
    write = FolderStore.write

    def prune_first(store: FolderStore, key: str, data: bytes) -> None:
        store.delete(shard.file)
        write(store, key, data)

    with monkeypatch.context() as patch:
        patch.setattr(FolderStore, "write", prune_first)
        with pytest.raises(StoreError, match="was removed while a version that uses it was built") as caught:
            build_processed(raw, processed, raw_digest)
    assert caught.value.transient
    assert build_processed(raw, processed, raw_digest).manifest.shards["train"][0] == shard
    assert processed.exists(shard.file)


def test_many_shards_need_few_open_files(make, raw, processed, tmp_path: Path) -> None:
    source = make.parquet_source(tmp_path / "many", train=400)
    raw_digest = build_raw_version(raw, str(source)).digest
    built = build_processed(raw, processed, raw_digest, SplitConfig(max_shard_rows=1))
    whole = build_processed(raw, processed, raw_digest)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + 100, limit[1]))
    try:
        reader = open_split(processed, built.digest, "train")
        order = np.random.RandomState(0).permutation(len(reader))
        images = reader.take(order)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert len(built.manifest.shards["train"]) > 300
    assert np.array_equal(images, open_split(processed, whole.digest, "train").take(order))


def test_version_in_the_first_format_can_be_read(raw, processed, source: str) -> None:
    built = build_processed(raw, processed, build_raw_version(raw, source).digest)
    digest = write_first_kind(processed, built.digest)
    assert read_processed(processed, digest).kind == "cifar10-processed/1"
    for split in SPLIT_NAMES:
        old, new = open_split(processed, digest, split), open_split(processed, built.digest, split)
        for name in ("images", "labels", "digests", "objects", "rows"):
            assert np.array_equal(getattr(old, name), getattr(new, name))


def write_first_kind(processed: ObjectStore, digest: str) -> str:
    """The version as written by releases that kept all files of a version in its own folder."""
    manifest: dict[str, Any] = read_processed(processed, digest).model_dump(mode="json")
    manifest["kind"] = "cifar10-processed/1"
    files: dict[str, bytes] = {}

    def shard(name: str, **tensors: np.ndarray) -> dict[str, object]:
        files[name] = save({key: np.ascontiguousarray(value) for key, value in tensors.items()})
        rows = len(tensors["labels"])
        return {"file": name, "sha256": sha256_bytes(files[name]), "size": len(files[name]), "rows": rows}

    for split in SPLIT_NAMES:
        reader = open_split(processed, digest, split)
        pixels = shard(f"{split}-00000.safetensors", images=reader.images, labels=reader.labels)
        manifest["shards"][split] = [pixels] if len(reader) else []
        origins = {name: getattr(reader, name) for name in ("digests", "labels", "objects", "rows")}
        manifest["rows"][split] = shard(f"{split}.rows.safetensors", **origins)
    data = canonical_json(manifest)
    for name, content in files.items():
        processed.write(f"{sha256_bytes(data)}/{name}", content)
    processed.write(f"{sha256_bytes(data)}/{MANIFEST_FILE}", data)
    return sha256_bytes(data)
