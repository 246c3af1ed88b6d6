"""Parts of `bench/disaggregation.py`."""
