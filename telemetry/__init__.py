"""What is told of serving: metrics, traces, logs, and the timelines of recent requests. Watches the router,
decides nothing."""
