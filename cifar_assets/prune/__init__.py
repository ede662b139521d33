"""Removing what nothing needs any more: old versions, models, checkpoints, logs and caches. See docs/data.md."""
