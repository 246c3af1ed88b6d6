"""Parts of `bench/comparison/load_generators.py`."""
