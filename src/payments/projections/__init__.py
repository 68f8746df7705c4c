"""Projections of the log: read models, the callback outbox, seals.

follower.py    reads the log in order and passes it to a projection, batch by batch
parking.py     parks streams that cannot be applied, so that the others continue
payments.py    the projection that writes the payments read model
callbacks.py   the projection that writes the callback outbox
seals.py       the projection that seals the log
parked.py      finds payments that are parked without a reason
comparison.py  compares the payments read model with the log, row by row
rebuild.py     corrects the payments read model, while the service runs
"""
