"""The last step: is the model that this run's training made stored whole, and may it be served?"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cifar_assets.gate import ACCURACY_CHECK, check_made_by, judge, judge_model
from cifar_assets.model_package import read_file
from cifar_assets.pipeline_steps.plan import Plan
from resources.errors import ObjectNotFoundError
from resources.object_store import ObjectStore
from resources.verdict import Verdict, objections


@dataclass(frozen=True)
class ModelReport:
    """What the run came to, as its last step tells those who wait for it."""

    result: Mapping[str, Any]
    """The trainer's own final message: digest, URI, MLflow run, version, and what it was resumed from."""
    verdict: Verdict

    def to_json(self) -> str:
        verdict = {"passed": self.verdict.passed, "reason": self.verdict.reason, **self.verdict.numbers}
        return json.dumps({"version": 1, **self.result, **verdict}, sort_keys=True)


def verify_model(models: ObjectStore, plan: Plan, threshold: float) -> ModelReport:
    """The report on the model that this run's training says it made; every covered file is read and compared.

    The verdict is that of the checks that block in Dagster. It decides how the workflow ends; Dagster deploys on its
    own record, never on this.

    ObjectNotFoundError where there is none, IntegrityError for a changed file, DataError for a model of another
    dataset, recipe or seed than the run's. A model that is refused is not an error here: the verdict says so.
    """
    result = training_result(models, plan)
    digest = str(result["model_digest"])
    manifest, verdict = judge(models, digest, threshold)
    package = models.at(digest)
    for name in manifest.files:
        read_file(package, manifest, name)
    check_made_by(plan.spec, models, digest)
    others = {name: judge for name, judge in judge_model(models, digest, threshold).items() if name != ACCURACY_CHECK}
    return ModelReport(result, verdict.and_no(objections(others)))


def training_result(models: ObjectStore, plan: Plan) -> Mapping[str, Any]:
    """The last final message of the run's training. ObjectNotFoundError when it left none."""
    result: Mapping[str, Any] | None = None
    for info in models.list(plan.messages_prefix):
        for line in models.read(info.key).decode().splitlines():
            message = json.loads(line)
            payload = (message.get("params") or {}).get("payload") or {}
            if message["method"] == "report_custom_message" and payload.get("type") == "result":
                result = {name: value for name, value in payload.items() if name not in ("type", "mlflow_unsent")}
    if result is None:
        raise ObjectNotFoundError(
            f"The training of run {plan.run} reported no model in {models.uri(plan.messages_prefix)}: "
            "it ended early, or its log says why."
        )
    return result
