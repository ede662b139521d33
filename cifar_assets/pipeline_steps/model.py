"""The last step: is the model that this run's training made stored whole, and may it be served?"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cifar_assets.errors import DataError, ObjectNotFoundError
from cifar_assets.gate import Verdict, judge
from cifar_assets.model_package import RECIPE_FILE, read_file, read_json
from cifar_assets.object_store import ObjectStore
from cifar_assets.pipeline_steps.plan import Plan


@dataclass(frozen=True)
class ModelReport:
    """What the run came to, as its last step tells those who wait for it."""

    result: Mapping[str, Any]
    """The trainer's own final message: digest, URI, MLflow run, version, and what it was resumed from."""
    verdict: Verdict

    def to_json(self) -> str:
        verdict = {"passed": self.verdict.passed, "reason": self.verdict.reason}
        numbers = {"test_accuracy": self.verdict.test_accuracy, "threshold": self.verdict.threshold}
        return json.dumps({**self.result, **numbers, **verdict}, sort_keys=True)


def verify_model(models: ObjectStore, plan: Plan, threshold: float) -> ModelReport:
    """The report on the model that this run's training says it made; every covered file is read and compared.

    ObjectNotFoundError where there is none, IntegrityError for a changed file, DataError for a model of another
    dataset, recipe or seed than the run's. A model below the threshold is no error here: the verdict says it.
    """
    result = training_result(models, plan)
    digest = str(result["model_digest"])
    manifest, verdict = judge(models, digest, threshold)
    package = models.at(digest)
    for name in manifest.files:
        read_file(package, manifest, name)
    expected = {
        "dataset": plan.spec.dataset_digest,
        "seed": plan.spec.seed,
        "recipe": plan.spec.recipe.model_dump(mode="json"),
    }
    found = {
        "dataset": manifest.dataset_digest,
        "seed": manifest.seed,
        "recipe": read_json(package, manifest, RECIPE_FILE),
    }
    for what, value in expected.items():
        if found[what] != value:
            raise DataError(f"Model {digest} has {what} {found[what]}, this run asked for {value}.")
    return ModelReport(result, verdict)


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
