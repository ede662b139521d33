"""The three buckets that data runs through, and how a command is told where they are."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from cifar_assets.settings import Settings
from resources.object_store import MODELS_BUCKET, PROCESSED_BUCKET, RAW_BUCKET, FolderStore, ObjectStore, open_store


@dataclass(frozen=True)
class Stores:
    """The buckets, each as a store of its own."""

    raw: ObjectStore
    processed: ObjectStore
    models: ObjectStore


def stores_below(root: ObjectStore) -> Stores:
    """The three buckets of a store."""
    return Stores(root.bucket(RAW_BUCKET), root.bucket(PROCESSED_BUCKET), root.bucket(MODELS_BUCKET))


def add_store_option(parser: argparse.ArgumentParser) -> None:
    """`--store`, for `open_stores`; by default CIFAR_STORE, or the folder that Dagster uses on a laptop."""
    parser.add_argument(
        "--store",
        default=os.environ.get("CIFAR_STORE") or Settings.model_fields["cifar_store"].default,  # no other variable
        help="folder above the buckets, or s3:/// for the server at AWS_ENDPOINT_URL (default: %(default)s)",
    )


def open_stores(address: str) -> Stores:
    """The buckets below a folder or an address. ConfigError where the environment does not say how to reach it."""
    return stores_below(open_store(address) if "://" in address else FolderStore(Path(address)))
