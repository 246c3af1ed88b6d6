"""The router: admits requests, places them on (prefill, decode) workers, forwards tokens, survives workers'
deaths."""
