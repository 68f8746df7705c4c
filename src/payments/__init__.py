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
    callbacks/         sends what the outbox holds: dispatcher, retries, breaker
    fulfilment/        whether the orders of captured payments were fulfilled
    order_service/     how Order Service is reached, and what its responses mean
    gateways/          payment providers behind one protocol
    event_store.py     the log as commands use it: loads payments, appends facts
    payment/           what a payment is, and which event may come next: pure, no I/O, no clock
    events/            what can happen (facts), and where it is kept (store, appender)
    database/          connections, and what each is set to;  migrations/ the schema
    observability/     metrics, log lines, traces
    opening.py         the database that the settings name;  embedded_postgres/ one of our own
    snapshot.py        reading much and holding nothing, for exports, audits and rebuilds
    unsettled.py       the list of what the provider must be asked about again
    sendings.py        which refunds were sent, and since when
    legacy.py          a row of the Node service as events;  legacy_ids.py the ids they had there
    brake.py           how much the service gives back by itself, and that it stops
    admission.py       how much one process takes on, and when it refuses
    single_flight.py   one answer for all who ask at the same time
    settings.py        all settings;  setting_sources.py reads them from the environment
    setting_values.py  what their texts mean;  http_url.py addresses among them
    webhook_secrets.py what signs callbacks
    clients.py         who asks: API clients, and names of the service's own
    service.py         wires everything together from the settings;  health.py how it is
    times.py           times as text, for API and command line;  tasks.py ends background tasks
    money.py           amounts and currencies;  errors.py what is refused, as types
    cli/               the `payments` command;  environment.py what it does not follow
    probe.py           the health check of containers;  backoff.py pauses that double

Imports point one way, and tests/test_architecture.py holds them to it:

web, cli > service > fulfilment > commands, queries, projections, callbacks
    > gateways, event_store > payment > events, order_service > database > settings > errors
"""
