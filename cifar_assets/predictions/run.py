"""Runs a model over all pictures of a folder or prefix. A run that was interrupted continues with the next part."""

import heapq
import math
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TypeVar
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from cifar_assets.contracts import ImageSpec
from cifar_assets.cpus import available_cpus
from cifar_assets.dataset.formats.images import SOURCE_LIMITS, ImageTooLargeError, check_size, prepare_image
from cifar_assets.dataset.formats.names import PICTURE_SUFFIXES, suffix_of
from cifar_assets.dataset.objects import printable, unlisted
from cifar_assets.dataset.progress import report
from cifar_assets.dataset.sheet import captioned_sheet
from cifar_assets.model_package import ServedPrecision, read_manifest
from cifar_assets.predictions.parts import (
    PREDICTIONS_PREFIX,
    SHOWN,
    Part,
    PredictionsManifest,
    Row,
    Slice,
    publish,
    slices,
)
from cifar_assets.serving.classifier import Classifier, load_classifier, softmax
from resources.digests import sha256_bytes
from resources.errors import ConfigError, ExplainedError, ObjectChangedError, ObjectNotFoundError, StoreError
from resources.object_store import FolderStore, ObjectInfo, ObjectStore, open_store

_READERS = 16
"""Threads that fetch pictures from a store that is not a folder, and pictures that each batch fetches ahead."""
_BATCH_PIXELS = 64 * 32 * 32
_LARGE_PICTURE = Lock()
"""Held while a picture over the limits of the service is decoded: each may take several hundred megabytes."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Predictions:
    """All predictions of a model for a source, stored at `target`, and what they say."""

    manifest: PredictionsManifest
    source: ObjectStore
    target: ObjectStore
    counts: Mapping[str, int]
    """Pictures by predicted class."""
    uncertain: list[tuple[float, str, str]]
    """Confidence, name and class of the least certain pictures."""
    unusable: list[tuple[str, str]]
    """The first pictures that cannot be used, with the reason."""
    unread: Mapping[str, str]
    """What the listing of a local folder leaves out, with the reason."""
    num_predicted: int
    """Pictures on which this run ran the model."""
    seconds: float

    def sheet(self) -> bytes:
        """A PNG of the least certain pictures. One that was removed meanwhile stays white."""

        def pixels(name: str) -> NDArray[np.uint8] | None:
            try:
                return _decode(self.source.read(name), self.manifest)
            except ExplainedError:
                return None

        captions = [f"{label} {confidence:.0%}" for confidence, _, label in self.uncertain]
        return captioned_sheet([pixels(name) for _, name, _ in self.uncertain], captions)


def predict(
    address: str,
    models: ObjectStore,
    processed: ObjectStore,
    model_digest: str,
    precision: ServedPrecision,
    *,
    public_keys: str | None = None,
    on_part: Callable[[int, int], None] = lambda done, total: None,
) -> Predictions:
    """Classify the pictures at a path or s3:// address that are not classified yet, part by part.

    `on_part` gets the number of pictures so far, and in total. Raises ConfigError if the address has no pictures,
    StoreError when a store does not respond or refuses access; what was stored until then is not repeated.
    """
    started = time.monotonic()
    source = open_store(address) if "://" in address else FolderStore(Path(address).expanduser())
    total = sum(1 for _ in _pictures(source))
    if not total:
        raise ConfigError(f"{source.uri()} has no pictures: expected a folder or prefix with *.jpg or *.png files.")
    package = models.at(model_digest)
    images = read_manifest(package, model_digest)
    batch_images = max(1, _BATCH_PIXELS // images.image_size**2)
    model = load_classifier(
        package.uri(), model_digest, precision, public_key=public_keys or "", num_threads=1, batch_images=batch_images
    )
    target = processed.at(f"{PREDICTIONS_PREFIX}{_name_of(source)}/{model_digest}/{precision}")
    run = _Run(source, target, model, model_digest, batch_images)
    parts: dict[str, Part] = {}
    done = 0
    for name, part in run.parts():
        parts[f"{name}.parquet"] = part
        done += part.rows
        report("Pictures classified", done, total)
        on_part(done, total)
    manifest = PredictionsManifest(
        source=source.uri(),
        model_digest=model_digest,
        precision=precision,
        **dict(images.spec),
        rows=done,
        files={file: part.sha256 for file, part in parts.items()},
    )
    publish(target, manifest)
    return Predictions(
        manifest=manifest,
        source=source,
        target=target,
        counts=sum((Counter(part.counts) for part in parts.values()), Counter[str]()),
        uncertain=heapq.nsmallest(SHOWN, (each for part in parts.values() for each in part.uncertain)),
        unusable=[each for part in parts.values() for each in part.unusable][:SHOWN],
        unread=unlisted(source, ""),
        num_predicted=run.num_predicted,
        seconds=time.monotonic() - started,
    )


@dataclass(frozen=True)
class _Batch:
    """Consecutive pictures of a part; none if the part is stored. `before` are the part's former rows."""

    part: Slice
    stored: Part | None
    before: Mapping[str, Row]
    infos: Iterable[ObjectInfo] = ()
    ends_part: bool = True


