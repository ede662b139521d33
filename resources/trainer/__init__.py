"""Trainers: a local process or a job in a cluster, with the same interface."""
