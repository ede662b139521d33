"""What may be removed: models, then data versions without models, then objects without versions, then leftovers."""

import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import BaseModel, Field

from cifar_assets.contracts import TO_LABEL_PREFIX
from cifar_assets.dataset.index import INDEX_PREFIX
from cifar_assets.dataset.objects import OBJECTS_PREFIX, read_state
from cifar_assets.dataset.sources.importing import IMPORTS_PREFIX, Imports
from cifar_assets.dataset.stores import Stores
from cifar_assets.dataset.versions.processed import MANIFEST_FILE, PARTS_PREFIX, Part, read_processed
from cifar_assets.dataset.versions.raw import VERSIONS_PREFIX, current_raw_digest, read_raw
from cifar_assets.dataset.versions.shards import SHARDS_PREFIX
from cifar_assets.model_package import read_manifest
from cifar_assets.predictions.parts import PREDICTIONS_PREFIX
from resources.errors import BucketNotFoundError, DataError, ObjectNotFoundError
from resources.object_store import FolderStore, ObjectInfo, ObjectStore
from resources.object_store.folder import TEMPORARY_PREFIX

_DIGEST = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")
_DAY = re.compile(r"\d{4}-\d\d-\d\d")


class Policy(dg.Config):
    """How much history is kept, besides everything that a served, champion, registered or pinned model needs."""

    keep_versions: int = Field(
        default=5, ge=1, description="Number of newest raw versions, processed versions and models to keep, each."
    )
    min_age_hours: float = Field(
        default=24.0,
        ge=0,
        description="Nothing younger is removed. Use less than 12 only while no run is in progress: a run may use "
        "data of an earlier one.",
    )
    log_days: float = Field(default=30.0, ge=0, description="Days to keep compute logs.")
    traffic_days: float = Field(
        default=30.0, ge=0, description="Days to keep records of served traffic, and what is to be labeled."
    )
    prediction_days: float = Field(
        default=90.0, ge=0, description="Days to keep the predictions for a folder of pictures after the last run."
    )
    retire_registered: bool = Field(
        default=False,
        description="Also remove old models that are registered in MLflow, with their MLflow versions and runs, "
        "unless the version has an alias.",
    )

    def is_old(self, changed: datetime) -> bool:
        """Whether an object modified at this time is old enough to be removed."""
        return datetime.now(UTC) - changed >= timedelta(hours=self.min_age_hours)


@dataclass(frozen=True)
class Removal:
    """One item to remove; `remove` skips it if it was written again since it was listed."""

    kind: str
    name: str
    reason: str
    size: int
    """Bytes."""
    remove: Callable[[], Any] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Selection:
    """The items of one kind that a rule keeps and removes."""

    kept: set[str]
    removals: list[Removal]


def find_digests(text: str) -> set[str]:
    """Every digest in the text."""
    return set(_DIGEST.findall(text))


def prune_models(models: ObjectStore, needed: AbstractSet[str], policy: Policy) -> Selection:
    """The models to keep and to remove, with the checkpoints and messages that are no longer needed."""
    selection = _select(models, needed, policy, "model")
    groups: list[tuple[str, int, str, str]] = [
        ("checkpoints/", 1, "checkpoints", "the training was abandoned"),
        ("pipes/", 2, "messages", "the job has ended"),
    ]
    others = [
        _removal(models, infos, kind, f"{prefix}{name}", reason)
        for prefix, depth, kind, reason in groups
        for name, infos in _by_folder(models, prefix, depth).items()
        if policy.is_old(_last_change(infos))
    ]
    return Selection(selection.kept, [*selection.removals, *others])


def prune_processed(processed: ObjectStore, needed: AbstractSet[str], policy: Policy) -> Selection:
    """The processed versions to keep and to remove."""
    return _select(processed, needed, policy, "processed version")


def prune_raw(raw: ObjectStore, needed: AbstractSet[str], policy: Policy) -> Selection:
    """The raw versions to keep and to remove; the current one stays."""
    return _select(raw, {*needed, current_raw_digest(raw) or ""}, policy, "raw version", VERSIONS_PREFIX)


def data_of_models(models: ObjectStore, digests: Iterable[str]) -> set[str]:
    """Digests of the processed and raw versions that the models were made from."""
    manifests = [read_manifest(models.at(digest), digest) for digest in digests]
    return {data for manifest in manifests for data in (manifest.dataset_digest, manifest.raw_digest)}


