"""The three buckets of the data flow, and the command-line option for their location."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from cifar_assets.data_set import find_data_set
from cifar_assets.settings import Settings, read_settings
from resources.mlflow.target import DEFAULT_NAME
from resources.object_store import MODELS_BUCKET, PROCESSED_BUCKET, RAW_BUCKET, FolderStore, ObjectStore, open_store


@dataclass(frozen=True)
class Stores:
    """The buckets, each as a separate store."""

    raw: ObjectStore
    processed: ObjectStore
    models: ObjectStore


def stores_below(root: ObjectStore, folder: str = "") -> Stores:
    """A data set's folder in each of the three buckets of a store."""
    buckets = (root.bucket(name) for name in (RAW_BUCKET, PROCESSED_BUCKET, MODELS_BUCKET))
    return Stores(*(bucket.at(folder) if folder else bucket for bucket in buckets))


def add_store_option(parser: argparse.ArgumentParser) -> None:
    """The option `--store`, for `open_stores`; defaults to CIFAR_STORE, or to the folder of the local deployment."""
    parser.add_argument(
        "--store",
        default=os.environ.get("CIFAR_STORE")
        or Settings.model_fields["cifar_store"].default,  # reads no other variable
        help="folder above the buckets, or s3:/// for the server at AWS_ENDPOINT_URL (default: %(default)s)",
    )


def add_data_set_option(parser: argparse.ArgumentParser) -> None:
    """The option `--data-set`, for `open_stores`."""
    parser.add_argument(
        "--data-set", default=DEFAULT_NAME, metavar="NAME", help="data set of this name (default: %(default)s)"
    )


def open_stores(address: str, data_set: str = DEFAULT_NAME) -> Stores:
    """A data set below a folder or an address. ConfigError if it is not declared, or without settings to reach it."""
    folder = "" if data_set == DEFAULT_NAME else find_data_set(read_settings(), data_set).folder
    return stores_below(open_store(address) if "://" in address else FolderStore(Path(address)), folder)
