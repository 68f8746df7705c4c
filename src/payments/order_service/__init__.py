"""The client of Order Service: how it is reached, and what its responses mean.

target.py     the URL and the keys of requests
addresses.py  the addresses to which plain http may go
endpoint.py   one bounded exchange: a callback, or a status request
heads.py      normalises header sections of responses
signing.py    signatures of callbacks (Standard Webhooks)
responses.py  the only code that reads what a response says of its order; pure

endpoint.py is imported only where an address is set: importing its HTTP client takes a third of a
command's start time.
"""

# Order Service responds in milliseconds, or in as long as its seat allocation takes: seconds, at
# worst. A longer exchange hangs.
TIMEOUT_S = 25.0
