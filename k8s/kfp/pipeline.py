"""The four steps as a Kubeflow pipeline (KFP v2). `python k8s/kfp/pipeline.py` compiles it into pipeline.yaml beside.

Each step calls the same command as the Argo workflow's; the training runs in its step's own pod. Functions below are
taken apart by KFP and run on their own: what they need, they import.
"""

# No postponed annotations: KFP reads the types.
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from kfp import compiler, dsl, kubernetes

IMAGE = "localhost/cifar-kfp:dev"
ENDPOINT = {name: name for name in ("AWS_ENDPOINT_URL", "AWS_REGION", "CIFAR_BUCKET_PREFIX", "MLFLOW_TRACKING_URI")}
OPTIONAL = {name: name for name in ("MODEL_PUBLIC_KEY", "AWS_CA_BUNDLE", "MLFLOW_TRACKING_SERVER_CERT_PATH")}
CREDENTIALS = {name: name for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}


def _step(function: Callable[..., str]) -> Callable[..., Any]:
    """The function as a step in our image: called in a pipeline it gives the step, not what it returns there."""
    return dsl.component(function, base_image=IMAGE, install_kfp_package=False)


@_step
def verify_data(
    store: str, run: str, dataset: str, recipe: str, overrides: str, execution: str, seed: int, outputs: str
) -> str:
    """Name the data by digest and compare every raw object; gives the plan."""
    from pathlib import Path

    from cifar_assets.pipeline_steps.__main__ import main

    asked = [f"--run={run}", f"--dataset={dataset}", f"--recipe={recipe}", f"--overrides={overrides}"]
    asked += [f"--execution={execution}", f"--seed={seed}", f"--outputs={outputs}/{run}"]
    if code := main(["--store", store, "data", *asked]):
        raise SystemExit(code)
    return Path(outputs, run, "plan").read_text()


@_step
def verify_processed(store: str, plan: str) -> str:
    """Compare every file of the processed version with its manifest; gives the plan on."""
    from cifar_assets.pipeline_steps.__main__ import main

    if code := main(["--store", store, "processed", f"--plan={plan}"]):
        raise SystemExit(code)
    return plan


@_step
def train(store: str, plan: str) -> str:
    """Train in this pod; gives the plan on."""
    import subprocess
    import sys

    # A process of its own: the step `train` becomes the trainer and never returns.
    command = [sys.executable, "-m", "cifar_assets.pipeline_steps", "--store", store, "train", f"--plan={plan}"]
    if code := subprocess.run(command, check=False).returncode:
        raise SystemExit(code)
    return plan


@_step
def verify_model(store: str, plan: str, threshold: str, outputs: str) -> str:
    """Compare every file of the model and hold it against the threshold; gives the report as JSON."""
    import json
    from pathlib import Path

    from cifar_assets.pipeline_steps.__main__ import main

    folder = Path(outputs, json.loads(plan)["run"])
    if code := main(["--store", store, "model", f"--plan={plan}", f"--threshold={threshold}", f"--outputs={folder}"]):
        raise SystemExit(code)
    return (folder / "model").read_text()


@dsl.pipeline(name="cifar10-pipeline", description="CIFAR-10: verify the data, train, verify the model.")
def cifar10_pipeline(
    dataset: str = "current",
    recipe: str = "fast",
    overrides: str = "{}",
    execution: str = "{}",
    seed: int = 0,
    threshold: str = "",
    store: str = "s3:///",
    outputs: str = "/tmp/cifar-outputs",
) -> str:
    """The steps, one after the other."""
    data = verify_data(
        store=store,
        run=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
        dataset=dataset,
        recipe=recipe,
        overrides=overrides,
        execution=execution,
        seed=seed,
        outputs=outputs,
    )
    processed = verify_processed(store=store, plan=data.output)
    trained = train(store=store, plan=processed.output).set_memory_limit("3Gi")
    model = verify_model(store=store, plan=trained.output, threshold=threshold, outputs=outputs)
    for task in (data, processed, trained, model):
        task.set_caching_options(False)  # each run reads the store again
        kubernetes.use_config_map_as_env(task, "cifar-platform", ENDPOINT)
        kubernetes.use_config_map_as_env(task, "cifar-platform", OPTIONAL, optional=True)
        kubernetes.use_config_map_as_volume(task, "cifar-ca", "/etc/cifar-ca", optional=True)
        kubernetes.use_secret_as_env(task, "object-store-pipeline", CREDENTIALS)
    kubernetes.use_secret_as_env(trained, "model-signing", {"private.pem": "MODEL_SIGNING_KEY"}, optional=True)
    return model.output


def compile_to(path: Path) -> None:
    """Write the pipeline as the server takes it."""
    pipeline = cast(Any, cifar10_pipeline)  # KFP's decorator is untyped: this is a component, no function any more
    compiler.Compiler().compile(pipeline, str(path))


if __name__ == "__main__":
    compile_to(Path(__file__).with_name("pipeline.yaml"))
