"""One run on a GPU: is it right, and how near is it to what the same GPU does at most? `python bench/gpu` (see `__main__`)."""
