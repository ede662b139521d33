"""An asset defined in YAML that trains in a TrainJob. No CIFAR code."""
