"""Removes unused data: old versions, models, checkpoints, logs and caches. See docs/data.md."""
