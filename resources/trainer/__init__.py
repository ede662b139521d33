"""Where a training runs: a process on this machine or a job in a cluster, behind one interface."""
