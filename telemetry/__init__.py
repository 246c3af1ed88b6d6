"""The observability of serving: metrics, traces, logs, and the timelines of recent requests. It observes the
router and decides nothing."""
