"""The assets, from raw images to a served model."""
