"""The command line interface: the `pdserve` command. All but `up`, `demo`, `validate` and `plan` are clients
of a running server."""
