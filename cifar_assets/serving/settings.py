"""The settings of a server process: command line options, each with an environment variable of the same name."""

import argparse
import os
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, Field, ValidationError

from cifar_assets.contracts import MODEL_NAME
from cifar_assets.dataset.formats.images import ImageLimits
from cifar_assets.model_package import ServedPrecision
from resources.model_signature import PUBLIC_KEY_VARIABLE

ENVIRONMENT_PREFIX = "CIFAR_SERVING_"


class ServingLimits(BaseModel, frozen=True):
    """Limits per request, per connection and in total.

    They count what was received and its actual cost, not what was declared.
    """

    image: ImageLimits = ImageLimits()
    max_header_bytes: int = Field(default=16 * 1024, ge=1, description="bytes of the request line and headers")
    max_headers: int = Field(default=100, ge=1, description="headers of a request")
    max_body_bytes: int = Field(default=16 * 1024 * 1024, ge=1, description="bytes of a body")
    max_images: int = Field(default=64, ge=1, description="images in one request")
    max_pixels: int = Field(default=16 * 1024 * 1024, ge=1, description="pixels of all pictures in one request")
    small_pixels: int = Field(default=128 * 128, ge=0, description="pixels up to which pictures are decoded at once")
    max_connections: int = Field(default=512, ge=1, description="open connections")
    max_pending_requests: int = Field(default=256, ge=1, description="requests answered at a time")
    small_body_bytes: int = Field(default=64 * 1024, ge=0, description="bytes of a body that any connection may hold")
    max_pending_bytes: int = Field(default=32 * 1024 * 1024, ge=1, description="bytes of large bodies together")
    max_pending_pixels: int = Field(default=64 * 1024 * 1024, ge=1, description="pixels that may wait to be decoded")
    queue_images: int = Field(default=512, ge=1, description="images that may wait for the model")
    batch_images: int = Field(default=8, ge=1, description="images in one run of the model")
    header_timeout: float = Field(
        default=10, gt=0, description="seconds from the connection or a later request to the body"
    )
    body_timeout: float = Field(default=30, gt=0, description="seconds from the start of a body to its end")
    stall_timeout: float = Field(
        default=10, gt=0, description="seconds without receiving a body byte or the client reading"
    )
    idle_timeout: float = Field(default=65, gt=0, description="seconds between two requests of a connection")

    @property
    def max_large_requests(self) -> int:
        """The number of pending requests that may have a large body or large pictures."""
        return max(1, self.max_pending_requests // 2)

    def max_json_items(self, image_size: int) -> int:
        """Numbers, lists and objects in a JSON body: enough for the largest batch of nested arrays."""
        rows_and_lists = image_size * (image_size + 1) + 1
        return self.max_images * (image_size * image_size * 3 + rows_and_lists) + 1000


class ServerSettings(ServingLimits, frozen=True):
    """Options of one server process."""

    model_uri: str = Field(description="URI of the model package: file:///... or s3://...")
    model_digest: str = Field(description="required digest of the package")
    precision: ServedPrecision = Field("float32", description="which of the package's models to serve: float32 or int8")
    precision_reason: str = Field("set by the server's options", description="why, for the model's metadata")
    public_key: str = Field(
        "", description=f"serve only what this key signed: PEM or a file; defaults to {PUBLIC_KEY_VARIABLE}"
    )
    model_name: str = Field(MODEL_NAME, min_length=1, description="name of the model in URLs")
    model_version: str = Field("", description="version to report; by default the start of the digest")
    host: str = Field("127.0.0.1", description="address to listen on; pods use ::")
    port: int = Field(8080, ge=0, le=65535, description="port to listen on; defaults to the variable PORT")
    page: bool = Field(True, description="whether browsers get a page for people at /: true or false")
    threads: int | None = Field(None, ge=1, description="threads that run the model; by default one per CPU")
    drain_delay: float = Field(
        0, ge=0, le=86400, description="seconds after SIGTERM in which connections are still accepted"
    )
    linger: float = Field(
        2, ge=0, le=86400, description="seconds after that in which open connections may send requests"
    )
    grace: float = Field(30, ge=0, le=86400, description="seconds after that for requests in progress to finish")
    record_uri: str = Field("", description="URI of the store in which answers are recorded; without it, none are")
    record_fraction: float = Field(0.1, ge=0, le=1, description="fraction of the predictions to record")
    record_per_hour: int = Field(1000, ge=0, description="images to record in an hour at most")
    record_pixels: bool = Field(True, description="record the pixels too, as the model gets them")
    record_interval: float = Field(60, gt=0, le=3600, description="seconds after which records are written")
    feedback: bool = Field(False, description="take labels at /v1/feedback into the record")
    fd: int | None = Field(None, description="descriptor of a listening socket, in place of host and port")
    control_fd: int | None = Field(None, description="descriptor of a local deployment's listening Unix socket")
    control_info: str = Field("{}", description="JSON object to send on that socket")


def parse_settings(arguments: Sequence[str] | None, environment: Mapping[str, str] = os.environ) -> ServerSettings:
    """Settings from the command line, then the environment (CIFAR_SERVING_MODEL_URI and so on), then defaults.

    Exits with a usage message if an option is missing or malformed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m cifar_assets.serving",
        description="Serve one CIFAR-10 model over HTTP.",
        epilog=f"Each option can also be set in the environment: --model-uri as {ENVIRONMENT_PREFIX}MODEL_URI.",
        allow_abbrev=False,
    )
    shared = {"port": "PORT", "public_key": PUBLIC_KEY_VARIABLE}
    values = {name: environment[variable] for name, variable in shared.items() if variable in environment}
    for name, option in ServerSettings.model_fields.items():
        if name == "image":
            continue
        default = "" if option.is_required() or option.default in (None, "") else f" (default: {option.default})"
        parser.add_argument(_option(name), default=argparse.SUPPRESS, help=f"{option.description}{default}")
        if ENVIRONMENT_PREFIX + name.upper() in environment:
            values[name] = environment[ENVIRONMENT_PREFIX + name.upper()]
    values |= vars(parser.parse_args(arguments))
    values["model_version"] = values.get("model_version") or values.get("model_digest", "")[:12]
    try:
        return ServerSettings.model_validate(values)
    except ValidationError as error:
        parser.error("; ".join(f"{_option(str(fault['loc'][0]))}: {fault['msg']}" for fault in error.errors()))


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
