"""Reading. What is asked about one payment comes from its events, lists come from the read model.

lookups.py       single payments as they are now, several with one query
payments.py      one payment for the API, now and as of a moment, and the list
cursor.py        where a page of a list ends
history.py       one payment's events, as stored
callbacks.py     what Order Service was told, is owed, and answered
fulfilments.py   which captured payments may not have been fulfilled
explain.py       one payment's story in words
log.py           the log in order, whole, in part, or as it grows
movements.py     what money moved, from the log
verification.py  whether the log is what was sealed
guards.py        whether all is in place that keeps the log from being altered
followers.py     how far the followers are, and what is open at the provider
server.py        the database server: standbys, clock, whether it can be written
"""
