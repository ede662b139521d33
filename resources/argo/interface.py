"""The interface shared by all ways to run the four steps."""

import json
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import dagster as dg

from resources.errors import TrainingError
from resources.trainer.interface import TrainingResult
from resources.verdict import Verdict


@dataclass(frozen=True)
class PipelineRequest:
    """The training and the threshold of one run of the steps."""

    dataset_digest: str
    recipe: str
    overrides: Mapping[str, Any]
    execution: Mapping[str, Any]
    seed: int
    replicas: int
    threshold: float | None
    """Lowest test accuracy; None for the default of the steps."""

    def parameters(self) -> dict[str, str]:
        """The request as workflow parameters."""
        return {
            "dataset": self.dataset_digest,
            "recipe": self.recipe,
            "overrides": json.dumps(self.overrides),
            "execution": json.dumps(self.execution),
            "seed": str(self.seed),
            "replicas": str(self.replicas),
            "threshold": "" if self.threshold is None else str(self.threshold),
        }


@dataclass(frozen=True)
class PipelineResult:
    """The model made by a run of the steps, and the verdict of its last step."""

    run: str
    training: TrainingResult
    verdict: Verdict


def parse_result(run: str, text: str) -> PipelineResult:
    """The result from the last step's report. TrainingError for an invalid report."""
    try:
        report = json.loads(text)
        if report.get("version", 1) != 1:
            raise ValueError(f"its version is {report['version']}, expected 1")
        fields = ("model_digest", "model_uri", "mlflow_run_id", "mlflow_model_version", "resumed_from")
        training = TrainingResult(**{name: report[name] for name in fields})
        numbers = {name: report[name] for name in ("test_accuracy", "threshold")}
        return PipelineResult(run, training, Verdict(report["passed"], report["reason"], numbers))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"{run} reported a model as {text!r}, which cannot be read: {error}") from error


class PipelineResource(dg.ConfigurableResource):
    """Runs the pipeline's four steps outside Dagster and waits for them."""

    @abstractmethod
    def run(self, context: dg.AssetExecutionContext, request: PipelineRequest) -> PipelineResult:
        """Run the steps to the end.

        A model below the threshold is a normal result. TrainingError or dg.Failure names the failed step, the reason
        and its last log lines; canceling the Dagster run ends the steps.
        """
