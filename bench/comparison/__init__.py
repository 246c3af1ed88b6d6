"""pdserve beside peers, and beside earlier revisions of itself, in one run."""
