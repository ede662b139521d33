"""The parts of the kserve SDK this server is built on, imported without what only its cluster client needs.

`import kserve` (0.21) costs 190 MB and seconds of start-up for pandas and the Kubernetes client, which the model server
uses in helpers that are never called here, and it parses `sys.argv`. All three are kept out while it loads. A process
that has pandas or the real client loaded already keeps them.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

_PLACEHOLDERS = {"pandas": "DataFrame", "kserve.api.kserve_client": "KServeClient"}


@contextmanager
def _light_import() -> Iterator[None]:
    arguments = sys.argv
    placed: dict[str, ModuleType] = {}
    for name, attribute in _PLACEHOLDERS.items():
        if name not in sys.modules:
            placed[name] = ModuleType(name, "Stands in for a module that this process never uses.")
            setattr(placed[name], attribute, type(attribute, (), {}))
    sys.modules.update(placed)
    sys.argv = sys.argv[:1]
    try:
        yield
    finally:
        sys.argv = arguments
        for name, module in placed.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


with _light_import():
    from kserve.errors import ModelNotFound
    from kserve.model import Model
    from kserve.model_server import ModelServer, app
    from kserve.protocol.dataplane import DataPlane
    from kserve.protocol.rest.server import RESTServer, metrics_handler

__all__ = ["DataPlane", "Model", "ModelNotFound", "ModelServer", "RESTServer", "app", "metrics_handler"]
