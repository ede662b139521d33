"""What the steps check: is every object what its digest says, and does it pass what blocks in Dagster?"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_assets.dataset.stores import Stores
from cifar_assets.dataset.versions.processed import ProcessedManifest, read_processed
from cifar_assets.dataset.versions.raw import read_raw
from cifar_assets.dataset.versions.reader import open_split
from cifar_assets.dataset.versions.splits import SPLIT_NAMES
from cifar_assets.dataset.versions.verdicts import judge_processed, judge_raw
from cifar_assets.gate import ACCURACY_CHECK, check_made_by, judge, judge_model
from cifar_assets.model_package import read_file
from cifar_assets.pipeline_steps.plan import Plan
from resources.errors import DataError, ObjectNotFoundError
from resources.object_store import ObjectStore
from resources.verdict import Judges, Verdict, objections


def verify_raw(raw: ObjectStore, digest: str) -> int:
    """The number of images of a raw version; DataError with the reasons where it fails what blocks in Dagster."""
    manifest = read_raw(raw, digest)
    _require(judge_raw(raw, digest), f"Raw version {digest}")
    return manifest.rows


def verify_processed(stores: Stores, digest: str, raw_digest: str) -> ProcessedManifest:
    """Open every split, which compares each file's digest, and ask what blocks in Dagster.

    DataError where the manifest belongs to other raw data, or counts other images than there are.
    """
    manifest = read_processed(stores.processed, digest)
    if manifest.raw_digest != raw_digest:
        raise DataError(
            f"Processed version {digest} was made from raw version {manifest.raw_digest}, expected {raw_digest}: "
            "materialize cifar10/processed_dataset again."
        )
    for split in SPLIT_NAMES:
        with tempfile.TemporaryDirectory(prefix="cifar-verify-") as fresh:  # what is compared comes from the store
            rows = len(open_split(stores.processed, digest, split, Path(fresh)))
        if rows != manifest.count(split):
            raise DataError(
                f"The {split} split of processed version {digest} has {rows} images where its manifest counts "
                f"{manifest.count(split)}: materialize cifar10/processed_dataset again."
            )
    _require(judge_processed(stores.raw, stores.processed, digest), f"Processed version {digest}")
    return manifest


def _require(judges: Judges, what: str) -> None:
    if reasons := objections(judges):
        raise DataError(f"{what} is refused. {' '.join(reasons)}")


@dataclass(frozen=True)
class ModelReport:
    """The result of the run, which its last step writes for those who wait for it."""

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
