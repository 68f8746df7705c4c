"""Reading. Single payments are read from their events, lists from the read model.

lookups.py       single payments as of now, batched into one query
payments.py      one payment for the API, as of now or a past moment, and the list
cursor.py        cursors of list pages
history.py       the events of one payment, as stored
callbacks.py     callbacks, their attempts and the responses
fulfilments.py   captured payments whose order may not be fulfilled
explain.py       the history of one payment in words
log.py           the log in order: whole, filtered, or followed
movements.py     captures and refunds, from the log
verification.py  verifies the log against its seals
guards.py        checks the triggers and constraints that protect the log
followers.py     the lag of followers, parked and unsettled payments
server.py        the database server: standbys, clock, whether it is writable
"""
