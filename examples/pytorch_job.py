"""An asset that trains in a Kubeflow PyTorchJob and gets its result back through Dagster Pipes. No CIFAR code.

To use this elsewhere, copy `resources`. The image needs the same folder on its PYTHONPATH, dagster-pipes and, for an
object store, minio. From the repository's root, with KUBECONFIG set:

    export EXAMPLE_IMAGE=registry.example/train:1 EXAMPLE_STORE=s3://bucket/pipes EXAMPLE_NAMESPACE=training
    dagster asset materialize -f examples/pytorch_job.py --select language_model

Both sides open the store: this process by its AWS_... variables, the pods by those in the Secret `object-store`.
"""

import dagster as dg
from pydantic import Field

from resources.object_store import open_store
from resources.pytorch_job import PipesPyTorchJobClient, PyTorchJobConfig, build_pytorch_job_manifest

SCRIPT = """
import os

from dagster_pipes import open_dagster_pipes

from resources.pipes_store import PipesStoreMessageWriter

if os.environ.get("RANK", "0") == "0":
    with open_dagster_pipes(message_writer=PipesStoreMessageWriter()) as pipes:
        loss = 1.0
        for epoch in range(pipes.get_extra("epochs")):
            loss /= 2
            pipes.log.info(f"epoch {epoch}: loss {loss}")
        pipes.report_asset_materialization(metadata={"loss": loss})
"""
"""What every replica runs. A project of its own would have it in the image."""


class PyTorchJobs(dg.ConfigurableResource):
    """Where the jobs run, and through which object store their messages travel."""

    image: str = Field(description="Image of the replicas.")
    store: str = Field(description="URI of a folder in an object store, such as s3://bucket/pipes.")
    namespace: str = Field(description="Namespace of the jobs.")

    def client(self) -> PipesPyTorchJobClient:
        """The Pipes client; connects when it runs a job."""
        return PipesPyTorchJobClient(message_store=open_store(self.store), namespace=self.namespace)

    def job_config(self) -> PyTorchJobConfig:
        """A job of one master and one worker."""
        command = ["python", "-c", SCRIPT]
        return PyTorchJobConfig(
            image=self.image, command=command, replicas=2, memory="128Mi", env_secrets=["object-store"]
        )

    def manifest(self) -> dict[str, object]:
        """The job without what a Dagster run adds to it, to look at or for kubectl."""
        return build_pytorch_job_manifest(self.job_config(), name="example", namespace=self.namespace)


@dg.asset
def language_model(context: dg.AssetExecutionContext, pytorch_jobs: PyTorchJobs) -> dg.MaterializeResult:
    """A model that is only a number."""
    invocation = pytorch_jobs.client().run(context=context, config=pytorch_jobs.job_config(), extras={"epochs": 3})
    return invocation.get_materialize_result()


defs = dg.Definitions(
    assets=[language_model],
    resources={
        "pytorch_jobs": PyTorchJobs(
            image=dg.EnvVar("EXAMPLE_IMAGE"),
            store=dg.EnvVar("EXAMPLE_STORE"),
            namespace=dg.EnvVar("EXAMPLE_NAMESPACE"),
        )
    },
)
