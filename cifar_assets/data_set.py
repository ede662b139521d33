"""Data sets: what is declared about the images that models are trained on. CIFAR-10 is the default one. No Dagster.

Data sets share the buckets, each below a prefix of its own. CIFAR-10's prefix is the root.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, ValidationError

from cifar_assets.contracts import ImageRequest
from cifar_assets.settings import Address, Settings
from cifar_assets.training.recipes import DEFAULT_RECIPE, RECIPES
from resources.errors import ConfigError
from resources.kubernetes.naming import candidate_name
from resources.mlflow.target import DEFAULT_NAME
from resources.redaction import redacted

RESERVED_NAMES = frozenset(
    ("built", "checkpoints", "imports", "index", "jobs", "landing", "objects", "packs", "parts", "pinned", "pipes")
) | {"predictions", "rejected", "shards", "versions"}
"""Top-level folders of the default data set in the buckets."""

OWN_RESOURCES = ("object_store", "mlflow", "serving", "gate")
"""Keys of the resources that each data set has of its own; the others are shared."""

_PLAIN_PATH = re.compile(r"[\w./~+ -]+")


def _known(recipe: str) -> str:
    if recipe not in RECIPES:
        raise ValueError(f"{recipe!r} does not exist: choose one of {', '.join(sorted(RECIPES))}")
    return recipe


def _free(name: str) -> str:
    if name in RESERVED_NAMES:
        raise ValueError(f"{name!r} is a folder of the default data set: choose another name")
    return name


class DataSet(ImageRequest):
    """A declaration: fields that are left out follow from the images, the name or the settings."""

    model_config = ConfigDict(hide_input_in_errors=True)

    name: Annotated[str, AfterValidator(_free)] = Field(
        pattern=r"^[a-z][a-z0-9]*(_[a-z0-9]+)*$",
        max_length=40,
        description="Prefix of the assets, and name of the model: small letters, digits and single underscores, such "
        "as garden_flowers.",
    )
    source: str = Field(min_length=1, repr=False, description="Raw images, as CIFAR10_SOURCE.")
    recipe: Annotated[str, AfterValidator(_known)] = Field(
        default=DEFAULT_RECIPE, description="Recipe of trainings whose config names none."
    )
    start_from: str | None = Field(
        default=None, description="What trainings with that recipe start from (training.md#fine-tuning)."
    )
    threshold: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False, description="As ACCURACY_THRESHOLD.")
    retrain_config: Mapping[str, Any] = Field(default={}, description="As RETRAIN_CONFIG.")
    port: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description="As INFERENCE_SERVICE_PORT; by default the ports after that one, in the order of the data sets.",
    )
    service: str | None = Field(
        default=None, description="As SERVER_NAME; by default the name with hyphens for underscores."
    )
    url: Address | None = Field(default=None, description="As SERVER_URL.")

    @property
    def is_default(self) -> bool:
        return self.name == DEFAULT_NAME

    @property
    def folder(self) -> str:
        """Prefix of all keys in each bucket: empty, or ending in a slash."""
        return "" if self.is_default else f"{self.name}/"

    def named(self, name: str) -> str:
        """The data set's own variant of the name of a job, sensor, schedule, group, pool or resource."""
        return name if self.is_default else f"{self.name}_{name}"


def default_data_set(settings: Settings) -> DataSet:
    """CIFAR-10, or the images that CIFAR10_SOURCE names in its place."""
    return DataSet(
        name=DEFAULT_NAME,
        source=settings.cifar10_source,
        threshold=settings.accuracy_threshold,
        retrain_config=settings.retrain_config,
        port=settings.inference_service_port,
        service=settings.server_name,
        url=settings.server_url,
    )


def read_data_sets(settings: Settings) -> list[DataSet]:
    """The default data set, and those that DATA_SETS declares. ConfigError names place, data set and field."""
    default = default_data_set(settings)
    if not settings.data_sets:
        return [default]
    place, declared = _parse(settings.data_sets)
    found = [default]
    for number, fields in enumerate(declared, 1):
        port = settings.inference_service_port + number
        try:
            found.append(DataSet.model_validate(_completed(fields, port)))
        except ValidationError as error:
            name = fields.get("name") if isinstance(fields, Mapping) else None
            problems = "; ".join(map(_problem, error.errors()))
            raise ConfigError(f"{place}: data set {name or f'number {number}'} is not valid. {problems}.") from None
    for field in ("name", "port", "service"):
        counts = Counter(getattr(each, field) for each in found)
        if twice := [value for value, count in counts.items() if count > 1]:
            names = ", ".join(each.name for each in found if getattr(each, field) == twice[0])
            raise ConfigError(
                f"{place}: several data sets have the {field} {twice[0]} ({names}; {DEFAULT_NAME} is declared by the "
                f"settings). Give each its own {field}."
            )
    services = {each.service: each.name for each in found}
    for each in found:
        canary = candidate_name(str(each.service))
        if canary in services:
            raise ConfigError(
                f"{place}: the service {canary} of data set {services[canary]} has the name that the canary of data "
                f"set {each.name} gets. Give {services[canary]} another service."
            )
    return found


def find_data_set(settings: Settings, name: str) -> DataSet:
    """The declared data set of this name. ConfigError if there is none."""
    found = {each.name: each for each in read_data_sets(settings)}
    if name not in found:
        raise ConfigError(f"There is no data set {name!r}: choose one of {', '.join(found)}, or set DATA_SETS.")
    return found[name]


def _parse(value: str) -> tuple[str, Sequence[Any]]:
    """Where the declarations are, and their parsed YAML: the value itself, or the file that it names."""
    import yaml

    place, text = "DATA_SETS", value
    if "\n" not in value and not value.startswith(("[", "-")):
        if _PLAIN_PATH.fullmatch(value):  # anything else may be a declaration, with credentials
            place = f"DATA_SETS ({value})"
        try:
            text = Path(value).read_text()
        except (OSError, ValueError) as error:
            why = (error.strerror if isinstance(error, OSError) else None) or "it is not text"
            raise ConfigError(f"{place}: the file cannot be read ({why}). Name a YAML file, or unset it.") from None
    try:
        declared = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:  # shows the line's content, and so credentials
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{place} is not valid YAML: {line}{redacted(error.problem)}") from None
    except yaml.YAMLError:
        raise ConfigError(f"{place} is not valid YAML: it has characters that are not allowed.") from None
    if not isinstance(declared, list):
        raise ConfigError(f"{place}: expected a list of data sets, each with at least `name` and `source`.")
    return place, declared


def _completed(fields: Any, port: int) -> Any:
    if not isinstance(fields, Mapping):
        return fields
    service = str(fields.get("name", "")).replace("_", "-")
    return {"port": port, "service": service, **{name: value for name, value in fields.items() if value is not None}}


def _problem(details: Any) -> str:
    name = ".".join(map(str, details["loc"]))
    if details["type"] == "extra_forbidden":
        return f"{name}: there is no such field; choose from {', '.join(DataSet.model_fields)}"
    about = field.description if (field := DataSet.model_fields.get(name.partition(".")[0])) else ""
    return f"{name or 'it'}: {details['msg'].removeprefix('Value error, ')} ({(about or '').rstrip('.')})"
