"""The Payment Service: charges and their history.

    request -> command -> gateway -> event -> event store (Postgres, append-only)
    query  <- fold of the stream  <-------------+

    commands/          decide and append, one file per intent
    queries/           read; never imported by commands, nor the other way round
    events/            what can happen (facts), and where it is kept (store, appender)
    payment.py         the aggregate: pure, no I/O, no clock
    gateways/          payment providers behind one protocol
    database.py        connections;  migrations/ the schema
    service.py         wires everything together from Settings
    cli.py             the `payments` command

Imports point one way, and tests/test_architecture.py holds them to it:
    web, cli > service > commands, queries > gateways, events > payment > money, errors, settings
"""
