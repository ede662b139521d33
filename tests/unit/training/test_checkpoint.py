import logging
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from cifar_assets.training.checkpoint import CheckpointStore, Position
from resources.digests import sha256_bytes
from resources.errors import DataError, ObjectNotFoundError
from resources.object_store import FolderStore


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "checkpoints")


def save_steps(checkpoints: CheckpointStore, *steps: int) -> None:
    for step in steps:
        checkpoints.save(step, {"a": torch.full((2, 2), float(step))}, Position(epoch=step))


def test_saved_checkpoint_is_loaded(store: FolderStore) -> None:
    tensors = {
        "weight": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "count": torch.tensor(7),
        "half": torch.randn(3).to(torch.bfloat16),
        "sum": torch.tensor(1 / 3, dtype=torch.float64),
    }
    position = Position(epoch=1, epoch_seconds=1e-17)
    CheckpointStore(store, 2).save(12, tensors, position)
    found = CheckpointStore(store, 2).load_newest()
    assert found is not None
    assert (found.step, found.position) == (12, position)
    assert all(torch.equal(found.tensors[name], value) for name, value in tensors.items())


def test_the_newest_are_kept(store: FolderStore) -> None:
    save_steps(CheckpointStore(store, 2), 1, 2, 3, 10, 9)
    assert [info.key.split("-")[1] for info in store.list()] == ["000000009", "000000010"]


def test_no_checkpoint_before_the_first_save(store: FolderStore) -> None:
    assert CheckpointStore(store, 2).load_newest() is None
    with pytest.raises(ObjectNotFoundError, match="step 5"):
        CheckpointStore(store, 2).load_step(5)


def damage_flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    "damage",
    [damage_flip, lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data + b"\0"],
    ids=["bit", "cut", "empty", "longer"],
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(store: FolderStore, damage, caplog) -> None:
    checkpoints = CheckpointStore(store, 3)
    save_steps(checkpoints, 1, 2, 3)
    newest = max(info.key for info in store.list())
    store.write(newest, damage(store.read(newest)))
    with caplog.at_level(logging.WARNING):
        found = checkpoints.load_newest()
    assert found is not None
    assert found.step == 2
    assert newest in caplog.text
    assert not store.exists(newest)


def test_a_pickle_under_a_checkpoints_name_is_not_run(store: FolderStore, tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Trap:
        def __reduce__(self):
            return (Path.touch, (marker,))

    data = pickle.dumps(Trap())
    store.write(f"step-000000009-{sha256_bytes(data)}.safetensors", data)
    checkpoints = CheckpointStore(store, 2)
    with pytest.raises(DataError, match="not a checkpoint"):
        checkpoints.load_step(9)
    assert checkpoints.load_newest() is None
    assert not marker.exists()


def test_other_objects_are_not_touched(store: FolderStore) -> None:
    store.write("notes.txt", b"x")
    store.write("step-1.pt", b"x")
    checkpoints = CheckpointStore(store, 1)
    save_steps(checkpoints, 1, 2)
    checkpoints.clear()
    assert [info.key for info in store.list()] == ["notes.txt", "step-1.pt"]


def test_a_checkpoint_without_a_position_of_this_release_is_refused(store: FolderStore) -> None:
    data = save({"a": torch.zeros(1)}, metadata={"checkpoint": '{"version": 99}'})
    store.write(f"step-000000009-{sha256_bytes(data)}.safetensors", data)
    with pytest.raises(DataError, match="version"):
        CheckpointStore(store, 2).load_step(9)
