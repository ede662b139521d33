"""A model server as a local process, and the commands to show and stop it."""
