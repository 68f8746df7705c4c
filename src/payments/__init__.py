"""The Payment Service: charges, refunds and their history.

    request -> command -> gateway -> event -> event store (Postgres, append-only)
                                                  | wakes, NOTIFY
    query by id  <- fold of the stream  <---------+
    lists, SQL   <- payments read model <- follower (rows and position in one transaction)
    settling     <- what is left open   <-+
    dispatcher   <- callback outbox     <-+
       |-> Order Service                  |
       `-> fulfilments: is the order what was paid for?
    audit        <- seals of the log    <-+

    commands/          decide and append, one file per intent: charge, refund, settle, unfulfilled
    queries/           read; never imported by commands, nor the other way round
    projections/       the follower, and what it writes from the log; comparing, rebuilding
    callbacks/         sends what the outbox holds: dispatcher, signatures, retries, breaker
    fulfilment/        whether the orders of captured payments were fulfilled
    events/            what can happen (facts), and where it is kept (store, appender)
    deciding.py        which event may come next: pure, no I/O, no clock
    payment.py         what a payment's events amount to: as pure
    gateways/          payment providers behind one protocol
    snapshot.py        reading much and holding nothing, for exports, audits and rebuilds
    unsettled.py       the list of what the provider must be asked about again
    sendings.py        which refunds were sent, and since when
    legacy.py          a row of the Node service as events;  legacy_ids.py the ids they had there
    brake.py           how much the service gives back by itself, and that it stops
    opening.py         the database that the settings name;  embedded_postgres/ one of our own
    database.py        connections;  session.py what each is set to;  migrations/ the schema
    times.py           times as text, for API and command line;  tasks.py ends background tasks
    names.py           host names, looked up beside the event loop
    money.py           amounts and currencies;  errors.py what is refused, as types
    admission.py       how much one process takes on, and when it refuses
    shared.py          one answer for all who ask at the same time
    telemetry.py       every metric;  logs.py the log lines;  tracing.py spans
    settings.py        the environment variables;  service.py wires everything together from them
    cli/               the `payments` command;  environment.py what it does not follow
    probe.py           the health check of containers

Imports point one way, and tests/test_architecture.py holds them to it:

web, cli > service > commands, queries, projections, callbacks > gateways, events > payment > errors
"""
