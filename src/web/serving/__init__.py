"""From the listening socket to a request that the application gets.

server.py      uvicorn inside our own process, and the ordered shutdown (listening.py: its socket)
protocol.py    reads requests: those that come in become tasks (connection.py: how it ends;
               slow_clients.py: who is cut; heads.py: what a head may be; arrivals.py: since when it
               waits; memory.py: what all that holds)
door.py        whether a request comes in, and as whom (answers.py: to those that do not;
               throttle.py: how late in a flood)
guard.py       what every request passes first: limits, request id, metrics (plain ASGI)
access_log.py  a line for each response
"""
