"""Benchmarks: `microbench/` times one thing, `comparison/` stands beside others, `chaos/` kills and cuts
while streams run, `gpu/` is for one GPU. Each program runs from the repository's root by `python -m
bench...`."""
