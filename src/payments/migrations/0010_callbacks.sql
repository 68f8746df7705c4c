-- oldest: 0005
-- Callbacks once more: whose money went back whole is not paid any more, and no time that a clock
-- once wrote while it was wrong keeps a callback waiting.

-- Those of the orders that have money: Order Service must not mark them failed. A payment's money
-- stands if it is known to be a SUCCESS, and not to be REFUNDED: no part of it, but all went back.
--
-- Both the outbox and `payments` are asked, since each may know what the other does not: the outbox
-- begins with the first address and is pruned, and either of their followers may be behind. What one
-- of them says of a REFUNDED holds, whatever the other says, for nothing comes after it.
--
-- Each order is looked at once, however many payments it has.
CREATE OR REPLACE FUNCTION paid_orders(orders uuid[]) RETURNS uuid[]
LANGUAGE plpgsql STABLE
SET plan_cache_mode = force_generic_plan
AS $$
BEGIN
    RETURN ARRAY(
        SELECT o.id FROM (SELECT DISTINCT unnest(orders)) AS o (id)
         WHERE EXISTS (
               SELECT FROM (
                      SELECT d.payment_id, d.status FROM callback_deliveries d
                       WHERE d.order_id = o.id AND d.status <> 'FAILED'
                       UNION ALL
                      SELECT p.id, p.status FROM payments p
                       WHERE p.merchant_order_id = o.id AND p.status IN ('SUCCESS', 'REFUNDED')
                      ) AS known (payment_id, status)
                GROUP BY known.payment_id HAVING bool_and(known.status = 'SUCCESS')));
END $$;

-- As it was, but for two things.
--
-- A lane's time that is further ahead than any pause allows was written while the clock was ahead, or
-- the clock was set back since: nobody may wait until it comes. Such a lane is due. If something of
-- it is in flight, it is given a whole lease from now on: its sender may still be at it, and an order
-- is told one thing at a time.
--
-- Probes go round by the claims, which are numbered: by the time of the last one, a lane that was
-- tried while the clock was ahead would have its turn behind all others until that time comes.
CREATE OR REPLACE FUNCTION claim_callbacks(
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
    -- No lane's time is rightly behind this: the longest pause is an hour (WAIT_MAX_S in
    -- callbacks/retry.py, Retry-After as well), a lease is seconds. The rest is for small steps of
    -- the clock, which end no pause.
    latest CONSTANT timestamptz := moment + interval '70 minutes';
    astray uuid[];
    orders uuid[];
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
        UPDATE callback_lanes l
           SET next_at = CASE WHEN l.in_flight IS NULL THEN moment
                              ELSE moment + make_interval(secs => lease_s) END
         WHERE l.order_id = ANY (astray);
    END IF;

    IF probing THEN
        orders := ARRAY(
            SELECT l.order_id FROM callback_lanes l
             WHERE l.in_flight IS NULL OR l.next_at <= moment
             ORDER BY l.claim NULLS FIRST LIMIT 20 FOR UPDATE SKIP LOCKED);
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
             ORDER BY l.claim NULLS FIRST LIMIT 1);
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
