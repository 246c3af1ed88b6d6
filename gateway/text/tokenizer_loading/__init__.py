"""Loads a checkpoint's tokenizer in a separate process, which a hostile one may kill, and returns it as
data."""
