"""Several hosts on one machine: `network.py` makes them of namespaces, `boot.py` is the first process of
each."""
