"""Classify a folder of pictures with a stored model: `python -m cifar_assets.predictions --help`."""

import argparse
import logging
import sys
from collections.abc import Sequence

from cifar_assets.data_set import find_data_set
from cifar_assets.dataset.stores import add_data_set_option, add_store_option, open_stores
from cifar_assets.gate import choose_precision, judge
from cifar_assets.predictions.run import predict
from cifar_assets.settings import read_settings
from resources.errors import ConfigError, ExplainedError
from resources.inference_service.client import InferenceClient


def main(arguments: Sequence[str] | None = None) -> int:
    """Classify what is not classified yet, and say where the predictions are; 1 with one line on stderr if it fails."""
    parser = argparse.ArgumentParser("python -m cifar_assets.predictions", description=__doc__)
    add_store_option(parser)
    add_data_set_option(parser)
    parser.add_argument("source", help="folder, or s3://bucket/prefix")
    parser.add_argument("--model", help="digest of the model (default: the one that the local service serves)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        settings, stores = read_settings(), open_stores(options.store, options.data_set)
        data_set = find_data_set(settings, options.data_set)
        service = InferenceClient(f"http://127.0.0.1:{data_set.port}")
        digest = options.model or service.served_model().model_digest
        _, verdict = judge(stores.models, digest, data_set.threshold, settings.model_public_key)
        if not verdict.passed:
            raise ConfigError(f"{verdict.reason}. Name another model.")
        precision, _ = choose_precision(stores.models, digest, settings.serving_precision)
        found = predict(
            options.source, stores.models, stores.processed, digest, precision, public_keys=settings.model_public_key
        )
    except (ExplainedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    for name, number in found.counts.items():
        print(f"{number:>9,} {name}")  # noqa: T201
    for path, reason in found.unusable:
        print(f"not usable: {path}: {reason}")  # noqa: T201
    print(f"{found.target.uri()} (manifest {found.manifest.digest})")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
