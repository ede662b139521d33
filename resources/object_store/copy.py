"""Copies buckets to another S3 server and verifies every object: `python -m resources.object_store.copy`.

The AWS_... variables name the server to copy to; the same names after SOURCE_, such as SOURCE_AWS_ENDPOINT_URL, the one
to copy from. AWS_CA_BUNDLE holds for both. Every object is read from both, and their sha256 compared. An object that is
there already is not copied again, so that a second run continues an interrupted one. An object that cannot be copied is
reported, and the others are copied. Nothing is deleted. Stop everything that writes to either server first: an object
that changes meanwhile is reported as different.
"""

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

from resources.digests import sha256_file, sha256_stream
from resources.errors import ConfigError, ExplainedError
from resources.object_store import ObjectStore
from resources.object_store.s3 import S3Store
from resources.object_store.s3_settings import CA_VARIABLES, S3Connection
from resources.object_store.setup import ALL_BUCKETS

_SOURCE = "SOURCE_"
_THREADS = 4

Outcome = Literal["copied", "there", "different"]


def copy_object(source: ObjectStore, target: ObjectStore, key: str, *, overwrite: bool) -> Outcome:
    """Make the target's object equal to the source's. IntegrityError if it is not after the copy.

    Without `overwrite`, an object of the target with other content is kept, and the outcome is "different".
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "object")
        source.download(key, path)
        digest = sha256_file(path)
        if (there := target.stat(key)) is not None:
            if there.size == path.stat().st_size and _digest(target, key) == digest:
                return "there"
            if not overwrite:
                return "different"
        target.upload(key, path)
    if (found := _digest(target, key)) != digest:
        raise target.changed(key, digest, found)
    return "copied"


def copy_bucket(source: ObjectStore, target: ObjectStore, *, overwrite: bool = False) -> tuple[Counter[str], list[str]]:
    """Copy every object. Returns how many had each outcome, and every difference that is left, with failed copies."""
    before = list(source.list())
    keys = [info.key for info in before]
    with ThreadPoolExecutor(_THREADS) as pool:
        copied = pool.map(partial(_try_to_copy, source, target, overwrite=overwrite), keys)
        outcomes = dict(zip(keys, copied, strict=True))
    failed = {key: error for key, error in outcomes.items() if isinstance(error, ExplainedError)}
    faults = [f"{source.uri(key)} was not copied: {error}".rstrip(".") for key, error in failed.items()]
    faults += [f"{target.uri(key)} has other content" for key, outcome in outcomes.items() if outcome == "different"]
    changed = {info.key for info in {*before} ^ {*source.list()}}
    faults += [f"{source.uri(key)} was changed during the copy" for key in sorted(changed)]
    faults += [f"{target.uri(info.key)} is only there" for info in target.list() if info.key not in outcomes]
    return Counter("failed" if key in failed else str(outcome) for key, outcome in outcomes.items()), faults


def main(arguments: Sequence[str] | None = None) -> int:
    """Copy the buckets and print a line on each. Exit code 1 if anything differs afterwards."""
    parser = argparse.ArgumentParser(prog="python -m resources.object_store.copy", description=__doc__)
    parser.add_argument("buckets", nargs="*", default=ALL_BUCKETS, help="without the prefix; by default the platform's")
    parser.add_argument("--overwrite", action="store_true", help="replace objects of the target with other content")
    options = parser.parse_args(arguments)
    num_faults = 0
    try:
        source, target = _source_connection(), S3Connection.from_environment()
        if (source.endpoint_url, source.bucket_prefix) == (target.endpoint_url, target.bucket_prefix):
            raise ConfigError(f"{_SOURCE}AWS_ENDPOINT_URL is AWS_ENDPOINT_URL: expected two servers.")
        sources = {name: S3Store(source).bucket(name) for name in options.buckets}
        for bucket in sources.values():
            next(bucket.list(), None)  # raises if there is no such bucket
        S3Store(target).ensure_buckets(target.bucket_prefix + name for name in sources)
        for name, bucket in sources.items():
            outcomes, faults = copy_bucket(bucket, S3Store(target).bucket(name), overwrite=options.overwrite)
            counts = f"{outcomes['copied']} copied, {outcomes['there']} were there, {len(faults)} differences"
            sys.stdout.write(f"{name}: {outcomes.total()} objects, {counts}\n")
            sys.stderr.write("".join(f"{fault}.\n" for fault in faults))
            num_faults += len(faults)
    except ExplainedError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 1 if num_faults else 0


def _try_to_copy(source: ObjectStore, target: ObjectStore, key: str, *, overwrite: bool) -> Outcome | ExplainedError:
    """What `copy_object` returns, or its error if it concerns only this object."""
    try:
        return copy_object(source, target, key, overwrite=overwrite)
    except ExplainedError as error:
        if error.transient:  # also the error of a server that disconnects while it sends a damaged object
            for store in (source, target):
                next(store.list(), None)  # raises if the server does not respond
        return error


def _source_connection() -> S3Connection:
    for name in CA_VARIABLES:
        if os.environ.get(_SOURCE + name):
            raise ConfigError(
                f"{_SOURCE}{name} is not supported: AWS_CA_BUNDLE holds for both servers. Put the certificate "
                "authorities of both into its file."
            )
    names = [name for name in os.environ if name.startswith(_SOURCE)]
    try:
        return S3Connection.from_environment({name.removeprefix(_SOURCE): os.environ[name] for name in names})
    except ConfigError as error:
        raise ConfigError(f"The server to copy from, with {_SOURCE} before each name: {error}") from None


def _digest(store: ObjectStore, key: str) -> str:
    with store.open(key) as file:
        return sha256_stream(file)


if __name__ == "__main__":
    sys.exit(main())
