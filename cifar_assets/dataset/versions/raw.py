"""Raw dataset versions: a source and the landed data, identified by one digest."""

import json
import logging
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, Field

from cifar_assets.contracts import CLASSES, ImageRequest
from cifar_assets.dataset.consistency import check_source
from cifar_assets.dataset.formats.rows import Preparation
from cifar_assets.dataset.index import index_of
from cifar_assets.dataset.landing.join import LandingReport, join_landed
from cifar_assets.dataset.objects import RawObject, read_state
from cifar_assets.dataset.sources.download import FULL_DISK
from cifar_assets.dataset.sources.importing import import_source
from cifar_assets.dataset.versions.splits import splits_filled
from cifar_assets.manifest import Manifest
from resources.digests import canonical_json
from resources.errors import ConfigError, DataError, StoreError
from resources.object_store import ObjectStore
from resources.redaction import redacted

logger = logging.getLogger(__name__)

VERSIONS_PREFIX = "versions/"
CURRENT_KEY = "current.json"


class RawManifest(Manifest, Preparation):
    """The objects of a raw version."""

    kind: Literal["cifar10-raw/1"] = "cifar10-raw/1"
    classes: tuple[str, ...] = CLASSES
    objects: tuple[RawObject, ...] = Field(description="The source's objects in its order, then landed ones by digest.")

    @property
    def rows(self) -> int:
        """Number of images that the version uses."""
        return sum(item.used_rows for item in self.objects)

    @property
    def landed_rows(self) -> int:
        """Number of landed images that the version uses."""
        return sum(item.used_rows for item in self.objects if item.role == "landed")

    @property
    def size(self) -> int:
        """Total size of its objects in bytes."""
        return sum(item.size for item in self.objects)


@dataclass(frozen=True)
class RawVersion:
    """A published raw version, and the findings of its build."""

    digest: str
    manifest: RawManifest
    source: str
    left_out: dict[str, int] = field(default_factory=dict)
    """Source rows not used, by reason."""
    unread: dict[str, str] = field(default_factory=dict)
    """Folders and files of the source that were not read, by name, with the reason."""
    assumed: list[str] = field(default_factory=list)
    """What the data set leaves open and the source did not say, as sentences without a full stop."""
    landing: LandingReport = field(default_factory=LandingReport)


class Provenance(BaseModel):
    """The origin of a version, as first recorded. The digest does not cover it."""

    version: Literal[1] = 1
    source: str = "unknown"
    created: str = "unknown"
    landed: dict[str, list[str]] = Field(default={}, description="Landed names of the objects, by sha256.")


def build_raw_version(
    raw: ObjectStore,
    source: str,
    wanted: ImageRequest = ImageRequest(),  # noqa: B008 (it is frozen)
    *,
    digest: str | None = None,
    resize: bool = True,
) -> RawVersion:
    """Publish the version made from the source and the valid landed data.

    It becomes the current one if it can be split, which its blocking checks test as well.

    The digest is a function of these two: the order, names and number of copies of landed data do not matter. If
    `digest` is given, that earlier version becomes current instead, and neither source nor landing zone is read.

    Raises what `import_source` raises. Refused landed data is moved to `rejected/` and reported.
    """
    if digest is not None:
        make_current(raw, digest)
        return RawVersion(digest, read_raw(raw, digest), f"version {digest}")
    try:
        return _build(raw, source, wanted, resize)
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise StoreError(
            f"No space left on device for {error.filename or tempfile.gettempdir()}. Free space there, or point "
            "TMPDIR to another disk, and run again. No version was published."
        ) from error


def _build(raw: ObjectStore, source: str, wanted: ImageRequest, resize: bool) -> RawVersion:
    imported = import_source(source, raw, wanted, resize=resize)
    how = imported.how
    for sentence in imported.assumed:
        logger.info("Assumed: %s.", sentence)
    sources, left_out, known = check_source([(item, index_of(raw, item, how)) for item in imported.objects])
    landed, landing = join_landed(raw, known, how)
    manifest = RawManifest(**dict(how), objects=(*sources, *landed))
    digest = manifest.digest
    provenance = Provenance(
        source=redacted(source),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        landed={sha256: sorted(landing.names[sha256]) for sha256 in sorted(landing.names)},
    )
    raw.create(_key(digest, "provenance"), provenance.model_dump_json(indent=1).encode())
    manifest.write(raw, _key(digest, "manifest"))
    try:
        make_current(raw, digest)
    except DataError as error:
        logger.warning("The current raw version is unchanged: %s", error)
    landing.record.save(raw)
    return RawVersion(digest, manifest, redacted(source), left_out, imported.unread, imported.assumed, landing)


def read_raw(raw: ObjectStore, digest: str) -> RawManifest:
    """The manifest of a version; ObjectNotFoundError if there is none, IntegrityError if it was changed."""
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise ConfigError(f"{digest!r} is not a version digest: expected 64 lowercase hexadecimal digits.")
    missing = f"There is no raw version {digest} in {raw.uri()}. `python -m cifar_assets.dataset versions` lists them."
    return RawManifest.read(raw, _key(digest, "manifest"), digest, missing)


def current_raw_digest(raw: ObjectStore) -> str | None:
    """The version that `current.json` points to. For display and sensors only; decisions use digests."""
    if not raw.exists(CURRENT_KEY):
        return None
    try:
        return str(json.loads(raw.read(CURRENT_KEY))["digest"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{raw.uri(CURRENT_KEY)} is not a pointer to a raw version: materialize the raw dataset again."
        ) from error


def make_current(raw: ObjectStore, digest: str) -> None:
    """Make a version current. Raises DataError, without a change, if an object is missing or a split would be empty."""
    manifest = read_raw(raw, digest)
    for item in manifest.objects:
        info = raw.stat(item.key)
        if info is None or info.size != item.size:
            found = "is missing" if info is None else f"has {info.size:,} bytes instead of {item.size:,}"
            raise DataError(f"Raw version {digest} cannot be used: {raw.uri(item.key)} {found}.")
    finding = splits_filled(raw, manifest.objects, manifest)
    if not finding.passed:
        raise DataError(f"Raw version {digest} cannot be used: {finding.reason}")
    raw.write(CURRENT_KEY, canonical_json({"version": 1, "digest": digest, "manifest": _key(digest, "manifest")}))


def list_raw_digests(raw: ObjectStore) -> list[str]:
    """Digests of the published versions, sorted."""
    return [info.key.split("/")[1] for info in raw.list(VERSIONS_PREFIX) if info.key.endswith("/manifest.json")]


def list_raw_versions(raw: ObjectStore) -> dict[str, tuple[RawManifest, Provenance]]:
    """Every published version by digest, oldest first."""
    versions = {}
    for digest in list_raw_digests(raw):
        try:
            versions[digest] = read_raw(raw, digest), read_provenance(raw, digest)
        except DataError as error:
            logger.warning("Skipping a version: %s", error)
    return dict(sorted(versions.items(), key=lambda item: item[1][1].created))


def read_provenance(raw: ObjectStore, digest: str) -> Provenance:
    """The origin of a version, as far as it is known."""
    return read_state(raw, _key(digest, "provenance"), Provenance) or Provenance()


def _key(digest: str, name: str) -> str:
    return f"{VERSIONS_PREFIX}{digest}/{name}.json"
