"""Who a client is and how much it may use: API keys, TLS, rate limits. `Access` owns the keys in force and
their accounts."""
