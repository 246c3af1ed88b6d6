"""The load generator behind `pdserve bench`: planned requests, their latencies, and the resulting figures.

Pure (no clock, no I/O): `arrivals`, `lengths`, `trace`, `workload`, `records`, `statistics`, `slo`, `report`,
`compare` and `tables`. The shell around them: `runner` sends, `grpc_target` and `http_target` speak with a
server, `campaign` lets targets take turns, `plots` draws."""
