"""The settings of a server process: command line options, each with an environment variable of the same name."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel, Field, ValidationError

from cifar_assets.contracts import IMAGE_SIZE, MODEL_NAME
from cifar_assets.dataset.formats.images import ImageLimits
from cifar_assets.serving.answers import ModelIdentity

ENVIRONMENT_PREFIX = "CIFAR_SERVING_"


@dataclass(frozen=True)
class ServingLimits:
    """How much one request, one connection and all of them together may cost.

    Sizes are bytes, times are seconds. What counts is what came and what it costs, not what was declared.
    """

    image: ImageLimits = field(default_factory=ImageLimits)
    max_header_bytes: int = 16 * 1024
    """Request line and headers, and trailers after a chunked body."""
    max_headers: int = 100
    max_body_bytes: int = 16 * 1024 * 1024
    max_images: int = 64
    """Images in one request."""
    max_pixels: int = 16 * 1024 * 1024
    """Pixels of all pictures in one request, before they are scaled down."""
    small_pixels: int = 128 * 128
    """Pictures up to this size are decoded on the event loop: it takes about as long as the rest of a request."""
    max_connections: int = 512
    """One more takes the place of the connection that has waited longest for its client."""
    max_pending_requests: int = 256
    """Complete requests that are being answered at the same time."""
    small_body_bytes: int = 64 * 1024
    """Every connection may hold this much of a body; only what is beyond it counts as pending."""
    max_pending_bytes: int = 32 * 1024 * 1024
    """Large bodies together; this keeps a pod within its memory."""
    max_pending_pixels: int = 4 * 16 * 1024 * 1024
    """Pixels of large pictures that wait to be decoded."""
    queue_images: int = 512
    """Images waiting for the model."""
    batch_images: int = 16
    """Images in one run of the model."""
    header_timeout: float = 10.0
    """From the first byte of a request to the end of its headers."""
    body_timeout: float = 30.0
    """From the end of the headers to the end of the body."""
    stall_timeout: float = 10.0
    """Without a byte of a body, or without a client that reads its answer."""
    idle_timeout: float = 65.0
    """Between two requests of a connection."""

    @property
    def max_large_requests(self) -> int:
        """Those of the pending requests that may have a large body or large pictures."""
        return max(1, self.max_pending_requests // 2)

    @property
    def max_json_items(self) -> int:
        """Numbers, lists and objects in a JSON body: enough for the largest batch of nested arrays."""
        rows_and_lists = IMAGE_SIZE * (IMAGE_SIZE + 1) + 1
        return self.max_images * (IMAGE_SIZE * IMAGE_SIZE * 3 + rows_and_lists) + 1000


class ServerSettings(BaseModel, frozen=True):
    """Options of one server process. Times are seconds."""

    model_uri: str = Field(description="where the model package is: file:///... or s3://...")
    model_digest: str = Field(description="the digest the package must have")
    model_version: str = Field("", description="version to report; by default the start of the digest")
    host: str = Field("127.0.0.1", description="address to listen on; a pod passes ::")
    port: int = Field(8080, ge=0, le=65535, description="port to listen on; PORT of the environment is a default")
    threads: int | None = Field(None, ge=1, description="threads of one run of the model; by default one per CPU")
    batch_images: int = Field(ServingLimits.batch_images, ge=1, description="images in one run of the model")
    queue_images: int = Field(ServingLimits.queue_images, ge=1, description="images that may wait")
    max_pending_requests: int = Field(
        ServingLimits.max_pending_requests, ge=1, description="requests answered at a time"
    )
    max_connections: int = Field(ServingLimits.max_connections, ge=1, description="open connections")
    drain_delay: float = Field(
        0, ge=0, le=86400, description="seconds to accept after SIGTERM, with readiness saying no"
    )
    linger: float = Field(2, ge=0, le=86400, description="seconds that open connections may then bring requests")
    grace: float = Field(30, ge=0, le=86400, description="seconds that requests in progress may then take")
    fd: int | None = Field(None, description="descriptor of a listening socket, in place of host and port")
    control_fd: int | None = Field(None, description="descriptor of a local deployment's listening Unix socket")
    control_info: str = Field("{}", description="what to answer on that socket, a JSON object")

    @property
    def identity(self) -> ModelIdentity:
        return ModelIdentity(MODEL_NAME, self.model_version, self.model_digest)

    @property
    def limits(self) -> ServingLimits:
        names = ("batch_images", "queue_images", "max_pending_requests", "max_connections")
        return ServingLimits(**{name: getattr(self, name) for name in names})


def parse_settings(arguments: Sequence[str] | None, environment: Mapping[str, str] = os.environ) -> ServerSettings:
    """Settings from the command line, then the environment (CIFAR_SERVING_MODEL_URI and so on), then defaults.

    Exits with a usage message for what is missing or malformed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m cifar_assets.serving",
        description="Serve one CIFAR-10 model over HTTP.",
        epilog=f"Each option may come from the environment: --model-uri as {ENVIRONMENT_PREFIX}MODEL_URI.",
        allow_abbrev=False,
    )
    values: dict[str, str] = {"port": environment["PORT"]} if "PORT" in environment else {}
    for name, option in ServerSettings.model_fields.items():
        default = "" if option.is_required() or option.default in (None, "") else f" (default: {option.default})"
        help_text = f"{option.description}{default}".replace("%", "%%")
        parser.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, help=help_text)
        variable = ENVIRONMENT_PREFIX + name.upper()
        if variable in environment:
            values[name] = environment[variable]
    values |= vars(parser.parse_args(arguments))
    values["model_version"] = values.get("model_version") or values.get("model_digest", "")[:12]
    try:
        return ServerSettings(**values)  # pyright: ignore[reportArgumentType] - pydantic converts and checks the texts
    except ValidationError as error:
        parser.error("; ".join(f"--{str(e['loc'][0]).replace('_', '-')}: {e['msg']}" for e in error.errors()))