def starts_of_models(models: ObjectStore) -> set[str]:
    """Digests of the models that the stored models of all data sets started from; `models` is the whole bucket.

    A model that is removed now keeps its start until the next pruning.
    """
    found = set[str]()
    for info in models.list():
        folder, _, name = info.key.rpartition("/")
        digest = folder.rpartition("/")[2]
        if name == MANIFEST_FILE and _DIGEST.fullmatch(digest):
            with suppress(DataError, ObjectNotFoundError):  # damaged, or removed meanwhile
                found.add(read_manifest(models.at(folder), digest).start_model or "")
    return found


def raw_of_processed(processed: ObjectStore, digests: Iterable[str]) -> set[str]:
    """Digests of the raw versions that the processed versions were made from."""
    return {read_processed(processed, digest).raw_digest for digest in digests}


def orphans(stores: Stores, processed: Iterable[str], raw: Iterable[str], policy: Policy) -> Iterator[Removal]:
    """Shards and objects that none of these versions uses, and what refers to objects that no longer exist."""
    shards = {shard.file for digest in processed for shard in read_processed(stores.processed, digest).files}
    objects = {item.key for digest in raw for item in read_raw(stores.raw, digest).objects}
    sha256s = {key.removeprefix(OBJECTS_PREFIX).partition(".")[0] for key in objects}

    def is_stale(store: ObjectStore, kind: type[BaseModel], names: Callable[[Any], set[str]]) -> Any:
        """Whether a record refers to an object that no longer exists, or cannot be read."""

        def check(info: ObjectInfo) -> bool:
            note = read_state(store, info.key, kind)
            return note is None or not names(note) <= shards | objects

        return check

    parts = is_stale(stores.processed, Part, lambda part: {shard.file for shard in part.all_shards})
    imports = is_stale(stores.raw, Imports, lambda imported: {item.key for item in imported.objects})
    rules: list[tuple[ObjectStore, str, str, Callable[[ObjectInfo], bool]]] = [
        (stores.processed, SHARDS_PREFIX, "shard", lambda info: info.key not in shards),
        (stores.processed, PARTS_PREFIX, "part", parts),
        (stores.raw, OBJECTS_PREFIX, "object", lambda info: info.key not in objects),
        (stores.raw, INDEX_PREFIX, "index", lambda info: info.key.removeprefix(INDEX_PREFIX)[:64] not in sha256s),
        (stores.raw, IMPORTS_PREFIX, "import", imports),
    ]
    former = [(stores.models, "jobs/"), (stores.processed, "built/"), (stores.raw, "packs/")]
    for store, prefix in (*former, (stores.raw, "landing-memory.json")):  # earlier releases wrote them
        rules.append((store, prefix, "former note", lambda info: True))
    for store, prefix, kind, is_unused in rules:
        for info in store.list(prefix):
            if policy.is_old(info.last_modified) and is_unused(info):
                yield _removal(store, [info], kind, info.key, "no kept version uses it")


def leftovers(policy: Policy, root: ObjectStore) -> Iterator[Removal]:
    """This user's temporary files, and partial files that killed writers left in a folder store, not used recently."""
    store = root.local_path("")
    paths = [path for path in store.rglob(f"{TEMPORARY_PREFIX}*") if path.is_file()] if store else []
    for path in Path(tempfile.gettempdir()).glob("cifar-*"):
        if not path.is_symlink() and path.lstat().st_uid == os.getuid():
            paths += path.iterdir() if path.name.startswith("cifar-shards-") else [path]
    for path in paths:
        found = [each.lstat() for each in (path, *path.rglob("*")) if os.path.lexists(each)]
        if found and policy.is_old(datetime.fromtimestamp(max(each.st_mtime for each in found), UTC)):
            size = sum(each.st_size for each in found)
            yield Removal("temporary file", str(path), "not used recently", size, lambda path=path: _delete(path))


def predictions(policy: Policy, processed: ObjectStore) -> Iterator[Removal]:
    """Predictions of a model for a source that no run made or confirmed for prediction_days."""
    for name, infos in _by_folder(processed, PREDICTIONS_PREFIX, 3).items():
        yield from _expired(processed, infos, "predictions", f"{PREDICTIONS_PREFIX}{name}", policy.prediction_days)


