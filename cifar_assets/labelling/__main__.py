"""Label pictures in a browser: `python -m cifar_assets.labelling --help`."""

import argparse
import getpass
import sys
from collections.abc import Sequence

from cifar_assets.dataset.stores import add_data_set_option, add_store_option, open_stores
from cifar_assets.labelling.batches import Desk
from cifar_assets.labelling.server import LabellingServer
from resources.errors import ExplainedError


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the page on loopback until interrupted; 1 with one line on stderr if that fails."""
    parser = argparse.ArgumentParser("python -m cifar_assets.labelling", description=__doc__)
    add_store_option(parser)
    add_data_set_option(parser)
    parser.add_argument("--batch", help="name of the folder in to-label/ (default: the newest)")
    parser.add_argument("--by", default=getpass.getuser(), help="who labels (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8090, help="port on 127.0.0.1 (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        desk = Desk(open_stores(options.store, options.data_set).raw, options.batch, options.by)
        with LabellingServer(desk, options.port) as server:
            print(f"Label batch {desk.name} at http://{server.host}. End with Ctrl+C.", flush=True)  # noqa: T201
            server.serve_forever()
    except (ExplainedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
