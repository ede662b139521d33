"""The server's metrics, in a registry of their own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)


def _gauge(name: str, text: str) -> Gauge:
    return Gauge(f"cifar10_{name}", text, registry=REGISTRY)


def _seconds(name: str, text: str) -> Histogram:
    """Named and labeled as kserve's own, for dashboards made for it."""
    return Histogram(f"request_{name}_seconds", text, ["model_name"], registry=REGISTRY)


RESPONSES = Counter("cifar10_responses", "Answers by method and status.", ["method", "status"], registry=REGISTRY)
CONNECTIONS = _gauge("connections", "Open connections.")
PENDING_BYTES = _gauge("pending_bytes", "Bytes of large bodies that are being read or answered.")
PENDING_REQUESTS = _gauge("pending_requests", "Predictions that are being worked on.")
QUEUE_IMAGES = _gauge("queue_images", "Images waiting for the model.")
READ_SECONDS = _seconds("preprocess", "Reading a request and decoding its pictures.")
PREDICT_SECONDS = _seconds("predict", "Waiting for the model and running it.")
RENDER_SECONDS = _seconds("postprocess", "Writing the answer.")
BATCH_IMAGES = Histogram(
    "cifar10_batch_images", "Images in one run of the model.", buckets=(1, 2, 4, 8, 16, 32, 64, 128), registry=REGISTRY
)
RUN_SECONDS = Histogram(
    "cifar10_run_seconds",
    "Duration of one run of the model.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5),
    registry=REGISTRY,
)