def compute_logs(policy: Policy, instance: dg.DagsterInstance, root: ObjectStore) -> Iterator[Removal]:
    """Compute logs older than log_days, in the folder or bucket set in the instance's dagster.yaml."""
    data = getattr(instance.compute_log_manager, "inst_data", None)
    settings = {
        name: os.environ[value["env"]] if isinstance(value, dict) else str(value)
        for name, value in (data.config_dict if data else {}).items()
        if name in ("base_dir", "bucket", "prefix")
    }
    store: ObjectStore | None = FolderStore(Path(settings["base_dir"])) if "base_dir" in settings else None
    if "bucket" in settings:
        store = root.at(f"{settings['bucket']}/{settings.get('prefix', 'dagster')}")
    if store is None:
        return
    for info in store.list():
        if "/compute_logs/" in info.key:
            yield from _expired(store, [info], "compute log", info.key, policy.log_days)


def traffic(policy: Policy, store: ObjectStore, raw: ObjectStore) -> Iterator[Removal]:
    """Records of served traffic, and what is to be labeled, older than traffic_days. The bucket may not exist."""
    for name, infos in _by_folder(raw, TO_LABEL_PREFIX, 1).items():  # as a whole: labels are newer than pictures
        yield from _expired(raw, infos, "batch to label", f"{TO_LABEL_PREFIX}{name}", policy.traffic_days)
    end = datetime.now(UTC) - timedelta(days=policy.traffic_days)
    with suppress(BucketNotFoundError):
        for day, infos in groupby(store.list(), lambda info: info.key.partition("/")[0]):
            old = [info for info in infos if info.last_modified <= end]
            if old and _DAY.fullmatch(day):  # other folders are of other data sets
                yield from _expired(store, old, "traffic records", day, policy.traffic_days)


def _expired(store: ObjectStore, infos: list[ObjectInfo], kind: str, name: str, days: float) -> Iterator[Removal]:
    """The group, if nothing of it was written for so long."""
    if datetime.now(UTC) - _last_change(infos) >= timedelta(days=days):
        yield _removal(store, infos, kind, name, f"older than {days:g} days")


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):  # gone, or of another user of a shared store
            path.unlink()


def _select(store: ObjectStore, needed: AbstractSet[str], policy: Policy, kind: str, prefix: str = "") -> Selection:
    """Keep the newest folders with a manifest, the needed ones, and all recent ones."""
    folders = {name: infos for name, infos in _by_folder(store, prefix, 1).items() if _DIGEST.fullmatch(name)}
    written = {
        name: info.last_modified
        for name, infos in folders.items()
        for info in infos
        if info.key == f"{prefix}{name}/{MANIFEST_FILE}"
    }
    newest = sorted(written, key=lambda name: written[name])[-policy.keep_versions :]
    young = {name for name in folders if not policy.is_old(_last_change(folders[name]))}
    kept = written.keys() & {*newest, *needed, *young}
    removals = []
    for name in folders.keys() - kept - young:
        reason = f"not one of the newest {policy.keep_versions}" if name in written else "it was never completed"
        removals.append(_removal(store, folders[name], kind, name, reason))
    return Selection(kept, removals)


def _by_folder(store: ObjectStore, prefix: str, depth: int) -> dict[str, list[ObjectInfo]]:
    """The objects below the prefix, grouped by their first `depth` folders."""
    folders: defaultdict[str, list[ObjectInfo]] = defaultdict(list)
    for info in store.list(prefix):
        parts = info.key.removeprefix(prefix).split("/")
        if len(parts) > depth:
            folders["/".join(parts[:depth])].append(info)
    return folders


def _last_change(infos: Iterable[ObjectInfo]) -> datetime:
    return max(info.last_modified for info in infos)


def _removal(store: ObjectStore, infos: Iterable[ObjectInfo], kind: str, name: str, reason: str) -> Removal:
    """Removes a group of objects, the manifest first: the others do not count without it. Stops at a kept object."""
    found = sorted(infos, key=lambda info: not info.key.endswith(f"/{MANIFEST_FILE}"))

    def remove() -> None:
        for info in found:
            if not _remove_unchanged(store, info):
                return

    return Removal(kind, name, reason, sum(info.size for info in found), remove)


def _remove_unchanged(store: ObjectStore, info: ObjectInfo) -> bool:
    """Delete an object that was not written or touched since it was listed; False if it is kept."""
    now = store.stat(info.key)
    if now is None:
        return True
    # A listing has fractions of a second; a stat may not.
    if int(now.last_modified.timestamp()) != int(info.last_modified.timestamp()):
        return False
    return store.delete(info.key, info.etag)
