-- Callbacks to Order Service. What is owed follows from payment_events; what came of sending it, and
-- callback_lanes, do not: these tables are not dropped and written again.

-- One row per outcome of a payment, written by the follower `callbacks`.
--   due         owed to Order Service, and not delivered yet
--   delivered   it answered 2xx
--   dead        given up; `payments callbacks redrive` makes it due again
--   superseded  a FAILED that is not sent, since its order has a SUCCESS
--   excluded    ORDER_CALLBACK_STATUSES did not name its status when it was written
CREATE TABLE callback_deliveries (
    event_id     uuid        PRIMARY KEY,
    position     bigint      NOT NULL,
    order_id     uuid        NOT NULL,
    payment_id   uuid        NOT NULL,
    sequence     bigint      NOT NULL, -- the event's version in its payment's stream
    status       text        NOT NULL CHECK (status IN ('SUCCESS', 'FAILED', 'REFUNDED')),
    amount_cents integer     NOT NULL,
    currency     text        NOT NULL,
    occurred_at  timestamptz NOT NULL,
    state        text        NOT NULL
                 CHECK (state IN ('due', 'delivered', 'dead', 'superseded', 'excluded')),
    attempts     integer     NOT NULL DEFAULT 0, -- that count towards giving up
    enqueued_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    due_since    timestamptz NOT NULL DEFAULT clock_timestamp(), -- enqueued_at, or redriven then
    finished_at  timestamptz -- when it left `due`
);

CREATE INDEX callback_deliveries_of_order ON callback_deliveries (order_id, position);
CREATE INDEX callback_deliveries_of_payment ON callback_deliveries (payment_id, sequence);
CREATE INDEX callback_deliveries_newest ON callback_deliveries (position);
CREATE INDEX callback_deliveries_due_of_order ON callback_deliveries (order_id, position)
    WHERE state = 'due';
CREATE INDEX callback_deliveries_due ON callback_deliveries (due_since) WHERE state = 'due';
CREATE INDEX callback_deliveries_dead ON callback_deliveries (position) WHERE state = 'dead';
CREATE INDEX callback_deliveries_to_prune ON callback_deliveries (finished_at)
    WHERE state IN ('delivered', 'superseded', 'excluded');

-- One row per order that is owed something. Whoever changes what an order is owed locks its lane
-- first; one sender at a time claims it, for a while. Several are locked in the order of their ids.
CREATE TABLE callback_lanes (
    order_id   uuid        PRIMARY KEY,
    next_at    timestamptz NOT NULL DEFAULT clock_timestamp(), -- from then on it may be claimed
    -- Its first delivery was tried in vain, or is sent late on request: it does not keep others
    -- waiting.
    failing    boolean     NOT NULL DEFAULT false,
    claim      bigint,     -- of the sender that had it last; a result is taken from no other
    claimed_at timestamptz,
    in_flight  uuid        -- the event that is being sent; next_at is then the end of the lease
);

CREATE INDEX callback_lanes_next ON callback_lanes (failing, next_at);

-- Never the same number twice, also when a lane went and came again.
CREATE SEQUENCE callback_claims;

-- What came of each exchange. `interrupted`: nobody recorded a result before the lease was over.
CREATE TABLE callback_attempts (
    event_id   uuid             NOT NULL,
    claim      bigint           NOT NULL,
    started_at timestamptz      NOT NULL,
    seconds    double precision,
    outcome    text             NOT NULL,
    status     integer,         -- of HTTP
    reason     text,            -- why there is no status
    answer     bytea,           -- its first 2 KB, as received
    PRIMARY KEY (event_id, claim)
);

-- Those of the orders that have a SUCCESS: Order Service must not mark them failed any more. Each
-- order is looked at once, however many outcomes it has.
--
-- An outcome from before the outbox was begun, or one that was pruned, is known from `payments`.
CREATE FUNCTION paid_orders(orders uuid[]) RETURNS uuid[]
LANGUAGE plpgsql STABLE
SET plan_cache_mode = force_generic_plan
AS $$
BEGIN
    RETURN ARRAY(
        SELECT o.id FROM (SELECT DISTINCT unnest(orders)) AS o (id)
         WHERE EXISTS (SELECT FROM callback_deliveries d
                        WHERE d.order_id = o.id AND d.status <> 'FAILED')
            OR EXISTS (SELECT FROM payments p
                        WHERE p.merchant_order_id = o.id
                          AND p.status IN ('SUCCESS', 'REFUNDED')));
