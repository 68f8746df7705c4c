"""The payment: pure, no I/O, no clock.

state.py      what a payment's events amount to
identity.py   what a request means for ever: its payment, its refund, its fingerprint
decisions.py  which event may come next
"""
