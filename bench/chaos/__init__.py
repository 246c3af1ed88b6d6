"""The parts of `python -m bench.chaos`: streams checked token for token, a view of the cluster, a search for
leaks."""
