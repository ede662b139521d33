"""Content-addressed images: importing, validating, splitting and reading CIFAR-10 data. No Dagster, no torch."""
