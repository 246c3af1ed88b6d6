"""The cluster in virtual time: production's own decisions driven by a seeded event loop, with faults and
checks."""
