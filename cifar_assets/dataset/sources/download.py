"""Fetching a file over HTTP: resumed where it broke off, verified before anyone sees it."""

import errno
import hashlib
import http.client
import logging
import shutil
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from cifar_assets.dataset.progress import report
from cifar_assets.settings import read_settings
from resources.digests import sha256_bytes
from resources.errors import DataError, IntegrityError
from resources.object_store.folder import write_atomically
from resources.redaction import redact_error, redacted

logger = logging.getLogger(__name__)

OFFICIAL_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
OFFICIAL_MD5 = "c58f30108f718f92721af3b95e74349a"
"""As in torchvision.datasets.CIFAR10 (url, tgz_md5) and on https://www.cs.toronto.edu/~kriz/cifar.html."""

ATTEMPTS = 5
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_TIMEOUT_SECONDS = 30
_URL_CHARACTERS = "!#$%&'()*+,/:;=?@[]~"
"""Kept as they are in an address; anything else, such as a space, is sent percent-encoded."""


class DownloadError(DataError):
    """The address could not be reached, or kept breaking off."""


def download_folder() -> Path:
    """Where an interrupted download waits to be continued: CIFAR_DOWNLOADS, or .cifar/downloads."""
    folder = read_settings().cifar_downloads
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir(), "cifar-downloads")
        folder.mkdir(exist_ok=True)
    return folder


def split_digest(address: str) -> tuple[str, str]:
    """Separate an address from the `md5=...` or `sha256=...` that may follow it after a #; "" where there is none."""
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
            f"{name}: expected {kind} {expected}, got {found} ({path.stat().st_size:,} bytes). The file is cut off or "
            "another one was served; nothing of it was kept. Try again, or use another source."
        )


def fetch(url: str, target: Path, digest: str) -> None:
    """Write what the URL serves to `target`, which appears whole and verified or not at all.

    A transfer that breaks off continues where it stopped, now and in a later call (the part lies in `download_folder`
    until then), as long as the server says that the file is still the same. Raises DownloadError when the server cannot
    be reached or keeps breaking off, IntegrityError when the file is not the one expected.
    """
    part, name = download_folder() / f"{sha256_bytes(url.encode())[:16]}.part", redacted(url)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _transfer(url, part)
            break
        except (http.client.InvalidURL, ValueError) as error:
            raise DownloadError(f"{name} is not an address that can be asked for: {redacted(error)}.") from None
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code != 429:
                _forget(part)
                raise DownloadError(f"{name}: the server answered {error.code} {error.reason}.") from error
            if isinstance(error, OSError) and error.errno in FULL_DISK:
                error.filename = str(part)
                raise
            redact_error(error)  # urllib repeats the path and query of a URL it cannot use
            if attempt == ATTEMPTS:
                have = _size_of(part)
                if not have:
                    _forget(part)
                raise DownloadError(
                    f"{name}: failed {ATTEMPTS} times, {have:,} bytes received so far ({error}). Check the network and "
                    "try again."
                ) from error
            logger.warning("%s: %s; attempt %d of %d failed, trying again.", name, error, attempt, ATTEMPTS)
            time.sleep(min(0.5 * 2 ** (attempt - 1), 10.0))
    try:
        check_file(part, digest, name)
    except IntegrityError:
        _forget(part)
        raise
    with part.open("rb") as file:  # not moved: the two may lie on different file systems
        write_atomically(target, lambda copy: shutil.copyfileobj(file, copy))
    _forget(part)


def _transfer(url: str, part: Path) -> None:
    """Append what is missing to the part; http.client.IncompleteRead when the body ends early."""
    have, validator_file = _size_of(part), _validator_file(part)
    headers = {"User-Agent": "cifar-assets", "Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": validator_file.read_text()}
    request = urllib.request.Request(urllib.parse.quote(url, safe=_URL_CHARACTERS), headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return  # all of it is here: what failed last time came after the transfer
        _forget(part)
        raise http.client.IncompleteRead(b"") from error
    with response:
        is_resumed = response.status == 206
        have = have if is_resumed else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length is not None and length.isdecimal() else None
        validator_file.unlink(missing_ok=True)
        with part.open("ab" if is_resumed else "wb") as file:
            # What identifies the served file in If-Range: a strong entity tag, or else its date.
            tag = response.headers.get("ETag")
            validator = tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")
            if validator:
                validator_file.write_text(validator)
            while chunk := response.read(1 << 20):
                file.write(chunk)
                have += len(chunk)
                report(f"downloading {redacted(url)}", have, total)
    if total is not None and have < total:
        raise http.client.IncompleteRead(b"", total - have)


def _size_of(part: Path) -> int:
    """The bytes that can be continued: without a validator nobody knows what they are part of."""
    return part.stat().st_size if part.exists() and _validator_file(part).exists() else 0


def _validator_file(part: Path) -> Path:
    return part.with_suffix(".validator")


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _validator_file(part).unlink(missing_ok=True)
