"""What operators see: metrics, log lines, traces.

metrics.py  every metric
logs.py     the log lines, and their sink, which never blocks
tracing.py  spans, and the trace context that is passed on
"""
