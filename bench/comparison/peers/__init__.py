"""Other serving engines, each in a process and an interpreter of its own, measured by one protocol."""
