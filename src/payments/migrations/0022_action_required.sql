-- oldest: 0005
-- ACTION_REQUIRED, for receivers that want to know that a customer has to act: callback_deliveries
-- holds it as a status that is NULL.
--
-- The version before this one takes every row that is not FAILED for a capture, or for its refund: by
-- a status in words it would count a captured payment as refunded. It passes NULL over, so that it may
-- run beside this version, and instead of it. The CHECK of the column allows NULL as it is, and nothing
-- is read or written anew for it.
ALTER TABLE callback_deliveries ALTER COLUMN status DROP NOT NULL;

COMMENT ON COLUMN callback_deliveries.status IS 'NULL: ACTION_REQUIRED';

-- As it was, and gives up an ACTION_REQUIRED as well, if its payment has an outcome by now or its order
-- is paid.
CREATE OR REPLACE FUNCTION supersede_callbacks(orders uuid[]) RETURNS void
LANGUAGE plpgsql VOLATILE
SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
    undoing uuid[] := ARRAY(
        SELECT DISTINCT d.order_id FROM callback_deliveries d
         WHERE d.order_id = ANY (orders) AND d.state = 'due' AND d.status IS DISTINCT FROM 'SUCCESS');
    paid    uuid[];
BEGIN
    IF cardinality(undoing) = 0 THEN
        RETURN;
    END IF;
    paid := paid_orders(undoing);
    UPDATE callback_deliveries d SET state = 'superseded', finished_at = clock_timestamp()
     WHERE d.order_id = ANY (undoing) AND d.state = 'due' AND d.status IS DISTINCT FROM 'SUCCESS'
       AND (d.order_id = ANY (paid)
            OR d.status IS NULL AND EXISTS (
               SELECT FROM callback_deliveries later
                WHERE later.payment_id = d.payment_id AND later.sequence > d.sequence))
       AND NOT EXISTS (SELECT FROM callback_lanes l
                        WHERE l.order_id = d.order_id AND l.in_flight = d.event_id);
END $$;

-- As it was, but for the status that is sent. Also the version before sends it then.
CREATE OR REPLACE FUNCTION claim_deliveries(
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
              coalesce(first.status, 'ACTION_REQUIRED'), first.amount_cents, first.currency,
              first.occurred_at,
              first.attempts + 1, before.failing, before.excused,
              extract(epoch FROM before.next_at - moment)::float8,
              extract(epoch FROM moment - first.due_since)::float8, first.traceparent;
END $$;
