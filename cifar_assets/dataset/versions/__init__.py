"""Versions of raw and processed data, and their lineage."""
