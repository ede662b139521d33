"""All uses of Dagster's private API: the one place to check on an upgrade."""

from dagster._check import CheckError
from dagster._core.definitions.resource_annotation import TreatAsResourceParam
from dagster._core.errors import DagsterPipesExecutionError
from dagster._core.execution.backfill import BulkActionsFilter, BulkActionStatus
from dagster._core.execution.retries import RetryMode
from dagster._core.executor.in_process import InProcessExecutor
from dagster._core.launcher import CheckRunHealthResult, DefaultRunLauncher, WorkerStatus
from dagster._core.pipes.reattach import record_external_launch
from dagster._core.scheduler.instigation import TickStatus
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecordStatus as AssetCheckStatus
from dagster._core.storage.tags import ASSET_RESUME_RETRY_TAG, RESUME_RETRY_TAG
from dagster._utils.interrupts import capture_interrupts, check_captured_interrupt

__all__ = [
    "ASSET_RESUME_RETRY_TAG",
    "RESUME_RETRY_TAG",
    "AssetCheckStatus",
    "BulkActionStatus",
    "BulkActionsFilter",
    "CheckError",
    "CheckRunHealthResult",
    "DagsterPipesExecutionError",
    "DefaultRunLauncher",
    "InProcessExecutor",
    "RetryMode",
    "TickStatus",
    "TreatAsResourceParam",
    "WorkerStatus",
    "capture_interrupts",
    "check_captured_interrupt",
    "record_external_launch",
]
