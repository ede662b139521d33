"""Downloads a file over HTTP: verified before it becomes visible; with a digest, resumed after an interruption."""

import errno
import hashlib
import http.client
import logging
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from cifar_assets.dataset.progress import report
from resources.errors import DataError, IntegrityError
from resources.redaction import redacted

logger = logging.getLogger(__name__)

OFFICIAL_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
OFFICIAL_MD5 = "c58f30108f718f92721af3b95e74349a"
"""As in torchvision.datasets.CIFAR10 (url, tgz_md5) and on https://www.cs.toronto.edu/~kriz/cifar.html."""

CHOICES = (
    "Choices for CIFAR10_SOURCE: 'download' (the official archive, needs network access), 'synthetic' (drawn from a "
    "seed), or a path, s3:// or http(s):// address of the official python or binary archive, of Parquet files in the "
    "Hugging Face layout, or of a folder of class folders."
)

ATTEMPTS = 5
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_TIMEOUT_SECONDS = 30
_URL_CHARACTERS = "!#$%&'()*+,/:;=?@[]~"
"""Kept as they are in an address; anything else, such as a space, is sent percent-encoded."""


def split_digest(address: str) -> tuple[str, str]:
    """Split an address from an optional `#md5=...` or `#sha256=...` suffix; "" if there is none."""
    base, _, digest = address.rpartition("#")
    return (base, digest.lower()) if digest.startswith(("md5=", "sha256=")) and base else (address, "")


def check_file(path: Path, digest: str, name: str) -> None:
    """IntegrityError naming both digests when the file does not have the digest; nothing is checked without one."""
    if not digest:
        return
    kind, _, expected = digest.partition("=")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()
    if found != expected:
        raise IntegrityError(
            f"{name}: expected {kind} {expected}, got {found} ({path.stat().st_size:,} bytes). The file is truncated "
            "or the server sent another one; it was discarded. Try again, or use another source."
        )


def fetch(url: str, target: Path, digest: str) -> None:
    """Download the URL to `target` and verify it; with a digest, an interrupted transfer is resumed.

    Raises DataError when the server cannot be reached or keeps interrupting the transfer, IntegrityError when the file
    is not the expected one.
    """
    name = redacted(url)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _transfer(url, target, is_continued=bool(digest))
            break
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, OSError) and error.errno in FULL_DISK:
                error.filename = str(target)
                raise
            reason = redacted(error)  # urllib repeats the path and query of a URL it cannot use
            code = error.code if isinstance(error, urllib.error.HTTPError) else 500
            is_past_end = code == 416 and target.exists()
            if is_past_end:  # the file was complete or was another one: start over
                target.unlink()
            is_refused = code < 500 and code != 429 and not is_past_end
            if is_refused or isinstance(error, http.client.InvalidURL | ValueError) or attempt == ATTEMPTS:
                have = target.stat().st_size if target.exists() else 0
                raise DataError(
                    f"Cannot fetch {name}: failed after {attempt} attempts, {have:,} bytes received so far ({reason}). "
                    f"Check the address and the network, and try again. {CHOICES}"
                ) from None
            logger.warning("%s: %s; attempt %d of %d failed, trying again.", name, reason, attempt, ATTEMPTS)
            time.sleep(min(0.5 * 2 ** (attempt - 1), 10.0))
    check_file(target, digest, name)


def _transfer(url: str, target: Path, *, is_continued: bool) -> None:
    """Write the file, or append the missing part; http.client.IncompleteRead when the body ends early."""
    have = target.stat().st_size if is_continued and target.exists() else 0
    headers = {"User-Agent": "cifar-assets", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    request = urllib.request.Request(urllib.parse.quote(url, safe=_URL_CHARACTERS), headers=headers)
    with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
        have = have if response.status == 206 else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length is not None and length.isdecimal() else None
        with target.open("ab" if have else "wb") as file:
            while chunk := response.read(1 << 20):
                file.write(chunk)
                have += len(chunk)
                report(f"downloading {redacted(url)}", have, total)
    if total is not None and have < total:
        raise http.client.IncompleteRead(b"", total - have)
