"""The vocabulary every room shares: requests, messages, configuration, errors, hashing. No torch, no Ray, no
I/O."""
