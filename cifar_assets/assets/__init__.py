"""The four assets, from raw images to a served model."""
