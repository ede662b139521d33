"""How much one request, and all requests together, may ask of the server."""

from dataclasses import dataclass, field

from cifar_assets.contracts import IMAGE_SIZE
from cifar_assets.dataset.images import ImageLimits


@dataclass(frozen=True)
class ServingLimits:
    """Sizes are bytes, times are seconds. A request over a limit of its own gets 413, one too many gets 429."""

    image: ImageLimits = field(default_factory=ImageLimits)
    max_body_bytes: int = 16 * 1024 * 1024
    max_images: int = 64
    """Images in one request."""
    max_pending_requests: int = 256
    """Requests read or answered at the same time."""
    max_pending_bytes: int = 32 * 1024 * 1024
    """Bodies of those requests together; what keeps a pod within its memory."""
    queue_images: int = 512
    """Images waiting for the inference thread."""
    batch_images: int = 16
    """Images in one run of the model."""
    batch_delay: float = 0.002
    """How long an image waits for company while other requests are on their way."""
    body_timeout: float = 30.0
    """How long a client may take to send a body."""

    @property
    def max_json_items(self) -> int:
        """Numbers, lists and objects in a JSON body: enough for the largest batch of nested arrays."""
        rows_and_lists = IMAGE_SIZE * (IMAGE_SIZE + 1) + 1
        return self.max_images * (IMAGE_SIZE * IMAGE_SIZE * 3 + rows_and_lists) + 1000
