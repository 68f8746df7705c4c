"""The payment: pure, no I/O, no clock.

state.py      what a payment's events amount to
decisions.py  which event may come next
"""
