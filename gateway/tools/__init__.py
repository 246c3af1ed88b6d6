"""Tool calls: what a request offers, the grammar that keeps a model to it, and calls read from the text of an
answer."""
