"""How predictions are stored: a Parquet file for each part of the source's listing, and a manifest of the files.

`predictions/<source>/<model digest>/<precision>/` holds `part-*.parquet`, a note `part-*.json` on each, and
`manifest.json`. Whether a part ends after a picture depends on the picture's name, so one that is added or removed
changes only its own part.
"""

import heapq
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, Field

from cifar_assets.contracts import ImageSpec
from cifar_assets.dataset.formats.images import SOURCE_LIMITS
from cifar_assets.dataset.formats.rows import PREPARATION
from cifar_assets.dataset.objects import is_present, read_state
from cifar_assets.manifest import Manifest
from cifar_assets.model_package import ServedPrecision
from resources.digests import sha256_bytes, sha256_json
from resources.errors import IntegrityError, ObjectNotFoundError
from resources.object_store import ObjectInfo, ObjectStore

PREDICTIONS_PREFIX = "predictions/"
MANIFEST_FILE = "manifest.json"
COLUMNS: dict[str, tuple[pa.DataType, str]] = {
    "path": (pa.string(), "Name of the picture, relative to the source."),
    "sha256": (pa.string(), "Digest of the picture's file; null if it was not read."),
    "class": (pa.string(), "The most probable class; null if the picture cannot be used."),
    "confidence": (pa.float32(), "Probability of that class."),
    "probabilities": (pa.list_(pa.float32()), "Probability of each class, in the order of the manifest's `classes`."),
    "reason": (pa.string(), "Why the picture cannot be used; null if it can."),
    "model_digest": (pa.string(), "The model."),
}
Row = dict[str, Any]
"""The values of COLUMNS; those that are left out are null."""
_MEAN_ROWS, _MAX_ROWS = 2048, 16_384
"""One part in three thousand reaches the maximum, and then a change may affect the next part too."""
SHOWN = 50
"""Pictures of a part that its note names: the least certain ones, and those that cannot be used."""


class PredictionsManifest(Manifest, ImageSpec):
    """All predictions of a model for a source."""

    kind: Literal["predictions/1"] = "predictions/1"
    source: str
    model_digest: str
    precision: ServedPrecision
    rows: int
    files: dict[str, str] = Field(description="sha256 of each part, by name.")


class Part(BaseModel, frozen=True):
    """The note on a part that was stored."""

    preparation: int = PREPARATION
    listing: str = Field(description="Digest of its pictures' names, sizes and etags; empty to read them again.")
    sha256: str
    size: int = Field(description="Bytes.")
    rows: int
    counts: dict[str, int] = Field(description="Pictures by predicted class.")
    unusable: tuple[tuple[str, str], ...] = Field(description="The first of them, each with the reason.")
    uncertain: tuple[tuple[float, str, str], ...] = Field(description="Confidence, name and class, lowest first.")


@dataclass(frozen=True)
class Slice:
    """Consecutive pictures of the listing, which become one part."""

    infos: Sequence[ObjectInfo]
    name: str
    """Depends on the name before the first picture, so it stays the same while pictures are added to the part."""

    @property
    def listing(self) -> str:
        return sha256_json([[info.key, info.size, info.etag] for info in self.infos])

    def stored(self, target: ObjectStore) -> tuple[Part | None, dict[str, Row]]:
        """The note on the part if it was made from exactly this listing; otherwise its former rows by path."""
        part, file = read_state(target, f"{self.name}.json", Part), f"{self.name}.parquet"
        if part is None or part.preparation != PREPARATION:
            return None, {}
        if part.listing == self.listing and is_present(target, file, part.size):
            return part, {}
        try:
            rows = pq.read_table(io.BytesIO(target.read_verified(file, part.sha256))).to_pylist()
        except (ObjectNotFoundError, IntegrityError):
            return None, {}
        return None, {row["path"]: row for row in rows}

    def store(self, target: ObjectStore, rows: list[Row]) -> Part:
        """Store the part and then the note, by which a later run knows that it is complete."""
        buffer = io.BytesIO()
        schema = pa.schema([(name, kind) for name, (kind, _) in COLUMNS.items()])
        pq.write_table(pa.Table.from_pylist(rows, schema), buffer)
        data = buffer.getvalue()
        unusable = [(row["path"], row["reason"]) for row in rows if row.get("reason")]
        guessed = [(row["confidence"], row["path"], row["class"]) for row in rows if not row.get("reason")]
        is_final = (
            row.get("sha256") or info.size > SOURCE_LIMITS.max_bytes for info, row in zip(self.infos, rows, strict=True)
        )
        part = Part(
            listing=self.listing if all(is_final) else "",
            sha256=sha256_bytes(data),
            size=len(data),
            rows=len(rows),
            counts=Counter(name for _, _, name in guessed),
            unusable=tuple(unusable[:SHOWN]),
            uncertain=tuple(heapq.nsmallest(SHOWN, guessed)),
        )
        target.write(f"{self.name}.parquet", data)
        target.write(f"{self.name}.json", part.model_dump_json().encode())
        return part


def slices(pictures: Iterable[ObjectInfo]) -> Iterator[Slice]:
    """The listing, cut into parts of about two thousand pictures."""
    part: list[ObjectInfo] = []
    before = "start"
    for info in pictures:
        part.append(info)
        digest = sha256_bytes(info.key.encode())
        if len(part) == _MAX_ROWS or int(digest[:8], 16) % _MEAN_ROWS == 0:
            yield Slice(part, f"part-{before}")
            part, before = [], digest[:16]
    if part:
        yield Slice(part, f"part-{before}")


def publish(target: ObjectStore, manifest: PredictionsManifest) -> None:
    """Write the manifest, and remove parts of an earlier listing."""
    manifest.write(target, MANIFEST_FILE)
    for info in list(target.list("part-")):
        if f"{info.key.rpartition('.')[0]}.parquet" not in manifest.files:
            target.delete(info.key)
