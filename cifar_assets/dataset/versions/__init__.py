"""Versions of raw and processed data, and what they came from."""
