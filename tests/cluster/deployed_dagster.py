"""k8s/dagster in the platform's namespace, as docs/dagster_in_the_cluster.md sets it up.

Needs `make -f images/images.mk image-dagster image-trainer postgres-image LOAD=...`.
"""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.kubectl import PATIENCE, forwarded, kubectl, missing_images
from tests.cluster.platform import NAMESPACE, Platform
from tests.cluster.webserver import Webserver
from tests.fixtures.ports import free_port

OVERLAY = Path(__file__).parent / "dagster"
PASSING = OVERLAY.with_name("dagster_passing")
"""Like OVERLAY, but models pass the gate."""
IMAGES = ("localhost/cifar-dagster:dev", "localhost/cifar-trainer:dev", "localhost/cifar-postgres:test")
PASSWORD = "dagster-postgresql-secret"
_INSIDE = ("-n", NAMESPACE)


@contextmanager
def deployed(platform: Platform, overlay: Path = OVERLAY) -> Iterator[Webserver]:
    """Removed at the end of the block."""
    if missing := missing_images(*IMAGES):
        pytest.skip(
            f"the cluster lacks {' and '.join(missing)}: make -f images/images.mk image-dagster "
            "image-trainer postgres-image LOAD=..."
        )
    try:
        install(overlay)
        port = free_port()
        with forwarded(platform.namespace, "svc/dagster-webserver", port, 3000):
            yield Webserver(f"http://127.0.0.1:{port}")
    finally:
        kubectl("delete", "-k", str(overlay), "--ignore-not-found", PATIENCE)
        kubectl(*_INSIDE, "delete", "pvc", "data-dagster-postgresql-0", "--ignore-not-found", PATIENCE)
        kubectl(*_INSIDE, "delete", "secret", PASSWORD, "--ignore-not-found")
        # No object of the overlay owns the Jobs of run workers.
        kubectl(*_INSIDE, "delete", "jobs", "-l", "dagster/run-id", PATIENCE)


def install(overlay: Path) -> None:
    """Create the database's password and apply the overlay; returns when the UI can be reached."""
    password = f"--from-literal=postgresql-password={secrets.token_hex(20)}"
    kubectl(*_INSIDE, "create", "secret", "generic", PASSWORD, password)
    kubectl("apply", "--server-side", "-k", str(overlay))
    for name in ("statefulset/dagster-postgresql", "deploy/dagster-code", "deploy/dagster-webserver"):
        kubectl(*_INSIDE, "rollout", "status", name, PATIENCE)
