"""Imports, validates and stores raw data: the official archive, a path or bucket, or data drawn from a seed."""

import logging
import tarfile
import tempfile
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from cifar_assets.contracts import ImageRequest
from cifar_assets.dataset.formats.rows import Preparation
from cifar_assets.dataset.formats.survey import settle
from cifar_assets.dataset.index import load_index, read_index, save_index, save_survey, survey_of
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

    version: Literal[2] = 2
    objects: tuple[RawObject, ...]
    how: Preparation = Field(description="The classes and the form of the images.")
    assumed: list[str] = Field(default=[], description="What the request left open and the source did not say.")
    unread: dict[str, str] = Field(
        default={}, description="Folders and files that were not read, by name, with the reason."
    )


def import_source(
    source: str,
    raw: ObjectStore,
    wanted: ImageRequest = ImageRequest(),  # noqa: B008 (it is frozen)
    *,
    resize: bool = False,
) -> Imports:
    """Validate the source and store its objects under their digests; nothing of an invalid file is stored.

    What the request leaves open is settled by the first file, in class folders by the first thousands of pictures, and
    for labels without names by all files; the other files must agree. `source` is 'download', 'synthetic' or
    'synthetic:<seed>', a path, or an s3:// or http(s):// address. A file's address may end in `#md5=...` or
    `#sha256=...`, which the file must match. Importing data that is already stored does not store it again. Raises
    ConfigError for a source that is invalid or does not exist, DataError (naming file and row) for a damaged one, or
    one of other classes.
    """
    address = f"{OFFICIAL_URL}#md5={OFFICIAL_MD5}" if source == "download" else source
    base, digest = split_digest(address)
    is_url = base.startswith(("http://", "https://"))
    is_pinned_url = digest and is_url
    key = f"{IMPORTS_PREFIX}{sha256_json([address, wanted.model_dump(mode='json'), resize])}.json"
    known = read_state(raw, key, Imports) if is_pinned_url else None
    if known and all(is_stored(raw, item.key, item.sha256, item.size) for item in known.objects):
        logger.info("%s is already stored and is not downloaded again.", redacted(source))
        return known
    unread: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="cifar-source-") as work:
        objects, how, assumed = [], None, list[str]()
        for file in source_files(address, Path(work), unread, wanted.classes):
            logger.info("Reading %s.", file.name)
            sha256 = sha256_file(file.path)
            if how is None:
                survey = survey_of(raw, file.path, sha256, file.format, file.name)
                labels = survey.highest_label
                if labels >= 0 and not wanted.classes and file.format == "parquet" and not is_url:
                    labels = _highest_label(address, raw)
                found = survey.model_copy(update={"highest_label": labels})
                images, assumed = settle(wanted, found, file.classes, file.name, file.format)
                how = Preparation(**dict(images), resize=resize)
                objects.append(_import_file(file, sha256, raw, how, unread))
                save_survey(raw, sha256, survey)
            else:
                objects.append(_import_file(file, sha256, raw, how, unread))
        if how is None:
            raise DataError(f"{redacted(source)} has no images.")
    if not any(item.split in ("test", "mixed") for item in objects):
        assumed.append("no test split: a part of the images is held out for testing")
    imported = Imports(objects=tuple(objects), how=how, unread=unread, assumed=assumed)
    if is_pinned_url:
        raw.write(key, imported.model_dump_json().encode())
    return imported


def _highest_label(address: str, raw: ObjectStore) -> int:
    """Of all files of a source without class names: a file may be sorted by label."""
    with tempfile.TemporaryDirectory(prefix="cifar-source-") as work:
        files = source_files(address, Path(work), {}, None)
        surveys = (survey_of(raw, file.path, sha256_file(file.path), file.format, file.name) for file in files)
        return max(survey.highest_label for survey in surveys)


def _import_file(
    file: SourceFile, sha256: str, raw: ObjectStore, how: Preparation, unread: dict[str, str]
) -> RawObject:
    known = index = load_index(raw, sha256, file.split, how)
    if index is None:
        index = read_index(file.path, file.format, file.split, file.name, how)
    if index.refused:  # or by the stored index of a landed file with the same bytes
        raise DataError(_refusal(file, index.refused, len(index)))
    if not len(index):
        raise DataError(f"{file.name} has no images.")
    unread.update({f"{file.name}, member {member}": reason for member, reason in index.unread.items()})
    key, size, rows = store_object(raw, file.path, sha256, file.suffix), file.path.stat().st_size, len(index)
    if known is None:
        save_index(raw, sha256, file.split, how, index)
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
