"""How long a test waits for what comes in a moment. No claim depends on it."""

WAIT_S = 120.0  # on a busy machine, a process may stand for many seconds before it gets a core
