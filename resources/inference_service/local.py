"""The model server as a process of this machine."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from cifar_assets.errors import CifarError, DeployError
from resources.inference_service.interface import (
    DeployedService,
    DeployRequest,
    InferenceServiceResource,
    ServiceStatus,
)

if TYPE_CHECKING:
    from cifar_assets.serving.control import SupervisorState

_ANSWER_SECONDS = 20.0


class LocalInferenceService(InferenceServiceResource):
    """Serves on loopback, from a supervisor process that outlives Dagster.

    `python -m cifar_assets.serving.local status` shows it, `... stop` ends it.
    """

    state_dir: str = Field(default=".cifar/serving", description="Folder of the supervisor's state and of the logs.")
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8080, ge=1, le=65535, description="Port to listen on.")
    startup_timeout_seconds: float = Field(
        default=120.0, gt=0, description="How long a model may take to load, be verified and warm up."
    )

    def deploy(self, request: DeployRequest) -> DeployedService:
        from cifar_assets.serving.control import deploy, start_supervisor
        from cifar_assets.serving.worker import Deployment

        supervisor = start_supervisor(Path(self.state_dir), self.host, self.port)
        deployment = Deployment(request.model_uri, request.model_digest, request.model_version, request.annotations())
        answer = deploy(supervisor, deployment, self.startup_timeout_seconds)
        self._wait_for_answer(supervisor, request.model_digest)
        serving = answer["serving"]
        changed = bool(answer["changed"])
        return DeployedService(
            url=supervisor.url,
            model_digest=request.model_digest,
            model_version=request.model_version,
            previous_digest=answer["previous_digest"] if changed else request.model_digest,
            changed=changed,
            details=_details(answer, serving),
        )

    def status(self) -> ServiceStatus:
        from cifar_assets.serving.client import InferenceClient
        from cifar_assets.serving.control import find_supervisor, status

        supervisor = find_supervisor(Path(self.state_dir))
        if supervisor is None:
            return ServiceStatus(False, None, None, None, f"No model server is running in {self.state_dir}.")
        try:
            found = status(supervisor)
            failure = found["last_failure"]
            reason = f"Model {failure['model_digest']} was refused: {failure['reason']}" if failure else None
            serving = found["serving"]
            if serving is None:
                return ServiceStatus(False, supervisor.url, None, None, reason or "No model was deployed.")
            served = InferenceClient(supervisor.url).served_model()
        except CifarError as error:
            return ServiceStatus(False, supervisor.url, None, None, str(error))
        return ServiceStatus(
            served.ready,
            supervisor.url,
            served.model_digest,
            served.model_version,
            reason,
            _details(found, serving),
        )

    def delete(self) -> bool:
        from cifar_assets.serving.control import stop_supervisor

        return stop_supervisor(Path(self.state_dir))

    def _wait_for_answer(self, supervisor: "SupervisorState", model_digest: str) -> None:
        from cifar_assets.serving.client import InferenceClient, ServerError

        client = InferenceClient(supervisor.url, timeout=5)
        deadline = time.monotonic() + _ANSWER_SECONDS
        found = "no answer"
        while time.monotonic() < deadline:
            try:
                found = client.served_model().model_digest
                if found == model_digest:
                    return
            except ServerError as error:
                found = str(error)
            time.sleep(0.1)
        raise DeployError(
            f"{supervisor.url} does not answer with model {model_digest} though its worker is ready: {found}. "
            f"See the logs in {self.state_dir}."
        )


def _details(found: dict[str, Any], serving: dict[str, Any]) -> dict[str, str]:
    return {
        "deployment": "local process",
        "supervisor_pid": str(found["pid"]),
        "worker_pid": str(serving["pid"]),
        "log_file": serving["log_file"],
    }
