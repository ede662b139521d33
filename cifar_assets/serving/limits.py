"""How much one request, one connection and all of them together may cost."""

from dataclasses import dataclass, field

from cifar_assets.contracts import IMAGE_SIZE
from cifar_assets.dataset.formats.images import ImageLimits


@dataclass(frozen=True)
class ServingLimits:
    """Sizes are bytes, times are seconds. What counts is what came and what it costs, not what was declared."""

    image: ImageLimits = field(default_factory=ImageLimits)
    max_header_bytes: int = 16 * 1024
    """Request line and headers, and trailers after a chunked body."""
    max_headers: int = 100
    max_body_bytes: int = 16 * 1024 * 1024
    max_images: int = 64
    """Images in one request."""
    max_pixels: int = 16 * 1024 * 1024
    """Pixels of all pictures in one request, before they are scaled down."""
    small_pixels: int = 128 * 128
    """Pictures up to this size are decoded on the event loop: it takes about as long as the rest of a request."""
    max_connections: int = 512
    """One more takes the place of the connection that has waited longest for its client."""
    max_pending_requests: int = 256
    """Complete requests that are being answered at the same time."""
    small_body_bytes: int = 64 * 1024
    """Every connection may hold this much of a body; only what is beyond it counts as pending."""
    max_pending_bytes: int = 32 * 1024 * 1024
    """Large bodies together; this keeps a pod within its memory."""
    max_pending_pixels: int = 4 * 16 * 1024 * 1024
    """Pixels of large pictures that wait to be decoded."""
    queue_images: int = 512
    """Images waiting for the model."""
    batch_images: int = 16
    """Images in one run of the model."""
    header_timeout: float = 10.0
    """From the first byte of a request to the end of its headers."""
    body_timeout: float = 30.0
    """From the end of the headers to the end of the body."""
    stall_timeout: float = 10.0
    """Without a byte of a body, or without a client that reads its answer."""
    idle_timeout: float = 65.0
    """Between two requests of a connection."""

    @property
    def max_large_requests(self) -> int:
        """Those of the pending requests that may have a large body or large pictures."""
        return max(1, self.max_pending_requests // 2)

    @property
    def max_json_items(self) -> int:
        """Numbers, lists and objects in a JSON body: enough for the largest batch of nested arrays."""
        rows_and_lists = IMAGE_SIZE * (IMAGE_SIZE + 1) + 1
        return self.max_images * (IMAGE_SIZE * IMAGE_SIZE * 3 + rows_and_lists) + 1000
