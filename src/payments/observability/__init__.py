"""Observability: metrics, log lines, traces.

metrics.py  all metrics
logs.py     log lines, and their sink, which never blocks
tracing.py  spans and trace context
"""
