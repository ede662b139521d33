"""Users and rights on a real MinIO and a real SeaweedFS: each role may do what it needs, and nothing else."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from resources.errors import StoreError
from resources.object_store.s3 import S3Store
from resources.object_store.s3_settings import S3Connection
from resources.object_store.setup import ALL_BUCKETS, ROLES, main, policy_of, user_of
from tests.fixtures.s3 import S3Server, running_minio, running_seaweedfs

PREFIX = "team-"
MAY_READ = {
    "dagster": {"raw-data", "processed-data", "models", "served-traffic", "dagster-logs"},
    "trainer": {"processed-data", "models"},
    "server": {"models"},
    "pipeline": {"raw-data", "processed-data", "models"},
    "mlflow": {"mlflow"},
}
_TRAINERS = {"models/x", "models/checkpoints/x", "models/pipes/messages/x"}
MAY_WRITE: dict[str, set[str]] = {
    "dagster": {"raw-data/x", "processed-data/x", "served-traffic/x", "dagster-logs/x", *_TRAINERS},
    "trainer": _TRAINERS,
    "server": {"served-traffic/x"},
    "pipeline": _TRAINERS,
    "mlflow": {"mlflow/x"},
}
MAY_DELETE: dict[str, set[str]] = {
    "dagster": MAY_WRITE["dagster"],
    "trainer": {"models/checkpoints/x"},
    "server": set(),
    "pipeline": {"models/checkpoints/x"},
    "mlflow": {"mlflow/x"},
}
PLACES = sorted({place for places in MAY_WRITE.values() for place in places})

pytestmark = pytest.mark.s3


@pytest.fixture(scope="module", params=["minio", "seaweedfs"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server that was set up twice, with changed keys."""
    folder = tmp_path_factory.mktemp("users")
    keys, users = folder / "keys", folder / "users.json"
    keys.mkdir()

    def write_keys(attempt: int) -> None:
        for role in ROLES:
            (keys / role).write_text(f"secret-{role}-{attempt}\n")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIFAR_BUCKET_PREFIX", PREFIX)
        if request.param == "minio":
            with running_minio(folder) as server:
                _connect(patch, server)
                for attempt in (1, 2):
                    write_keys(attempt)
                    assert main([str(keys)]) == 0
                yield _filled(server)
            return
        for attempt in (1, 2):
            write_keys(attempt)
            assert main([str(keys), "--seaweedfs", str(users)]) == 0
        with running_seaweedfs(folder, users) as server:
            _connect(patch, server)
            assert main([]) == 0
            yield _filled(server)


def _connect(patch: pytest.MonkeyPatch, server: S3Server) -> None:
    for name, value in server.environment().items():
        patch.setenv(name, value)


def _filled(server: S3Server) -> S3Server:
    root = store_of(server)
    for place in PLACES:
        root.bucket(place.partition("/")[0]).write(place.partition("/")[2], b"there")
    return server


def store_of(server: S3Server, role: str | None = None, key: str = "") -> S3Store:
    """The store with the credentials of a role or of the root user."""
    keys = (user_of(role), key or f"secret-{role}-2") if role else (server.access_key, server.secret_key)
    return S3Store(S3Connection(server.endpoint, *keys, bucket_prefix=PREFIX))


def is_allowed(call: Callable[[], object]) -> bool:
    try:
        call()
    except StoreError as error:
        if "AccessDenied" not in str(error):
            raise
        return False
    return True


@pytest.mark.parametrize("role", ROLES)
def test_role_may_do_what_it_needs_and_nothing_else(role: str, server: S3Server) -> None:
    root, store = store_of(server), store_of(server, role)
    read = {name for name in ALL_BUCKETS if is_allowed(lambda name=name: list(store.bucket(name).list()))}
    written, deleted = set(), set()
    for place in PLACES:
        name, _, key = place.partition("/")
        bucket = store.bucket(name)
        assert is_allowed(partial(bucket.read, key)) == is_allowed(partial(bucket.stat, "missing")) == (name in read)
        if is_allowed(partial(bucket.write, key, b"there")):
            written.add(place)
        if is_allowed(partial(bucket.delete, key)):
            deleted.add(place)
            root.bucket(name).write(key, b"there")
    assert (read, written, deleted) == (MAY_READ[role], MAY_WRITE[role], MAY_DELETE[role])


@pytest.mark.parametrize("role", ROLES)
def test_role_makes_no_buckets_and_no_users(role: str, server: S3Server) -> None:
    with pytest.raises(StoreError, match="AccessDenied"):
        store_of(server, role).ensure_buckets(["another"])


def test_old_key_is_refused_after_a_change(server: S3Server) -> None:
    with pytest.raises(StoreError, match="AWS_SECRET_ACCESS_KEY"):
        store_of(server, "dagster", "secret-dagster-1").bucket("models").read("x")


def test_large_upload_needs_no_further_right(server: S3Server, tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(40 << 20))
    models = store_of(server, "trainer").bucket("models")
    models.upload("large", path)
    assert models.read("large") == path.read_bytes()


def test_missing_key_is_an_error_that_names_the_role(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    assert "has no file dagster, trainer" in capsys.readouterr().err


def test_rights_of_a_role_are_printed_for_other_stores(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIFAR_BUCKET_PREFIX", "team-")
    assert main(["--policy", "server"]) == 0
    assert json.loads(capsys.readouterr().out) == policy_of("server", "team-")
