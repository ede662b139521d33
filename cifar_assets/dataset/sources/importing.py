"""Imports, validates and stores raw data: the official archive, a path or bucket, or data drawn from a seed."""

import logging
import tarfile
import tempfile
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from cifar_assets.dataset.index import load_index, read_index, save_index
from cifar_assets.dataset.objects import RawObject, is_stored, read_state, store_object
from cifar_assets.dataset.sources.download import OFFICIAL_MD5, OFFICIAL_URL, split_digest
from cifar_assets.dataset.sources.files import SourceFile, source_files
from resources.digests import sha256_file, sha256_json
from resources.errors import DataError
from resources.object_store import ObjectStore
from resources.redaction import redacted

logger = logging.getLogger(__name__)

IMPORTS_PREFIX = "imports/"
_SHOWN_REFUSALS = 5


class Imports(BaseModel):
    """The result of an import. Stored for an address with a digest, so that it is not downloaded again."""

    version: Literal[1] = 1
    objects: tuple[RawObject, ...]
    unread: dict[str, str] = Field(
        default={}, description="Folders and files that were not read, by name, with the reason."
    )


def import_source(source: str, raw: ObjectStore, *, resize: bool = False) -> Imports:
    """Validate the source and store its objects under their digests; nothing of an invalid file is stored.

    `source` is 'download', 'synthetic' or 'synthetic:<seed>', a path, or an s3:// or http(s):// address. A file's
    address may end in `#md5=...` or `#sha256=...`, which the file must match. Importing data that is already stored
    does not store it again. Raises ConfigError for a source that is invalid or does not exist, DataError (naming file
    and row) for a damaged one.
    """
    address = f"{OFFICIAL_URL}#md5={OFFICIAL_MD5}" if source == "download" else source
    base, digest = split_digest(address)
    is_pinned_url = digest and base.startswith(("http://", "https://"))
    key = f"{IMPORTS_PREFIX}{sha256_json(address)}.json"
    known = read_state(raw, key, Imports) if is_pinned_url else None
    if known and all(is_stored(raw, item.key, item.sha256, item.size) for item in known.objects):
        logger.info("%s is already stored and is not downloaded again.", redacted(source))
        return known
    unread: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="cifar-source-") as work:
        files = source_files(address, Path(work), unread)
        objects = tuple([_import_file(file, raw, resize, unread) for file in files])
    imported = Imports(objects=objects, unread=unread)
    if is_pinned_url:
        raw.write(key, imported.model_dump_json().encode())
    return imported


def _import_file(file: SourceFile, raw: ObjectStore, resize: bool, unread: dict[str, str]) -> RawObject:
    logger.info("Reading %s.", file.name)
    sha256 = sha256_file(file.path)
    known = index = load_index(raw, sha256, file.split, resize)
    if index is None:
        index = read_index(file.path, file.format, file.split, file.name, resize=resize)
    if index.refused:  # or by the stored index of a landed file with the same bytes
        raise DataError(_refusal(file, index.refused, len(index)))
    if not len(index):
        raise DataError(f"{file.name} has no images.")
    unread.update({f"{file.name}, member {member}": reason for member, reason in index.unread.items()})
    key, size, rows = store_object(raw, file.path, sha256, file.suffix), file.path.stat().st_size, len(index)
    if known is None:
        save_index(raw, sha256, file.split, resize, index)
    return RawObject(key=key, sha256=sha256, size=size, format=file.format, role="source", split=file.split, rows=rows)


def _refusal(file: SourceFile, refused: dict[int, str], rows: int) -> str:
    names = [f"row {row}" for row in range(rows)]
    if file.format == "images":
        with tarfile.open(file.path) as archive:
            names = archive.getnames()
    shown = "; ".join(f"{names[row]}: {refused[row]}" for row in list(refused)[:_SHOWN_REFUSALS])
    return (
        f"{file.name}: {len(refused)} of {rows} rows cannot be used, starting with {shown}. Correct them in the source."
    )
