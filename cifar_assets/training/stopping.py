"""SIGTERM as a wish: the loop ends at the next step, with a checkpoint."""

import signal
from types import FrameType

from resources.errors import ExplainedError


class TrainingStopped(ExplainedError):  # noqa: N818 (it is no error but the way a stop travels)
    """The trainer was told to stop. The same spec continues from the last checkpoint."""


class PeerLostError(TrainingStopped):
    """Another process of the training went away. The same spec continues from the last checkpoint."""


class StopSignal:
    """Remembers that SIGTERM or SIGINT came. A second one has its usual effect."""

    def __init__(self) -> None:
        self.is_set = False

    def install(self) -> None:
        """Take the signals over from here on."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.is_set = True
        signal.signal(number, signal.SIG_DFL)
