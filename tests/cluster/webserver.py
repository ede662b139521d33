"""Dagster's webserver as its UI uses it: GraphQL over HTTP."""

import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

LOCATION = {"repositoryLocationName": "cifar", "repositoryName": "__repository__"}
FINISHED = ("SUCCESS", "FAILURE", "CANCELED")
_RUN = "runId status jobName parentRunId creationTime endTime tags { key value } stepStats { stepKey status }"


@dataclass(frozen=True)
class Run:
    """The state of a run at one time."""

    id: str
    status: str
    job: str
    parent: str | None
    tags: dict[str, str]
    steps: dict[str, str]
    created: float
    ended: float | None

    @classmethod
    def of(cls, answer: dict[str, Any]) -> "Run":
        return cls(
            answer["runId"],
            answer["status"],
            answer["jobName"],
            answer["parentRunId"],
            {tag["key"]: tag["value"] for tag in answer["tags"]},
            {step["stepKey"]: step["status"] for step in answer["stepStats"]},
            answer["creationTime"],
            answer["endTime"],
        )


class Webserver:
    """The webserver at an address."""

    def __init__(self, url: str):
        self.url = url

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read().decode()

    def ask(self, query: str, **variables: Any) -> dict[str, Any]:
        """The data of the response. A query, unlike a mutation, is repeated if its connection breaks."""
        attempts = 1 if query.startswith("mutation") else 5
        for attempt in range(1, attempts + 1):
            try:
                return self._post({"query": query, "variables": variables})
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                if attempt == attempts:
                    raise
                time.sleep(2)
        raise AssertionError

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + "/graphql", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        assert "errors" not in answer, answer["errors"]
        return answer["data"]

    def unhealthy_daemons(self) -> list[str]:
        """Daemons that must run and have no recent heartbeat, or report errors."""
        asked = self.ask(
            "{ instance { daemonHealth { allDaemonStatuses "
            "{ daemonType required healthy lastHeartbeatErrors { message } } } } }"
        )
        found = asked["instance"]["daemonHealth"]["allDaemonStatuses"]
        assert found
        return [f"{d['daemonType']}: {d['lastHeartbeatErrors']}" for d in found if d["required"] and not d["healthy"]]

    def locations(self) -> dict[str, str]:
        """The response of each code location: "RepositoryLocation", or an error's message."""
        asked = self.ask(
            "{ workspaceOrError { ... on Workspace { locationEntries "
            "{ name locationOrLoadError { __typename ... on PythonError { message } } } } } }"
        )
        entries = asked["workspaceOrError"]["locationEntries"]
        found = {entry["name"]: entry["locationOrLoadError"] or {"__typename": "loading"} for entry in entries}
        return {name: answer.get("message", answer["__typename"]) for name, answer in found.items()}

    def materialize(self, *keys: str, config: dict[str, Any] | None = None) -> str:
        """Launch a run of these assets, without their checks. Returns its id."""
        selection = [{"path": key.split("/")} for key in keys]
        return self._launch({"jobName": "__ASSET_JOB", "assetSelection": selection, "assetCheckSelection": []}, config)

    def launch(self, job: str, config: dict[str, Any] | None = None) -> str:
        """Launch a run of a job, with its checks. Returns its id."""
        return self._launch({"jobName": job}, config)

    def _launch(self, selector: dict[str, Any], config: dict[str, Any] | None) -> str:
        asked = self.ask(
            "mutation ($p: ExecutionParams!) { launchRun(executionParams: $p) { __typename "
            "... on LaunchRunSuccess { run { runId } } ... on PythonError { message } "
            "... on RunConfigValidationInvalid { errors { message } } } }",
            p={"selector": {**LOCATION, **selector}, "runConfigData": config or {}, "mode": "default"},
        )
        assert asked["launchRun"]["__typename"] == "LaunchRunSuccess", asked
        return asked["launchRun"]["run"]["runId"]

    def run(self, run_id: str) -> Run:
        asked = self.ask(f"query ($i: ID!) {{ runOrError(runId: $i) {{ ... on Run {{ {_RUN} }} }} }}", i=run_id)
        return Run.of(asked["runOrError"])

    def runs(self) -> list[Run]:
        """The latest runs, newest first."""
        asked = self.ask(f"{{ runsOrError(limit: 20) {{ ... on Runs {{ results {{ {_RUN} }} }} }} }}")
        return [Run.of(answer) for answer in asked["runsOrError"]["results"]]

    def check_passed(self, run_id: str, name: str) -> bool | None:
        """Whether an asset check passed in a run; None if it was not evaluated."""
        asked = self.ask(
            "query ($i: ID!) { logsForRun(runId: $i) { ... on EventConnection { events "
            "{ ... on AssetCheckEvaluationEvent { evaluation { checkName success } } } } } }",
            i=run_id,
        )
        found = [event["evaluation"] for event in asked["logsForRun"]["events"] if event]
        return next((evaluation["success"] for evaluation in found if evaluation["checkName"] == name), None)

    def failures(self, run_id: str) -> list[str]:
        """Why a run and its steps failed."""
        error = "error { message cause { message cause { message } } }"
        asked = self.ask(
            "query ($i: ID!) { logsForRun(runId: $i) { ... on EventConnection { events { "
            f"... on RunFailureEvent {{ message {error} }} ... on ExecutionStepFailureEvent {{ message {error} }} "
            f"... on ExecutionStepUpForRetryEvent {{ message {error} }} }} }} }} }}",
            i=run_id,
        )
        return [json.dumps(event) for event in asked["logsForRun"]["events"] if event]

    def num_ticks(self, sensor: str) -> int:
        """Number of completed evaluations of a sensor by the daemon."""
        asked = self.ask(
            "query ($s: SensorSelector!) { sensorOrError(sensorSelector: $s) { ... on Sensor { sensorState "
            "{ ticks(limit: 1000) { status } } } } }",
            s={**LOCATION, "sensorName": sensor},
        )
        ticks = asked["sensorOrError"]["sensorState"]["ticks"]
        return sum(tick["status"] in ("SUCCESS", "SKIPPED") for tick in ticks)

    def cursor(self, sensor: str) -> str | None:
        asked = self.ask(
            "query ($s: SensorSelector!) { sensorOrError(sensorSelector: $s) { ... on Sensor { sensorState "
            "{ typeSpecificData { ... on SensorData { lastCursor } } } } } }",
            s={**LOCATION, "sensorName": sensor},
        )
        state = asked["sensorOrError"]["sensorState"]["typeSpecificData"]
        return state and state["lastCursor"]

    def cancel(self, run_id: str) -> None:
        asked = self.ask(
            "mutation ($i: String!) { terminateRun(runId: $i) { __typename ... on TerminateRunFailure { message } "
            "... on PythonError { message } } }",
            i=run_id,
        )
        assert asked["terminateRun"]["__typename"] == "TerminateRunSuccess", asked

    def compute_logs(self, run_id: str) -> dict[str, tuple[str, str]]:
        """What each process of a run printed to standard error, by step, and where that is stored."""
        asked = self.ask(
            "query ($i: ID!) { logsForRun(runId: $i) { ... on EventConnection { events "
            "{ ... on LogsCapturedEvent { fileKey stepKeys } } } } }",
            i=run_id,
        )
        found: dict[str, tuple[str, str]] = {}
        for event in asked["logsForRun"]["events"]:
            if event:
                key = [run_id, "compute_logs", event["fileKey"]]
                logs = self.ask(
                    "query ($k: [String!]!) { capturedLogs(logKey: $k) { stderr } "
                    "capturedLogsMetadata(logKey: $k) { stderrLocation } }",
                    k=key,
                )
                text, where = logs["capturedLogs"]["stderr"], logs["capturedLogsMetadata"]["stderrLocation"]
                found.update(dict.fromkeys(event["stepKeys"], (text or "", where or "")))
        return found

    def materialization(self, key: str, run_id: str) -> dict[str, Any] | None:
        """Metadata numbers of an asset's materialization in a run; None before there is one."""
        asked = self.ask(
            "query ($k: AssetKeyInput!) { assetNodeOrError(assetKey: $k) { ... on AssetNode { "
            "assetMaterializations(limit: 5) { runId metadataEntries { label ... on IntMetadataEntry { intValue } } "
            "} } } }",
            k={"path": key.split("/")},
        )
        for made in asked["assetNodeOrError"]["assetMaterializations"]:
            if made["runId"] == run_id:
                return {entry["label"]: entry.get("intValue") for entry in made["metadataEntries"]}
        return None

    def materializations(self, key: str) -> list[tuple[str, str]]:
        """Run and time of each of an asset's materializations, newest first."""
        asked = self.ask(
            "query ($k: AssetKeyInput!) { assetNodeOrError(assetKey: $k) { ... on AssetNode { "
            "assetMaterializations(limit: 20) { runId timestamp } } } }",
            k={"path": key.split("/")},
        )
        return [(made["runId"], made["timestamp"]) for made in asked["assetNodeOrError"]["assetMaterializations"]]
