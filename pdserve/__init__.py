"""pdserve: LLM serving with prefill and decode on separate devices."""

__version__ = "0.1.0"
