"""The three buckets of the data flow, and the command-line option for their location."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from cifar_assets.settings import Settings
from resources.object_store import MODELS_BUCKET, PROCESSED_BUCKET, RAW_BUCKET, FolderStore, ObjectStore, open_store


@dataclass(frozen=True)
class Stores:
    """The buckets, each as a separate store."""

    raw: ObjectStore
    processed: ObjectStore
    models: ObjectStore


def stores_below(root: ObjectStore) -> Stores:
    """The three buckets of a store."""
    return Stores(root.bucket(RAW_BUCKET), root.bucket(PROCESSED_BUCKET), root.bucket(MODELS_BUCKET))


def add_store_option(parser: argparse.ArgumentParser) -> None:
    """The option `--store`, for `open_stores`; defaults to CIFAR_STORE, or to the folder of the local deployment."""
    parser.add_argument(
        "--store",
        default=os.environ.get("CIFAR_STORE")
        or Settings.model_fields["cifar_store"].default,  # reads no other variable
        help="folder above the buckets, or s3:/// for the server at AWS_ENDPOINT_URL (default: %(default)s)",
    )


def open_stores(address: str) -> Stores:
    """The buckets below a folder or an address. ConfigError when the environment has no settings to reach it."""
    return stores_below(open_store(address) if "://" in address else FolderStore(Path(address)))
