"""One hot path at a time, against something measured in the same run."""
