"""The database: connections and their settings.

connections.py  opens all connections of the service, and the pool that queries read through
session.py      sets and verifies the settings of each session
resolving.py    resolves host names outside the event loop
arrays.py       arrays in Postgres' binary format, for statements with many rows
"""
