"""The server's metrics, in a separate registry."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, PlatformCollector, ProcessCollector

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)


def _gauge(name: str, text: str) -> Gauge:
    return Gauge(f"cifar10_{name}", text, registry=REGISTRY)


def _seconds(name: str, text: str) -> Histogram:
    """Named and labeled like KServe's metrics, so that its dashboards work."""
    return Histogram(f"request_{name}_seconds", text, ["model_name"], registry=REGISTRY)


MODEL = Info("cifar10_model", "The served model.", registry=REGISTRY)
RESPONSES = Counter("cifar10_responses", "Answers by method and status.", ["method", "status"], registry=REGISTRY)
CONNECTIONS = _gauge("connections", "Open connections.")
PENDING_BYTES = _gauge("pending_bytes", "Bytes of large request bodies in progress.")
PENDING_REQUESTS = _gauge("pending_requests", "Predictions in progress.")
QUEUE_IMAGES = _gauge("queue_images", "Images waiting for the model.")
READ_SECONDS = _seconds("preprocess", "Reading a request and decoding its pictures.")
PREDICT_SECONDS = _seconds("predict", "Time spent waiting for the model and running it.")
RENDER_SECONDS = _seconds("postprocess", "Writing the answer.")
RECORDED_IMAGES = Counter(
    "cifar10_recorded_images",
    "Images in the sample of answers to record: written, over_limit, or dropped for queue_full or store_failed.",
    ["outcome"],
    registry=REGISTRY,
)
BATCH_IMAGES = Histogram(
    "cifar10_batch_images",
    "Number of images in one run of the model.",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128),
    registry=REGISTRY,
)
RUN_SECONDS = Histogram(
    "cifar10_run_seconds",
    "Duration of one run of the model.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5),
    registry=REGISTRY,
)
