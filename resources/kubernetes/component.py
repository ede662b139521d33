"""Base of Dagster components that define, in YAML, assets that a job produces."""

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import dagster as dg
from pydantic import ValidationError

from resources.kubernetes.errors import SettingsError
from resources.kubernetes.job_config import JobConfig
from resources.kubernetes.pipes import PipesJobClient
from resources.object_store import open_store


@dataclass
class PipesJobComponent(dg.Component, dg.Resolvable, ABC):
    """Assets of one step, which runs a job and reads its Pipes messages. A kind sets the two class attributes."""

    name: str
    """Name of the step and prefix of its jobs' names."""
    assets: Sequence[dg.ResolvedAssetSpec]
    """Assets that the job produces and reports through Pipes."""
    job: Mapping[str, Any]
    """Fields of the kind's config, such as image, command and replicas."""
    message_store: str
    """URI of the folder for Pipes messages, such as s3://bucket/pipes. The pods need its credentials."""
    namespace: str | None = None
    """Namespace of the jobs; by default that of the pod or `default`."""
    extras: Mapping[str, Any] | None = None
    """Pipes extras for the job's process."""

    client_class: ClassVar[type[PipesJobClient[Any]]]
    config_class: ClassVar[type[JobConfig]]

    def __post_init__(self) -> None:
        self.config()

    def config(self) -> JobConfig:
        """The job's settings. SettingsError names each invalid field."""
        try:
            return self.config_class(**self.job)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
            raise SettingsError(
                f"Component {self.name}: `job` is not a valid {self.config_class.__name__}. {problems}."
            ) from error

    def client(self) -> PipesJobClient[Any]:
        """The Pipes client; connects when it runs a job."""
        return self.client_class(message_store=open_store(self.message_store), namespace=self.namespace)

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        @dg.multi_asset(name=self.name, specs=self.assets)
        def run_job(context: dg.AssetExecutionContext) -> Sequence[Any]:
            extras = dict(self.extras or {})
            done = self.client().run(context=context, config=self.config(), extras=extras, name_prefix=self.name)
            return done.get_results()

        return dg.Definitions(assets=[run_job])
