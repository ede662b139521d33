"""Asset checks: what must hold for each version of the data, the model and the service."""
