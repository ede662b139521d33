"""What can go from the buckets: models first, then data versions that no model needs, then what no version needs."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from cifar_assets.dataset.index import INDEX_PREFIX
from cifar_assets.dataset.landing.packs import PACKS_PREFIX, PackState
from cifar_assets.dataset.objects import OBJECTS_PREFIX, read_state
from cifar_assets.dataset.sources.importing import IMPORTS_PREFIX, Imports
from cifar_assets.dataset.stores import Stores
from cifar_assets.dataset.versions.parts import PARTS_PREFIX, Part
from cifar_assets.dataset.versions.processed import MANIFEST_FILE, read_processed
from cifar_assets.dataset.versions.raw import VERSIONS_PREFIX, current_raw_digest, read_raw
from cifar_assets.dataset.versions.shards import SHARDS_PREFIX
from cifar_assets.model_package import read_manifest
from cifar_assets.prune.policy import Policy, Removal, removal_of
from resources.object_store import ObjectInfo, ObjectStore

PINS_PREFIX = "pinned/"
"""In the models bucket: one object per digest of a model or data version that is never removed."""

_CHECKPOINTS_PREFIX = "checkpoints/"
_JOBS_PREFIX = "jobs/"
_MESSAGES_PREFIX = "pipes/"
_FORMER_PREFIXES = ("built/",)
"""Of the processed bucket: what earlier releases kept there and nothing reads."""

_DIGEST = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")

Group = list[ObjectInfo]


@dataclass(frozen=True)
class Selection:
    """What a rule keeps and removes of one kind of thing."""

    kept: set[str]
    removals: list[Removal]


def pins(models: ObjectStore) -> set[str]:
    """Digests that a person pinned."""
    return {info.key.removeprefix(PINS_PREFIX) for info in models.list(PINS_PREFIX)}


def prune_models(models: ObjectStore, needed: Mapping[str, str], policy: Policy) -> Selection:
    """The models to keep and to remove, with checkpoints, results and messages that nobody waits for."""
    folders = _by_folder(models, _digest_of)
    selection = _select(models, folders, needed, policy, "model")
    others = [
        *_abandoned(models, _CHECKPOINTS_PREFIX, 2, policy, "checkpoints", "the training was given up"),
        *_abandoned(models, _MESSAGES_PREFIX, 3, policy, "messages", "the job has ended"),
    ]
    for info in models.list(_JOBS_PREFIX):
        digests = find_digests(models.read(info.key).decode(errors="replace"))
        if policy.is_old(info.last_modified) and not digests & selection.kept:
            others.append(removal_of(models, [info], "result", info.key, "its model is not kept"))
    return Selection(selection.kept, [*selection.removals, *others])


def prune_processed(processed: ObjectStore, needed: Mapping[str, str], policy: Policy) -> Selection:
    """The processed versions to keep and to remove."""
    folders = _by_folder(processed, _digest_of)
    return _select(processed, folders, needed, policy, "processed version")


def prune_raw(raw: ObjectStore, needed: Mapping[str, str], policy: Policy) -> Selection:
    """The raw versions to keep and to remove."""
    folders = _by_folder(raw, lambda key: "/".join(key.split("/")[:2]), VERSIONS_PREFIX)
    current = current_raw_digest(raw)
    wanted = {f"{VERSIONS_PREFIX}{digest}": why for digest, why in needed.items()}
    if current:
        wanted.setdefault(f"{VERSIONS_PREFIX}{current}", "current")
    selection = _select(raw, folders, wanted, policy, "raw version")
    return Selection({folder.rpartition("/")[2] for folder in selection.kept}, selection.removals)


def data_of_models(stores: Stores, digests: Iterable[str]) -> dict[str, str]:
    """Digests of the data versions that the models came from, and which model it is."""
    found: dict[str, str] = {}
    for digest in digests:
        manifest = read_manifest(stores.models.at(digest), digest)
        for data in (manifest.dataset_digest, manifest.raw_digest):
            found.setdefault(data, f"of model {digest[:12]}")
    return found


def raw_of_processed(processed: ObjectStore, digests: Iterable[str]) -> dict[str, str]:
    """Digests of the raw versions that the processed versions came from."""
    return {read_processed(processed, digest).raw_digest: f"of processed version {digest[:12]}" for digest in digests}


def orphans(stores: Stores, processed: Iterable[str], raw: Iterable[str], policy: Policy) -> Iterator[Removal]:
    """Shards and objects that none of these versions uses, and notes about what is not there any more."""
    shards = {shard.file for digest in processed for shard in read_processed(stores.processed, digest).files}
    objects = {item.key for digest in raw for item in read_raw(stores.raw, digest).objects}
    sha256s = {key.removeprefix(OBJECTS_PREFIX).partition(".")[0] for key in objects}
    why = "no version that is kept uses it"

    def unused_part(info: ObjectInfo) -> bool:
        part = read_state(stores.processed, info.key, Part)
        return part is None or any(shard.file not in shards for shard in part.all_shards)

    def unused_pack(info: ObjectInfo) -> bool:
        pack = read_state(stores.raw, info.key, PackState)
        return pack is None or pack.item.key not in objects

    def unused_import(info: ObjectInfo) -> bool:
        imports = read_state(stores.raw, info.key, Imports)
        return imports is None or any(item.key not in objects for item in imports.objects)

    rules = [
        (stores.processed, SHARDS_PREFIX, "shard", lambda info: info.key not in shards),
        (stores.processed, PARTS_PREFIX, "part", unused_part),
        *((stores.processed, prefix, "former note", lambda info: True) for prefix in _FORMER_PREFIXES),
        (stores.raw, OBJECTS_PREFIX, "object", lambda info: info.key not in objects),
        (stores.raw, INDEX_PREFIX, "index", lambda info: info.key.removeprefix(INDEX_PREFIX)[:64] not in sha256s),
        (stores.raw, PACKS_PREFIX, "pack", unused_pack),
        (stores.raw, IMPORTS_PREFIX, "import", unused_import),
    ]
    for store, prefix, kind, is_unused in rules:
        for info in store.list(prefix):
            if policy.is_old(info.last_modified) and is_unused(info):
                yield removal_of(store, [info], kind, info.key, why)


def _select(
    store: ObjectStore,
    folders: Mapping[str, Group],
    needed: Mapping[str, str],
    policy: Policy,
    kind: str,
) -> Selection:
    """Keep the newest folders with a manifest, those needed, and all that is young."""
    written = {
        folder: info.last_modified
        for folder, infos in folders.items()
        for info in infos
        if info.key == f"{folder}/{MANIFEST_FILE}"
    }
    newest = sorted(written, key=lambda folder: written[folder], reverse=True)[: policy.keep_versions]
    kept = {folder for folder in written if folder in needed or folder in newest}
    removals = []
    for folder, infos in folders.items():
        if folder in kept:
            continue
        if not policy.is_old(max(info.last_modified for info in infos)):
            kept |= {folder} & written.keys()
            continue
        reason = f"not one of the newest {policy.keep_versions}" if folder in written else "it was never finished"
        removals.append(removal_of(store, infos, kind, folder.rpartition("/")[2], reason, f"{folder}/{MANIFEST_FILE}"))
    return Selection(kept, removals)


def _abandoned(
    store: ObjectStore, prefix: str, depth: int, policy: Policy, kind: str, reason: str
) -> Iterator[Removal]:
    folders = _by_folder(store, lambda key: "/".join(key.split("/")[:depth]), prefix)
    for folder, infos in folders.items():
        if policy.is_old(max(info.last_modified for info in infos)):
            yield removal_of(store, infos, kind, folder, reason)


def find_digests(text: str) -> set[str]:
    """Every digest that the text names."""
    return set(_DIGEST.findall(text))


def _digest_of(key: str) -> str | None:
    folder = key.partition("/")[0]
    return folder if _DIGEST.fullmatch(folder) else None


def _by_folder(store: ObjectStore, folder_of: Callable[[str], str | None], prefix: str = "") -> dict[str, Group]:
    folders: defaultdict[str, Group] = defaultdict(list)
    for info in store.list(prefix):
        folder = folder_of(info.key)
        if folder:
            folders[folder].append(info)
    return dict(folders)
