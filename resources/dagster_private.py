"""What is used of Dagster that it does not publish: the one place to check at an upgrade."""

from dagster._core.definitions.resource_annotation import TreatAsResourceParam
from dagster._core.execution.backfill import BulkActionsFilter, BulkActionStatus
from dagster._core.execution.retries import RetryMode
from dagster._core.launcher import CheckRunHealthResult, DefaultRunLauncher, WorkerStatus
from dagster._core.pipes.reattach import find_latest_launch_handle, record_external_launch, record_external_reattach
from dagster._core.storage.tags import ASSET_RESUME_RETRY_TAG, RESUME_RETRY_TAG
from dagster._utils.interrupts import capture_interrupts, check_captured_interrupt

__all__ = [
    "ASSET_RESUME_RETRY_TAG",
    "RESUME_RETRY_TAG",
    "BulkActionStatus",
    "BulkActionsFilter",
    "CheckRunHealthResult",
    "DefaultRunLauncher",
    "RetryMode",
    "TreatAsResourceParam",
    "WorkerStatus",
    "capture_interrupts",
    "check_captured_interrupt",
    "find_latest_launch_handle",
    "record_external_launch",
    "record_external_reattach",
]
