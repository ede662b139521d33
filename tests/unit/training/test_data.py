import os
import re
import tempfile
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cifar_assets.contracts import CIFAR10
from cifar_assets.dataset.versions.reader import SplitReader
from cifar_assets.training import data
from resources.object_store import FolderStore
from tests.unit.training.conftest import SpecMaker

NUM_IMAGES = 30_000


class RemoteStore(FolderStore):
    """A folder whose files cannot be mapped in place, like objects in S3."""

    def local_path(self, key: str) -> None:
        return None


def test_users_of_one_machine_have_caches_of_their_own(
    make_spec: SpecMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(data, "open_store", lambda uri: RemoteStore(Path(uri.removeprefix("file://"))))
    data.open_data(spec, torch.device("cpu"))
    assert [path.name for path in tmp_path.iterdir()] == [f"cifar-shards-{os.getuid()}"]


class DrawnImages:
    """The part of SplitReader that TensorSplit uses."""

    labels = np.zeros(NUM_IMAGES, np.int64)
    manifest = CIFAR10

    def __len__(self) -> int:
        return NUM_IMAGES

    def take(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        return np.broadcast_to(indices.astype(np.uint8)[:, None, None, None], (len(indices), 3, 32, 32)).copy()


def test_a_split_is_in_memory_once_while_it_is_read() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = peak_bytes()
    split = data.TensorSplit(cast(SplitReader, DrawnImages()), torch.device("cpu"), 1 << 30)
    assert peak_bytes() - before < 1.5 * NUM_IMAGES * 3072
    assert torch.equal(split.images(np.array([0, 255, 1024, 1025]))[:, 2, 31, 31], torch.tensor([0, 255, 0, 1]))


def peak_bytes() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10
