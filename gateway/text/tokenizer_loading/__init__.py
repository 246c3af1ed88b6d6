"""Loads a checkpoint's tokenizer in a process of its own, which a hostile one may kill, and brings back what
it is as data."""
