"""Asset checks: what must hold of each version of data, model and service."""