END $$;

-- Gives up the due FAILED deliveries of orders that have a SUCCESS. What is in flight is left to its
-- sender. The lanes must be locked.
CREATE FUNCTION supersede_callbacks(orders uuid[]) RETURNS void
LANGUAGE plpgsql VOLATILE
SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
    failed uuid[] := ARRAY(
        SELECT DISTINCT d.order_id FROM callback_deliveries d
         WHERE d.order_id = ANY (orders) AND d.state = 'due' AND d.status = 'FAILED');
    paid   uuid[];
BEGIN
    IF cardinality(failed) = 0 THEN
        RETURN;
    END IF;
    paid := paid_orders(failed);
    UPDATE callback_deliveries d SET state = 'superseded', finished_at = clock_timestamp()
     WHERE d.order_id = ANY (paid) AND d.state = 'due' AND d.status = 'FAILED'
       AND NOT EXISTS (SELECT FROM callback_lanes l
                        WHERE l.order_id = d.order_id AND l.in_flight = d.event_id);
END $$;

-- Removes the lanes of orders that are owed nothing. They must be locked.
CREATE FUNCTION close_callback_lanes(orders uuid[]) RETURNS void
LANGUAGE plpgsql VOLATILE
SET plan_cache_mode = force_generic_plan
AS $$
BEGIN
    DELETE FROM callback_lanes l
     WHERE l.order_id = ANY (orders) AND l.in_flight IS NULL
       AND NOT EXISTS (SELECT FROM callback_deliveries d
                        WHERE d.order_id = l.order_id AND d.state = 'due');
END $$;

-- Claims the lanes of up to `most` orders, at most `failing_max` of them failing, and returns what is
-- first in each, to be sent within the lease. `probing`: one lane, whether or not its time
-- has come, and not the one that was tried last.
--   claim     to be named with the result
--   attempt   which of those that count this one is
--   due_in_s  seconds until its time comes; not above 0 if it has
CREATE FUNCTION claim_callbacks(
    most integer, failing_max integer, probing boolean, lease_s double precision
) RETURNS TABLE (
    claim bigint, event_id uuid, order_id uuid, payment_id uuid, sequence bigint, status text,
    amount_cents integer, currency text, occurred_at timestamptz, attempt integer,
    failing boolean, due_in_s double precision
)
LANGUAGE plpgsql VOLATILE
SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict use_column
DECLARE
    moment timestamptz := clock_timestamp();
    orders uuid[];
BEGIN
    IF probing THEN
        orders := ARRAY(
            SELECT l.order_id FROM callback_lanes l
             WHERE l.in_flight IS NULL OR l.next_at <= moment
             ORDER BY l.claimed_at NULLS FIRST LIMIT 20 FOR UPDATE SKIP LOCKED);
    ELSE
        orders := ARRAY(
            SELECT l.order_id FROM callback_lanes l
             WHERE l.failing AND l.next_at <= moment
             ORDER BY l.next_at LIMIT failing_max FOR UPDATE SKIP LOCKED);
        orders := orders || ARRAY(
            SELECT l.order_id FROM callback_lanes l
             WHERE NOT l.failing AND l.next_at <= moment
             ORDER BY l.next_at LIMIT most - cardinality(orders) FOR UPDATE SKIP LOCKED);
    END IF;
    IF cardinality(orders) = 0 THEN
        RETURN;
    END IF;

    -- Leases that ran out: the sender died, or was frozen.
    WITH interrupted AS (
        UPDATE callback_lanes l SET in_flight = NULL
          FROM callback_lanes held
         WHERE l.order_id = ANY (orders) AND l.in_flight IS NOT NULL
           AND held.order_id = l.order_id
        RETURNING held.in_flight AS event_id, held.claim, held.claimed_at
    ), recorded AS (
        INSERT INTO callback_attempts (event_id, claim, started_at, outcome)
        SELECT i.event_id, i.claim, i.claimed_at, 'interrupted' FROM interrupted i
    )
    UPDATE callback_deliveries d SET attempts = d.attempts + 1
      FROM interrupted i WHERE d.event_id = i.event_id;

    PERFORM supersede_callbacks(orders);
    PERFORM close_callback_lanes(orders);
    IF probing THEN -- some more were looked at in case there is nothing to send in the first ones
        orders := ARRAY(
            SELECT l.order_id FROM callback_lanes l WHERE l.order_id = ANY (orders)
             ORDER BY l.claimed_at NULLS FIRST LIMIT 1);
    END IF;

    RETURN QUERY
    UPDATE callback_lanes l
       SET claim = nextval('callback_claims'), claimed_at = moment, in_flight = first.event_id,
           next_at = moment + make_interval(secs => lease_s)
      FROM unnest(orders) AS o (id)
      JOIN callback_lanes before ON before.order_id = o.id
     CROSS JOIN LATERAL (
            SELECT d.* FROM callback_deliveries d
             WHERE d.order_id = o.id AND d.state = 'due' ORDER BY d.position LIMIT 1) first
     WHERE l.order_id = o.id
    RETURNING l.claim, first.event_id, first.order_id, first.payment_id, first.sequence,
              first.status, first.amount_cents, first.currency, first.occurred_at,
              first.attempts + 1, before.failing,
              extract(epoch FROM before.next_at - moment)::float8;
