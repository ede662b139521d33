"""Base of settings."""

import dagster as dg
from pydantic import ConfigDict


class StrictConfig(dg.Config):
    """Settings in which an unknown name is an error."""

    model_config = ConfigDict(extra="forbid")
