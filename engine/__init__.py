"""One device's model, paged KV cache and sampler, and the values that schedulers pass to them."""
