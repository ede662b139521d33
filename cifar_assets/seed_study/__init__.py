"""One recipe trained with several seeds: how far apart its models are. `python -m cifar_assets.seed_study`."""
