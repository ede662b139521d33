"""Batch prediction: a stored model over a folder of pictures. See docs/predictions.md."""
