"""What is written from the log: read models, the callback outbox, seals.

follower.py    reads the log in order and hands it to a projection, batch by batch
parking.py     sets a stream aside that cannot be applied, so that the others go on
payments.py    the projection that writes payments and its companions
callbacks.py   that which writes the callback outbox
seals.py       that which seals the log
parked.py      payments that are parked without a reason
comparison.py  compares the payments read model with the log, row by row
rebuild.py     makes it what the log says, while the service runs
"""
