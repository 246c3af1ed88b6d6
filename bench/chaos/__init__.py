"""What `python -m bench.chaos` is made of: streams that are checked token for token, a view of the cluster,
what may be left over."""
