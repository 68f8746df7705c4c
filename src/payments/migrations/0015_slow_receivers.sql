-- oldest: 0005
-- Callbacks for a receiver that is slow, or down in part: what may still be running there is not
-- repeated, what it asked to be left alone for is, and the end of an outage concerns those alone that
-- failed in it.
--
-- claim_deliveries and record_attempts take the place of claim_callbacks and record_callbacks, which
-- the version before this one calls.

ALTER TABLE callback_lanes
    -- Until then an attempt may be running there whose end nobody saw: nothing of the order is sent.
    ADD COLUMN busy_until timestamptz,
    -- The receiver asked not to be asked again before (Retry-After). Only a person's redrive, or a
    -- SUCCESS that comes in between, ends it earlier.
    ADD COLUMN not_before timestamptz,
    -- When the last attempt failed, if that spoke against the endpoint as a whole.
    ADD COLUMN away_at    timestamptz,
    -- When the end of an outage made it due last, and whether that attempt is still to be made: it
    -- does not count.
    ADD COLUMN excused_at timestamptz,
    ADD COLUMN excused    boolean NOT NULL DEFAULT false;

-- The version before this one, beside it, knows nothing of busy_until: what it makes due would be
-- claimed at once, also by this version.
CREATE FUNCTION wait_while_busy() RETURNS trigger
LANGUAGE plpgsql
AS $$
BEGIN
    NEW.next_at := NEW.busy_until;
    RETURN NEW;
END $$;
CREATE TRIGGER callback_lanes_wait_while_busy
    BEFORE UPDATE OF next_at ON callback_lanes FOR EACH ROW
    WHEN (NEW.in_flight IS NULL AND NEW.busy_until > NEW.next_at)
    EXECUTE FUNCTION wait_while_busy();

-- Gives up the due FAILED and REFUNDED deliveries of orders that have a SUCCESS whose money stands. (A
-- payment that was given back does not stand, so it is another one.) What is in flight is left to its
-- sender. The lanes must be locked.
CREATE OR REPLACE FUNCTION supersede_callbacks(orders uuid[]) RETURNS void
LANGUAGE plpgsql VOLATILE
SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
    undoing uuid[] := ARRAY(
        SELECT DISTINCT d.order_id FROM callback_deliveries d
         WHERE d.order_id = ANY (orders) AND d.state = 'due' AND d.status <> 'SUCCESS');
    paid    uuid[];
BEGIN
    IF cardinality(undoing) = 0 THEN
        RETURN;
    END IF;
    paid := paid_orders(undoing);
    UPDATE callback_deliveries d SET state = 'superseded', finished_at = clock_timestamp()
     WHERE d.order_id = ANY (paid) AND d.state = 'due' AND d.status <> 'SUCCESS'
       AND NOT EXISTS (SELECT FROM callback_lanes l
                        WHERE l.order_id = d.order_id AND l.in_flight = d.event_id);
END $$;

-- As it was, but a lane stays while an attempt of it may be running: what is redriven meanwhile waits
-- as well. It goes when its time has come.
CREATE OR REPLACE FUNCTION close_callback_lanes(orders uuid[]) RETURNS void
LANGUAGE plpgsql VOLATILE
SET plan_cache_mode = force_generic_plan
AS $$
BEGIN
    DELETE FROM callback_lanes l
     WHERE l.order_id = ANY (orders) AND l.in_flight IS NULL
       AND (l.busy_until IS NULL OR l.busy_until <= clock_timestamp())
       AND (SELECT true FROM callback_deliveries d
             WHERE d.order_id = l.order_id AND d.state = 'due'
             ORDER BY d.position LIMIT 1) IS NULL;
END $$;

-- Claims the lanes of up to `most` orders, at most `failing_max` of them failing, and returns what is
-- first in each, to be sent within the lease. A lane's next_at is never before its busy_until, nor
-- before its not_before.
--
-- `probing`: up to `most` orders that never failed, or else one that did, before its time as well, but
-- for busy_until and not_before. Those take turns by their last claims.
--   claim      to be named with the result
--   attempt    which of those that count this one is
--   failing    it, or what stood before it, was tried in vain
--   excused    the end of an outage made it due
--   due_in_s   seconds until its time comes; not above 0 if it has
--   due_for_s  seconds since it was enqueued or redriven
CREATE FUNCTION claim_deliveries(
    most integer, failing_max integer, probing boolean, lease_s double precision
) RETURNS TABLE (
    claim bigint, event_id uuid, order_id uuid, payment_id uuid, sequence bigint, status text,
    amount_cents integer, currency text, occurred_at timestamptz, attempt integer,
    failing boolean, excused boolean, due_in_s double precision, due_for_s double precision,
    traceparent text
)
LANGUAGE plpgsql VOLATILE
SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict use_column
DECLARE
    moment timestamptz := clock_timestamp();
    -- No lane's time is rightly behind this: the longest pause is an hour (WAIT_MAX_S in
    -- callbacks/retry.py, Retry-After as well), a lease is minutes. The rest is for small steps of
    -- the clock, which end no pause.
    latest CONSTANT timestamptz := moment + interval '70 minutes';
    -- So many more are looked at by a probe, in case there is nothing to send in the first ones.
    spare CONSTANT integer := 16;
    astray uuid[];
    orders uuid[];
    probes integer := most;