class _Run:
    """Classifies batches in threads. Each runs the model on one core, so that cores do not wait for each other."""

    def __init__(
        self, source: ObjectStore, target: ObjectStore, model: Classifier, model_digest: str, batch_images: int
    ):
        self._source, self._target, self._model = source, target, model
        self._model_digest, self._batch_images = model_digest, batch_images
        self._is_folder = source.local_path("") is not None
        self._fetchers = ThreadPoolExecutor(_READERS)
        self.num_predicted = 0

    def parts(self) -> Iterator[tuple[str, Part]]:
        """Name and note of the parts in order: those that are stored, and new ones once they are stored."""
        num_threads = math.ceil(available_cpus()) * (1 if self._is_folder else 2)  # some wait for the store
        pool = ThreadPoolExecutor(num_threads)
        try:
            rows: list[Row] = []
            for batch, found, number in _ahead(pool, self._classify, self._batches(), 2 * num_threads):
                rows += found
                self.num_predicted += number
                if batch.ends_part:
                    yield batch.part.name, batch.stored or batch.part.store(self._target, rows)
                    rows = []
        finally:
            pool.shutdown(cancel_futures=True)
            self._fetchers.shutdown()

    def _batches(self) -> Iterator[_Batch]:
        for part in slices(_pictures(self._source)):
            stored, before = part.stored(self._target)
            if stored:
                yield _Batch(part, stored, before)
                continue
            for start in range(0, len(part.infos), self._batch_images):
                end = start + self._batch_images
                yield _Batch(part, None, before, part.infos[start:end], end >= len(part.infos))

    def _classify(self, batch: _Batch) -> tuple[_Batch, list[Row], int]:
        """The batch, a row for each picture, and the number of pictures on which the model ran."""
        rows: list[Row] = []
        new: list[Row] = []
        images: list[NDArray[np.uint8]] = []
        read = map(self._read, batch.infos)
        if not self._is_folder:
            read = _ahead(self._fetchers, self._read, batch.infos, _READERS)
        for info, data in zip(batch.infos, read, strict=True):
            row: Row = {"path": info.key, "model_digest": self._model_digest}
            rows.append(row)
            try:
                if isinstance(data, ExplainedError):
                    raise data
                row["sha256"] = sha256_bytes(data)
                before = batch.before.get(info.key, {})
                if before.get("sha256") == row["sha256"]:
                    row |= before
                    continue
                images.append(_decode(data, self._model.manifest))
                new.append(row)
            except ExplainedError as error:
                row["reason"] = str(error)
        if new:
            found = softmax(self._model.run(np.stack(images))).astype(np.float32)
            for row, probabilities in zip(new, found, strict=True):
                row |= self._answer(probabilities)
        return batch, rows, len(new)

    def _read(self, info: ObjectInfo) -> bytes | ExplainedError:
        """The picture's file, or why it cannot be used. StoreError if the store is at fault."""
        try:
            check_size(info.size, SOURCE_LIMITS)
            return self._source.read(info.key)
        except (ImageTooLargeError, ObjectNotFoundError, ObjectChangedError) as error:
            return error
        except StoreError as error:
            if error.transient or not self._is_folder:  # such as a missing permission
                raise
            return error

    def _answer(self, probabilities: NDArray[np.float32]) -> Row:
        if not np.isfinite(probabilities).all():
            return {"reason": "the model's answer is not finite"}
        label = int(probabilities.argmax())
        return {
            "class": self._model.manifest.classes[label],
            "confidence": float(probabilities[label]),
            "probabilities": probabilities,
        }


def _decode(data: bytes, form: ImageSpec) -> NDArray[np.uint8]:
    try:
        return prepare_image(data, form.image_size, form.fit)
    except ImageTooLargeError:
        with _LARGE_PICTURE:
            return prepare_image(data, form.image_size, form.fit, limits=SOURCE_LIMITS)


def _pictures(source: ObjectStore) -> Iterator[ObjectInfo]:
    for info in source.list():
        is_picture = suffix_of(info.key) in PICTURE_SUFFIXES and "/." not in f"/{info.key}"
        if is_picture and printable(info.key) == info.key:
            yield info


def _name_of(source: ObjectStore) -> str:
    """A readable name, with part of the address's digest, which makes it unique."""
    word = re.sub(r"[^a-z0-9]+", "-", unquote(source.uri()).rstrip("/").rpartition("/")[2].lower()).strip("-")[:40]
    return f"{word or 'source'}-{sha256_bytes(source.uri().encode())[:12]}"


def _ahead(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], number: int) -> Iterator[R]:
    """The results in order, of which at most `number` are computed ahead."""
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > number:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
