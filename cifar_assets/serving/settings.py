"""What a server process is told: command line options, each with an environment variable of the same name."""

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_assets.contracts import MODEL_NAME
from cifar_assets.serving.limits import ServingLimits
from cifar_assets.serving.messages import ModelIdentity

ENVIRONMENT_PREFIX = "CIFAR_SERVING_"
_DEFAULTS = ServingLimits()
_LIMIT_OPTIONS = ("batch_images", "queue_images", "max_pending_requests", "max_connections")


@dataclass(frozen=True)
class ServerSettings:
    """Options of one server process, explained by `--help`. Times are seconds."""

    model_uri: str
    model_digest: str
    model_version: str
    host: str
    port: int
    threads: int | None
    drain_delay: float
    linger: float
    grace: float
    fd: int | None
    report_fd: int | None
    control_dir: Path | None
    annotations: dict[str, str]
    log_file: str
    limits: ServingLimits

    @property
    def identity(self) -> ModelIdentity:
        return ModelIdentity(MODEL_NAME, self.model_version, self.model_digest)


def parse_settings(arguments: Sequence[str] | None, environment: Mapping[str, str] = os.environ) -> ServerSettings:
    """Settings from the command line, then the environment (CIFAR_SERVING_MODEL_URI and so on), then defaults.

    Exits with a usage message for what is missing or malformed.
    """
    parser = _Parser(environment)
    parser.option("model-uri", "where the model package is: file:///... or s3://...", required=True)
    parser.option("model-digest", "the digest the package must have", required=True)
    parser.option("model-version", "version to report; by default the start of the digest")
    parser.option("host", "address to listen on; a pod passes ::", default="127.0.0.1")
    parser.option("port", "port to listen on", kind=_port, default=environment.get("PORT", "8080"))
    parser.option("threads", "threads of one run of the model; by default one per CPU", kind=_positive)
    parser.option("batch-images", "images in one run of the model", kind=_positive, default=str(_DEFAULTS.batch_images))
    parser.option("queue-images", "images that may wait", kind=_positive, default=str(_DEFAULTS.queue_images))
    pending, connections = str(_DEFAULTS.max_pending_requests), str(_DEFAULTS.max_connections)
    parser.option("max-pending-requests", "requests answered at a time", kind=_positive, default=pending)
    parser.option("max-connections", "open connections", kind=_positive, default=connections)
    parser.option(
        "drain-delay", "seconds to accept after SIGTERM, with readiness saying no", kind=_seconds, default="0"
    )
    parser.option("linger", "seconds that open connections may then bring requests", kind=_seconds, default="2")
    parser.option("grace", "seconds that requests in progress may then take", kind=_seconds, default="30")
    parser.option("fd", "descriptor of a listening socket, in place of host and port", kind=int)
    parser.option("report-fd", "descriptor to report state to, one JSON object a line", kind=int)
    parser.option("control-dir", "folder of a local deployment: wait for a line on stdin, then take over", kind=Path)
    parser.option(
        "annotations", "what the local deployment remembers of the decision, as JSON", kind=json.loads, default="{}"
    )
    parser.option("log-file", "where the output goes, for the local deployment to say", default="")
    values = vars(parser.parse_args(arguments))
    values["model_version"] = values["model_version"] or values["model_digest"][:12]
    limits = ServingLimits(**{name: values.pop(name) for name in _LIMIT_OPTIONS})
    return ServerSettings(**values, limits=limits)


class _Parser(argparse.ArgumentParser):
    def __init__(self, environment: Mapping[str, str]):
        super().__init__(
            prog="python -m cifar_assets.serving",
            description="Serve one CIFAR-10 model over HTTP.",
            epilog=f"Each option may come from the environment: --model-uri as {ENVIRONMENT_PREFIX}MODEL_URI.",
            allow_abbrev=False,
        )
        self._environment = environment

    def option(
        self,
        name: str,
        text: str,
        *,
        kind: Callable[[str], Any] = str,
        default: str | None = None,
        required: bool = False,
    ) -> None:
        value = self._environment.get(ENVIRONMENT_PREFIX + name.upper().replace("-", "_"), default)
        self.add_argument(f"--{name}", type=kind, default=value, required=required and value is None, help=text)


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise ValueError(text)
    return port


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds <= 86400:
        raise ValueError(text)
    return seconds
