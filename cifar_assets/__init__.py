"""CIFAR-10 from raw images to a served model: the Dagster code location and the code its pods run."""
