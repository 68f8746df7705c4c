-- oldest: 0005
-- Closing lanes costs the same however many callbacks are due, or were since vacuum came by.

-- As it was, but each lane looks up its own deliveries. As a join it could be planned, while the
-- tables were empty, to go through all that are due for each lane, and the plan is kept until their
-- statistics are new: for a minute of load at first, or for as long as somebody keeps vacuum from
-- removing what is dead.
CREATE OR REPLACE FUNCTION close_callback_lanes(orders uuid[]) RETURNS void
LANGUAGE plpgsql VOLATILE
SET plan_cache_mode = force_generic_plan
AS $$
BEGIN
    DELETE FROM callback_lanes l
     WHERE l.order_id = ANY (orders) AND l.in_flight IS NULL
       AND (SELECT true FROM callback_deliveries d
             WHERE d.order_id = l.order_id AND d.state = 'due'
             ORDER BY d.position LIMIT 1) IS NULL;
END $$;
