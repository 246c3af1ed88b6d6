"""One worker: both roles over one engine, between the router's commands and the worker's reports."""
