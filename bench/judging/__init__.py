"""Parts of `bench/judges.py`."""
