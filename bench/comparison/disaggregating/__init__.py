"""Parts of `bench/comparison/disaggregation.py`."""
