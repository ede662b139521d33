"""Fetching a file over HTTP: resumed where it broke off, verified before anyone sees it."""

import errno
import hashlib
import http.client
import logging
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from cifar_assets.dataset.progress import report
from resources.digests import sha256_bytes
from resources.errors import DataError, IntegrityError
from resources.object_store.folder import write_atomically
from resources.redaction import redact_error, redacted

logger = logging.getLogger(__name__)

OFFICIAL_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
OFFICIAL_MD5 = "c58f30108f718f92721af3b95e74349a"
"""As in torchvision.datasets.CIFAR10 (url, tgz_md5) and on https://www.cs.toronto.edu/~kriz/cifar.html."""

ATTEMPTS = 5
_TIMEOUT_SECONDS = 30
_CHUNK_BYTES = 1 << 20
_FAULTS = (OSError, http.client.HTTPException)
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_URL_CHARACTERS = "!#$%&'()*+,/:;=?@[]~"
"""Kept as they are in an address; anything else, such as a space, is sent percent-encoded."""


class DownloadError(DataError):
    """The address could not be reached, or kept breaking off."""


@dataclass(frozen=True)
class Expected:
    """What the file must hash to; nothing is checked where both are None."""

    md5: str | None = None
    sha256: str | None = None


def split_expected(address: str) -> tuple[str, Expected]:
    """Separate an address from the `#md5=...` or `#sha256=...` that may follow it."""
    base, mark, fragment = address.rpartition("#")
    name, equals, value = fragment.partition("=")
    if not (mark and equals) or name not in ("md5", "sha256"):
        return address, Expected()
    return base, Expected(**{name: value.lower()})


def check_file(path: Path, expected: Expected, name: str) -> None:
    """IntegrityError naming expected and received digest when the file is not what was expected."""
    for kind in ("md5", "sha256"):
        wanted = getattr(expected, kind)
        if wanted is None:
            continue
        digest = hashlib.new(kind, usedforsecurity=False)
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
        if digest.hexdigest() != wanted:
            raise IntegrityError(
                f"{name}: expected {kind} {wanted}, got {digest.hexdigest()} ({path.stat().st_size:,} bytes). "
                "The file is cut off or another one was served; nothing of it was kept. Try again, or use another "
                "source."
            )


def fetch(url: str, target: Path, expected: Expected, *, parts: Path) -> None:
    """Write what the URL serves to `target`, which appears whole and verified or not at all.

    A transfer that breaks off continues where it stopped, now and in a later call (the part lies in the folder `parts`
    until then), as long as the server says that the file is still the same. Raises DownloadError when the server cannot
    be reached or keeps breaking off, IntegrityError when the file is not the one expected.
    """
    parts.mkdir(parents=True, exist_ok=True)
    part = parts / f"{sha256_bytes(url.encode())[:16]}.part"
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _transfer(url, part)
            break
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code != 429:
                _forget(part)
                raise DownloadError(f"{redacted(url)}: the server answered {error.code} {error.reason}.") from error
            failure: Exception = error
        except (http.client.InvalidURL, ValueError) as error:
            raise DownloadError(
                f"{redacted(url)} is not an address that can be asked for: {redacted(error)}."
            ) from None
        except _FAULTS as error:
            if isinstance(error, OSError) and error.errno in FULL_DISK:
                error.filename = str(part)
                raise
            redact_error(error)  # urllib repeats the path and query of a URL it cannot use
            failure = error
        if attempt == ATTEMPTS:
            have = part.stat().st_size if part.exists() else 0
            if not have or not _validator_file(part).exists():
                _forget(part)
            raise DownloadError(
                f"{redacted(url)}: failed {ATTEMPTS} times, {have:,} bytes received so far ({failure}). "
                "Check the network and try again."
            ) from failure
        logger.warning("%s: %s; attempt %d of %d failed, trying again.", redacted(url), failure, attempt, ATTEMPTS)
        time.sleep(min(0.5 * 2 ** (attempt - 1), 10.0))
    try:
        check_file(part, expected, redacted(url))
    except IntegrityError:
        _forget(part)
        raise
    with part.open("rb") as file:  # not moved: the two may lie on different file systems
        write_atomically(target, lambda copy: shutil.copyfileobj(file, copy))
    _forget(part)


def _transfer(url: str, part: Path) -> None:
    """Append what is missing to the part; http.client.IncompleteRead when the body ends early."""
    validator_file = _validator_file(part)
    have = part.stat().st_size if part.exists() and validator_file.exists() else 0
    request = urllib.request.Request(
        urllib.parse.quote(url, safe=_URL_CHARACTERS),
        headers={"User-Agent": "cifar-assets", "Accept-Encoding": "identity"},
    )
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", validator_file.read_text())
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            if error.headers.get("Content-Range") == f"bytes */{have}":
                return  # all of it is here: what failed last time came after the transfer
            _forget(part)
            raise http.client.IncompleteRead(b"") from error
        raise
    with response:
        resumed = response.status == 206
        have = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length is not None and length.isdecimal() else None
        validator_file.unlink(missing_ok=True)
        with part.open("ab" if resumed else "wb") as file:
            validator = _validator(response.headers)
            if validator:
                validator_file.write_text(validator)
            while chunk := response.read(_CHUNK_BYTES):
                file.write(chunk)
                have += len(chunk)
                report(f"downloading {redacted(url)}", have, total)
    if total is not None and have < total:
        raise http.client.IncompleteRead(b"", total - have)


def _validator(headers: http.client.HTTPMessage) -> str | None:
    """What identifies the served file in If-Range: a strong entity tag, or else its date."""
    tag = headers.get("ETag")
    if tag and not tag.startswith("W/"):
        return tag
    return headers.get("Last-Modified")


def _validator_file(part: Path) -> Path:
    return part.with_suffix(".validator")


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _validator_file(part).unlink(missing_ok=True)