BEGIN
    -- Some at a time; the index finds each kind behind all the others.
    astray := ARRAY(
        SELECT l.order_id FROM callback_lanes l
         WHERE l.failing AND l.next_at > latest
         ORDER BY l.next_at LIMIT 100 FOR UPDATE SKIP LOCKED);
    astray := astray || ARRAY(
        SELECT l.order_id FROM callback_lanes l
         WHERE NOT l.failing AND l.next_at > latest
         ORDER BY l.next_at LIMIT 100 FOR UPDATE SKIP LOCKED);
    IF cardinality(astray) > 0 THEN
        -- What may be running there is given all of its time from now on.
        UPDATE callback_lanes l
           SET next_at = CASE WHEN l.in_flight IS NULL AND coalesce(l.busy_until, moment) <= moment
                              THEN moment ELSE moment + make_interval(secs => lease_s) END,
               busy_until = CASE WHEN l.busy_until > moment
                                 THEN moment + make_interval(secs => lease_s) END,
               not_before = NULL
         WHERE l.order_id = ANY (astray);
    END IF;

    IF probing THEN
        orders := ARRAY(
            SELECT l.order_id FROM callback_lanes l
             WHERE NOT l.failing AND l.next_at <= moment
             ORDER BY l.next_at LIMIT most + spare FOR UPDATE SKIP LOCKED);
        IF cardinality(orders) = 0 THEN
            probes := 1;
            orders := ARRAY(
                SELECT l.order_id FROM callback_lanes l
                 WHERE (l.in_flight IS NULL OR l.next_at <= moment)
                   AND coalesce(l.busy_until, moment) <= moment
                   AND coalesce(l.not_before, moment) <= moment
                 ORDER BY l.claim NULLS FIRST LIMIT most + spare FOR UPDATE SKIP LOCKED);
        END IF;
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
    IF probing THEN
        orders := ARRAY(
            SELECT l.order_id FROM callback_lanes l WHERE l.order_id = ANY (orders)
             ORDER BY l.claim NULLS FIRST, l.next_at LIMIT probes);
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
              first.attempts + 1, before.failing, before.excused,
              extract(epoch FROM before.next_at - moment)::float8,
              extract(epoch FROM moment - first.due_since)::float8, first.traceparent;
END $$;

-- Takes the results of exchanges, one row each, and frees their lanes.
--   states    delivered, dead, or due: to be tried again after `delays` seconds, but not before
--             `busy` and `asked` are over
--   statuses  of HTTP; 0 if there is none
--   outcomes  `released` if it was not sent: then no attempt is noted
--   counted   1 if the attempt counts towards giving up, else 0
--   busy      seconds during which it may be running still; 0 if its end is known
--   asked     seconds that the receiver asked to be left alone for; 0 if it did not
--   away      1 if it spoke against the endpoint as a whole, else 0
-- Returns the claims that were still held; of others only the attempt is noted.
CREATE FUNCTION record_attempts(
    claims bigint[], orders uuid[], events uuid[], states text[], delays double precision[],
    counted integer[], durations double precision[], outcomes text[], statuses integer[],
    reasons text[], answers bytea[], busy double precision[], asked double precision[],
    away integer[]
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
           next_at = moment + make_interval(secs => greatest(r.delay, r.busy, r.asked)),
           busy_until = CASE WHEN r.busy > 0 THEN moment + make_interval(secs => r.busy) END,
           not_before = CASE WHEN r.asked > 0 THEN moment + make_interval(secs => r.asked) END,
           away_at = CASE WHEN r.away = 1 THEN moment
                          WHEN r.outcome = 'released' THEN l.away_at END,
           excused = l.excused AND r.outcome = 'released'
      FROM unnest(claims, orders, states, delays, outcomes, busy, asked, away)
        AS r (claim, order_id, state, delay, outcome, busy, asked, away)
     WHERE r.claim = ANY (held) AND l.order_id = r.order_id;

    -- What came back undelivered while a SUCCESS arrived, and is not sent any more, keeps nobody
    -- waiting; unless it may be running still.
    PERFORM supersede_callbacks(orders);
    UPDATE callback_lanes l
       SET next_at = greatest(moment, l.busy_until), not_before = NULL, failing = false
      FROM unnest(claims, orders, events, states) AS r (claim, order_id, event_id, state)
      JOIN callback_deliveries d ON d.event_id = r.event_id
     WHERE r.claim = ANY (held) AND l.order_id = r.order_id
       AND r.state = 'due' AND d.state = 'superseded';

    PERFORM close_callback_lanes(orders);
    RETURN QUERY SELECT unnest(held);
END $$;
