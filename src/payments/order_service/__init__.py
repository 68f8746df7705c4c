"""Order Service as this service meets it: how it is reached, and what its responses mean.

target.py     where requests go and what signs them;  addresses.py where plain http may go
endpoint.py   one bounded exchange with it: a callback, or a question about an order
heads.py      header sections of responses, of every form that HTTP allows
signing.py    signatures of callbacks (Standard Webhooks)
responses.py  what a response says about the order; pure, and the only place for that

endpoint.py is imported where an address is set: its HTTP client takes a third of the time in which
a command starts.
"""

# Order Service answers in milliseconds, or in as long as its seat allocation takes: seconds, on a
# bad day. What takes longer hangs.
TIMEOUT_S = 25.0