END $$;

-- Takes the results of exchanges, one row each, and frees their lanes.
--   states   delivered, dead, or due: to be tried again after `delays` seconds
--   statuses of HTTP; 0 if there is none
--   outcomes  `released` if it was not sent: then no attempt is noted
--   counted  1 if the attempt counts towards giving up, else 0
-- Returns the claims that were still held; of others only the attempt is noted.
CREATE FUNCTION record_callbacks(
    claims bigint[], orders uuid[], events uuid[], states text[], delays double precision[],
    counted integer[], durations double precision[], outcomes text[], statuses integer[],
    reasons text[], answers bytea[]
) RETURNS SETOF bigint
LANGUAGE plpgsql VOLATILE
SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
    moment timestamptz := clock_timestamp();
    held   bigint[];
BEGIN
    -- A result that a crash of the server loses is that of a delivery which is then sent again.
    PERFORM set_config('synchronous_commit', 'off', true);
    PERFORM FROM callback_lanes l WHERE l.order_id = ANY (orders) ORDER BY l.order_id FOR UPDATE;
    held := ARRAY(
        SELECT r.claim FROM unnest(claims, orders, events) AS r (claim, order_id, event_id)
          JOIN callback_lanes l ON l.order_id = r.order_id
         WHERE l.claim = r.claim AND l.in_flight = r.event_id);

    INSERT INTO callback_attempts AS a
           (event_id, claim, started_at, seconds, outcome, status, reason, answer)
    SELECT r.event_id, r.claim,
           coalesce(l.claimed_at, moment - make_interval(secs => r.seconds)), r.seconds, r.outcome,
           nullif(r.status, 0), r.reason, r.answer
      FROM unnest(events, claims, orders, durations, outcomes, statuses, reasons, answers)
        AS r (event_id, claim, order_id, seconds, outcome, status, reason, answer)
      LEFT JOIN callback_lanes l ON l.order_id = r.order_id AND l.claim = r.claim
     WHERE r.outcome <> 'released'
        ON CONFLICT (event_id, claim) DO UPDATE
       SET seconds = excluded.seconds, outcome = excluded.outcome, status = excluded.status,
           reason = excluded.reason, answer = excluded.answer
     WHERE a.outcome = 'interrupted';

    UPDATE callback_deliveries d
       SET state = r.state, attempts = d.attempts + r.counted,
           finished_at = CASE WHEN r.state <> 'due' THEN moment END
      FROM unnest(claims, events, states, counted) AS r (claim, event_id, state, counted)
     WHERE r.claim = ANY (held) AND d.event_id = r.event_id;

    UPDATE callback_lanes l
       SET in_flight = NULL,
           failing = r.state = 'due' AND (l.failing OR r.outcome <> 'released'),
           next_at = moment + make_interval(secs => r.delay)
      FROM unnest(claims, orders, states, delays, outcomes)
        AS r (claim, order_id, state, delay, outcome)
     WHERE r.claim = ANY (held) AND l.order_id = r.order_id;

    -- A FAILED that came back undelivered while a SUCCESS arrived keeps nobody waiting.
    PERFORM supersede_callbacks(orders);
    UPDATE callback_lanes l SET next_at = moment, failing = false
      FROM unnest(claims, orders, events, states) AS r (claim, order_id, event_id, state)
      JOIN callback_deliveries d ON d.event_id = r.event_id
     WHERE r.claim = ANY (held) AND l.order_id = r.order_id
       AND r.state = 'due' AND d.state = 'superseded';

    PERFORM close_callback_lanes(orders);
    RETURN QUERY SELECT unnest(held);
END $$;
