"""One engine on several ranks: tensor parallelism."""
