"""Observability: metrics, log lines, traces.

metrics.py          all metrics except
gateway_metrics.py  those of the payment providers
logs.py             log lines, and their sink, which never blocks
tracing.py          spans and trace context
"""
