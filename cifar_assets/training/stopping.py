"""How a training ends before its last epoch: stopped, without its peers, or diverged. No torch."""

import signal
from types import FrameType

from resources.errors import ConfigError, ExplainedError


class TrainingStopped(ExplainedError):  # noqa: N818 (not an error: the way a stop travels)
    """The trainer was told to stop. The same spec continues from the last checkpoint."""


class PeerLostError(TrainingStopped):
    """Another process of the training went away. The same spec continues from the last checkpoint."""


class DivergedError(ConfigError):
    """The training produced infinities or NaN. It repeats its bits, so the same spec fails again."""

    def __init__(self, what: str, when: str):
        super().__init__(
            f"The training diverged: {what} is not finite {when}. Lower learning_rate or raise warmup; a checkpoint "
            "from before is kept but continues to the same end."
        )


class StopSignal:
    """Remembers that SIGTERM or SIGINT came: the loop ends at the next step. A second one has its usual effect."""

    def __init__(self) -> None:
        self.is_set = False

    def install(self) -> None:
        """Handle the signals from here on."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.is_set = True
        signal.signal(number, signal.SIG_DFL)
