"""Finding infinities and NaN before they are stored."""

from collections.abc import Mapping

import torch
from torch import Tensor

from resources.errors import ConfigError


class DivergedError(ConfigError):
    """The training produced infinities or NaN. It repeats its bits, so the same spec fails again."""

    def __init__(self, what: str, when: str):
        super().__init__(
            f"The training diverged: {what} is not finite {when}. Lower learning_rate or raise warmup; a checkpoint "
            "from before is kept but continues to the same end."
        )


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor that holds an infinity or NaN, if there is one."""
    return next((name for name, value in tensors.items() if not bool(torch.isfinite(value).all())), None)
