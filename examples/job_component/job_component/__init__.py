"""An asset defined in YAML that trains as a TrainJob. No CIFAR code."""
