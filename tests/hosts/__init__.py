"""Several hosts on one machine, made of namespaces: `network.py` lays cables and starts hosts, `boot.py` is a host's first process."""
