"""The database: connections, and what each is set to.

connections.py  opens every connection of the service, reads, and tells what failed
session.py      what each connection is set to, and verified to be
resolving.py    host names, looked up beside the event loop
arrays.py       arrays in Postgres' binary form, for statements with many rows
"""
