"""Small generated datasets in every format."""

import gzip
import io
import json
import pickle
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from cifar_assets.contracts import CLASSES
from cifar_assets.dataset.formats import isolated
from cifar_assets.dataset.formats.archive import BATCHES
from cifar_assets.dataset.formats.rows import Preparation
from resources.object_store import FolderStore

HOW = Preparation(classes=CLASSES, resize=True)
AS_IS = Preparation(classes=CLASSES, resize=False)

Images = NDArray[np.uint8]


class Maker:
    """Writes valid data, which tests then damage."""

    rows = 20

    def images(self, count: int, seed: int = 0) -> Images:
        return np.random.RandomState(seed).randint(0, 256, (count, 3, 32, 32)).astype(np.uint8)

    def labels(self, count: int) -> NDArray[np.int64]:
        return np.arange(count) % len(CLASSES)

    def png(self, image: Images, **options: Any) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(buffer, "PNG", **options)
        return buffer.getvalue()

    def python_members(self, seed: int = 0) -> dict[str, bytes]:
        """Six batches of 20 rows and the meta file, by name in the archive."""
        members = {"batches.meta": pickle.dumps({"label_names": list(CLASSES), "num_vis": 3072}, protocol=2)}
        for number, name in enumerate(BATCHES):
            images = self.images(self.rows, seed * 100 + number)
            batch = {b"data": images.reshape(self.rows, -1), b"labels": self.labels(self.rows).tolist()}
            members[name] = pickle.dumps(batch, protocol=2)
        return {f"cifar-10-batches-py/{name}": data for name, data in members.items()}

    def binary_members(self, seed: int = 0) -> dict[str, bytes]:
        members = {"batches.meta.txt": "\n".join(CLASSES).encode() + b"\n\n"}
        for number, name in enumerate(BATCHES):
            images = self.images(self.rows, seed * 100 + number).reshape(self.rows, -1)
            labels = self.labels(self.rows).astype(np.uint8)[:, None]
            members[f"{name}.bin"] = np.concatenate([labels, images], axis=1).tobytes()
        return {f"cifar-10-batches-bin/{name}": data for name, data in members.items()}

    def tar(self, members: dict[str, bytes], extra: list[tuple[tarfile.TarInfo, bytes]] | None = None) -> bytes:
        """A tar.gz with the members, followed by the extra ones unchanged."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
            for info, data in extra or []:
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return gzip.compress(buffer.getvalue(), 1, mtime=0)

    def archive(self, seed: int = 0) -> bytes:
        return self.tar(self.python_members(seed))

    def parquet(self, images: Images, labels: list[int | None] | NDArray[np.int64]) -> bytes:
        return self.encoded_parquet([self.png(image) for image in images], list(labels))

    def names(self, classes: Sequence[str] = CLASSES, column: str = "label") -> dict[str, str]:
        """Metadata of a Parquet file that declares its classes."""
        feature = {"names": list(classes), "_type": "ClassLabel"}
        return {"huggingface": json.dumps({"info": {"features": {column: feature}}})}

    def encoded_parquet(
        self, encoded: list[bytes | None], labels: list, metadata: dict[str, str] | None = None
    ) -> bytes:
        rows = [{"bytes": data, "path": f"{number}.png"} for number, data in enumerate(encoded)]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table({"img": pa.array(rows, kind), "label": pa.array(labels, pa.int64())})
        table = table.replace_schema_metadata(self.names() if metadata is None else metadata)
        buffer = io.BytesIO()
        pq.write_table(table, buffer, row_group_size=7)
        return buffer.getvalue()

    def parquet_source(self, folder: Path, train: int = 60, test: int = 20) -> Path:
        """A folder in the Hugging Face layout: training images of seed 0, test images of seed 1."""
        folder.mkdir(parents=True, exist_ok=True)
        folder.joinpath("train-00000-of-00001.parquet").write_bytes(
            self.parquet(self.images(train), self.labels(train))
        )
        folder.joinpath("test-00000-of-00001.parquet").write_bytes(
            self.parquet(self.images(test, 1), self.labels(test))
        )
        return folder


@pytest.fixture
def make() -> Maker:
    return Maker()


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Makes the isolated reader run some code when it starts; `child` is its module."""

    def start_with(code: str) -> None:
        isolated.stop()
        script = f"from cifar_assets.dataset.formats import isolated_child as child\n{code}\nchild.main()"
        monkeypatch.setattr(isolated, "_COMMAND", [sys.executable, "-P", "-c", script])

    yield start_with
    isolated.stop()


@pytest.fixture
def raw(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store" / "raw-data")


@pytest.fixture
def processed(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store" / "processed-data")


@pytest.fixture
def source(tmp_path: Path, make: Maker) -> str:
    """60 training and 20 test images in Parquet."""
    return str(make.parquet_source(tmp_path / "source"))


@pytest.fixture(autouse=True)
def _settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Landed files count as settled at once."""
    monkeypatch.setattr("cifar_assets.dataset.landing.zone.SETTLED_SECONDS", -1.0)
