"""The Payment Service: charges, refunds and their history.

    request -> command -> gateway -> event -> event store (Postgres, append-only)
                                                  | wakes, NOTIFY
    query by id  <- fold of the stream  <---------+
    lists, SQL   <- payments read model <- follower (rows and position in one transaction)
    settling     <- unsettled payments  <-+
    dispatcher   <- callback outbox     <-+
       |-> Order Service                  |
       `-> fulfilments: was the order confirmed?
    audit        <- seals of the log    <-+

    commands/          decide and append, one file per intent: charge, refund, settle, unfulfilled
    queries/           read; commands and queries never import each other
    projections/       the follower and its projections; compares and rebuilds read models
    callbacks/         sends the callbacks of the outbox: dispatcher, retries, breaker
    fulfilment/        checks whether the orders of captured payments were fulfilled
    order_service/     the client of Order Service, and the meaning of its responses
    gateways/          payment providers behind one protocol
    event_store.py     the log for commands: loads payments, appends facts
    payment/           the state of a payment, and which event may follow: pure, no I/O, no clock
    events/            the events (facts), and their storage (store, appender)
    database/          connections and their settings;  migrations/ the schema
    observability/     metrics, log lines, traces
    opening.py         opens the database of the settings;  embedded_postgres/ the embedded one
    snapshot.py        long reads without long transactions, for exports, audits and rebuilds
    unsettled.py       the table of unsettled payments
    hints.py           the table of webhooks of providers
    sendings.py        the table of refunds that were sent, and since when
    legacy.py          converts a row of the Node service to events;  legacy_ids.py its ids there
    brake.py           limits how much the service gives back by itself
    admission.py       limits the concurrent work of one process
    single_flight.py   one run and result for concurrent callers
    settings.py        all settings;  setting_sources.py reads them from the environment
    setting_values.py  parses their values;  http_url.py parses URLs
    webhook_secrets.py parses the secrets that sign callbacks
    clients.py         names of API clients, and of the service's own actors
    service.py         builds the service from the settings;  health.py its health and gauges
    times.py           times as text, for API and command line;  tasks.py ends background tasks
    money.py           amounts and currencies;  errors.py error types
    cli/               the `payments` command;  environment.py removes ignored variables
    probe.py           the health check of containers;  backoff.py growing pauses

Imports point one way; tests/test_architecture.py enforces this:

web, cli > service > fulfilment > commands, queries, projections, callbacks
    > gateways, event_store > payment > events, order_service > database > settings > errors
"""
