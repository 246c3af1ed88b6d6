"""Authentication and rate limits: API keys, TLS, usage per client. `Access` owns the keys in force and their
usage."""
