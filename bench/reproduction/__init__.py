"""Scripts that print published figures, or recorded loads, against ours."""
