"""The router: admits requests, places them on (prefill, decode) workers, forwards their tokens, survives workers' deaths."""
