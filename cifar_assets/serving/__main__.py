"""`python -m cifar_assets.serving`: the server process of an InferenceService pod and of the local deployment."""

import logging
import sys
import warnings
from collections.abc import Sequence

from cifar_assets.serving.settings import parse_settings
from resources.errors import ConfigError, DataError, ExplainedError, ObjectNotFoundError
from resources.trainer.contract import EXIT_BAD_SPEC

_log = logging.getLogger("cifar_assets.serving")


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve. Exit code 0 after a drain, 2 for an error that a restart would not fix, 1 for one that it might."""
    settings = parse_settings(arguments)
    configure_logging()
    from cifar_assets.serving.server import run_server  # loads ONNX Runtime, so only after the options are valid

    try:
        run_server(settings)
    except (ConfigError, DataError, ObjectNotFoundError) as error:
        _log.error("Not serving: %s", error)
        return EXIT_BAD_SPEC
    except ExplainedError as error:
        _log.error("Not serving: %s", error)
        return 1
    return 0


def configure_logging() -> None:
    """One line per event on stderr."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    warnings.filterwarnings("ignore", module="PIL")  # its warnings about clients' pictures


if __name__ == "__main__":
    sys.exit(main())
