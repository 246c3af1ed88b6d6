"""The head of a cluster: gateway, router and controller in one process, on one asyncio loop.

In: clients' calls (`gateway`), workers' reports (`router.service`), hosts and ends of processes (`ports`).
Out: tokens, commands to workers, and processes to start, stop and kill. It owns the configuration in force.
Ray is behind `ports`, which `cluster` implements; nothing here imports it."""
