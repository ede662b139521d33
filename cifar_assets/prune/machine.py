"""What can go from this machine: caches, what killed processes left in the temporary folder, and compute logs."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._serdes import ConfigurableClass

from cifar_assets.prune.policy import Policy, Removal, removal_of
from resources.object_store import FolderStore, ObjectStore

_TEMPORARY = "cifar-*"
"""What this project makes in the temporary folder is named like this: work folders, shards fetched from a bucket."""

_COMPUTE_LOGS = "/compute_logs/"


def temporary_files(policy: Policy) -> Iterator[Removal]:
    """Files of this user in the temporary folder that nobody used for a while. Fetched shards are fetched again."""
    for path in Path(tempfile.gettempdir()).glob(_TEMPORARY):
        if path.is_symlink() or path.lstat().st_uid != os.getuid():
            continue
        for old in [path] if not path.name.startswith("cifar-shards-") else sorted(path.iterdir()):
            used, size = _last_used(old)
            if time.time() - used >= policy.min_age.total_seconds():
                yield Removal("temporary files", str(old), "not used for a while", size, lambda old=old: _remove(old))


def downloads(policy: Policy, folder: Path) -> Iterator[Removal]:
    """Interrupted downloads that nobody continued."""
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        used, size = _last_used(path)
        if time.time() - used >= policy.min_age.total_seconds():
            yield Removal("download", str(path), "nobody continued it", size, lambda path=path: _remove(path))


def compute_logs(policy: Policy, instance: dg.DagsterInstance, root: ObjectStore) -> Iterator[Removal]:
    """Compute logs older than log_days, in the folder or bucket that the instance keeps them in."""
    store = _log_store(instance, root)
    if store is None:
        return
    for info in store.list():
        if _COMPUTE_LOGS in info.key and policy.is_old_log(info.last_modified):
            yield removal_of(store, [info], "compute log", info.key, f"older than {policy.log_days:g} days")


def _log_store(instance: dg.DagsterInstance, root: ObjectStore) -> ObjectStore | None:
    manager = instance.compute_log_manager
    settings = manager.inst_data.config_dict if isinstance(manager, ConfigurableClass) and manager.inst_data else {}
    if "base_dir" in settings:
        return FolderStore(Path(_resolved(settings["base_dir"])))
    if "bucket" in settings:
        return root.at(f"{_resolved(settings['bucket'])}/{_resolved(settings.get('prefix', 'dagster'))}")
    return None


def _resolved(value: Any) -> str:
    """A setting of dagster.yaml, which may name an environment variable."""
    return os.environ[value["env"]] if isinstance(value, dict) else str(value)


def _last_used(path: Path) -> tuple[float, int]:
    """When anything in it last changed, in seconds since the epoch, and its bytes."""
    newest, size = 0.0, 0
    for each in [path, *path.rglob("*")] if path.is_dir() else [path]:
        try:
            status = each.lstat()
        except FileNotFoundError:
            continue
        newest, size = max(newest, status.st_mtime), size + status.st_size
    return newest, size


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
