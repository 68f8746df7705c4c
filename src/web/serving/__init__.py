"""From the listening socket to a request that the application gets.

server.py        runs uvicorn in our process, and the ordered shutdown
listening.py     the listening socket and uvicorn's server on it
protocol.py      reads requests; those that are admitted become tasks
connection.py    closes connections
slow_clients.py  disconnects slow clients
heads.py         checks header sections
arrivals.py      measures how long a request waited before it was read
memory.py        limits the memory of a connection
door.py          authenticates a request and admits or rejects it
answers.py       the responses to rejected requests
throttle.py      delays these responses in a flood
guard.py         ASGI middleware around the application: limits, request id, metrics
access_log.py    a line for each response
"""
