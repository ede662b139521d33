"""Content-addressed images: importing, validating, splitting and reading labeled images. No Dagster, no torch."""
