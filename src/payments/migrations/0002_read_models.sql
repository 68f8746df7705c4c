-- Read models and what keeps them: everything here is written from payment_events. It can be dropped
-- and written again, but for followers and parked_streams, which say how far that writing came.

-- How far each follower has come. Its row is locked while it writes, so one process at a time
-- does, and `position` moves in the transaction of what was written.
CREATE TABLE followers (
    name       text        PRIMARY KEY,
    position   bigint      NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT now()
);

INSERT INTO followers (name, position) VALUES ('payments', 0);

-- Streams that a follower could not apply: it goes on without them. `position` is the first event
-- that is missing from its read model. `payments parked list` shows them, `retry` takes them up.
CREATE TABLE parked_streams (
    follower   text        NOT NULL REFERENCES followers (name),
    payment_id uuid        NOT NULL,
    position   bigint      NOT NULL,
    reason     text        NOT NULL,
    parked_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (follower, payment_id)
);

-- One row per payment, as other teams know it; all times are UTC.
CREATE TABLE payments (
    id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    merchant_order_id UUID NULL,
    idempotency_key TEXT UNIQUE NULL,
    amount_cents INT DEFAULT 0,
    currency TEXT DEFAULT 'INR' NULL,
    status TEXT CHECK(status IN ('PENDING','SUCCESS','FAILED','REFUNDED')) NULL,
    provider_txn_id TEXT NULL,
    created_at TIMESTAMP DEFAULT now() NULL,
    updated_at TIMESTAMP DEFAULT now() NULL
);

-- The list, newest first, as a whole and by each of its filters.
CREATE INDEX payments_newest ON payments (created_at DESC, id DESC);
CREATE INDEX payments_of_order ON payments (merchant_order_id, created_at DESC, id DESC);
CREATE INDEX payments_by_status ON payments (status, created_at DESC, id DESC);
CREATE INDEX payments_by_currency ON payments (currency, created_at DESC, id DESC);

-- One row per refund; a payment may have several. All times are UTC, as in payments.
CREATE TABLE refunds (
    id                 uuid      PRIMARY KEY,
    payment_id         uuid      NOT NULL,
    idempotency_key    text,
    amount_cents       integer   NOT NULL,
    currency           text      NOT NULL,
    status             text      NOT NULL CHECK (status IN ('PENDING', 'SUCCESS', 'FAILED')),
    provider_refund_id text,
    decline_code       text,
    created_at         timestamp NOT NULL,
    updated_at         timestamp NOT NULL
);

CREATE INDEX refunds_of_payment ON refunds (payment_id);

-- Which API client a payment belongs to, with what its list is filtered by, as in payments: the
-- client's payments are found without reading past those of others. Payments of the client
-- `default`, which is everyone while no API keys are configured, have no row.
CREATE TABLE payment_clients (
    payment_id uuid      PRIMARY KEY,
    client     text      NOT NULL,
    status     text      NOT NULL,
    currency   text      NOT NULL,
    created_at timestamp NOT NULL
);

-- The client's list, newest first, as a whole and by each of its filters. An order has few payments:
-- payments_of_order finds them.
CREATE INDEX payment_clients_newest ON payment_clients (client, created_at DESC, payment_id DESC);
CREATE INDEX payment_clients_by_status
    ON payment_clients (client, status, created_at DESC, payment_id DESC);
CREATE INDEX payment_clients_by_currency
    ON payment_clients (client, currency, created_at DESC, payment_id DESC);
CREATE INDEX payment_clients_by_status_and_currency
    ON payment_clients (client, status, currency, created_at DESC, payment_id DESC);

-- What the provider must be asked about again: a PENDING payment, a refund under way, a late
-- capture on its way back, or a payment that was abandoned and may yet be captured. The projector
-- adds and removes rows; settling (commands/settle.py) moves due_at and counts attempts. Both give
-- the row a new `change`, so that a process which was frozen meanwhile notices.
CREATE TABLE unsettled_payments (
    payment_id uuid        PRIMARY KEY,
    kind       text        NOT NULL
               CHECK (kind IN ('charge', 'abandoned', 'late_capture', 'refund')),
    since      timestamptz NOT NULL,
    due_at     timestamptz NOT NULL,
    attempts   integer     NOT NULL DEFAULT 0,
    change     bigserial   NOT NULL,
    abandoned  boolean     NOT NULL GENERATED ALWAYS AS (kind = 'abandoned') STORED
);

-- Abandoned payments may be many, and must not keep others waiting.
CREATE INDEX unsettled_payments_due ON unsettled_payments (abandoned, due_at);
