"""What can happen to a payment, and the log that keeps it.

facts.py     what can happen: one frozen Struct per fact, stored as JSON
store.py     the SQL of payment_events; rows to facts, facts to rows
appender.py  appending: every append that waits is written in one transaction
notifier.py  tells followers that there are new events
chain.py     the hash chain over the log, and an event's form in an export
watch.py     notices that the log went back, after a failover or a restore
losses.py    the tables of what was lost then, and of what an operator accepted
library.py   the log for the eventsourcing library's classes: how other teams follow it
"""
