"""Images by digest: importing, validating, splitting and reading CIFAR-10 shaped data. No Dagster, no torch."""
