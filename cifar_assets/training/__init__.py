"""Training CIFAR-10 classifiers: recipes, loop, checkpoints, outputs. `python -m cifar_assets.training` runs a job."""
