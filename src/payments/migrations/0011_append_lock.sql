-- oldest: 0005
-- Appends wait for one another at a lock that nobody else can take. An advisory lock has a number
-- that every session may name: a role that only reads could stop all charges with it.

-- The lock of append_payment_events; it has no rows, and no columns. Whoever may read it can only
-- take ACCESS SHARE (as pg_dump does), and that conflicts with nothing of ours.
CREATE TABLE append_lock ();
REVOKE ALL ON append_lock FROM PUBLIC;

-- A call that began with the function as it was may take the other lock a moment from now. Until
-- none of these can be left (0012_append_alone.sql) every call takes both.
DO $$
DECLARE
    before text := pg_get_functiondef(
        'append_payment_events(uuid[], bigint[], integer[], integer[], text[], bytea[], bytea[],'
        ' timestamptz, boolean)'::regprocedure);
    now_on text := replace(before,
        'PERFORM pg_advisory_xact_lock(7165010, 1);',
        'LOCK TABLE append_lock IN SHARE UPDATE EXCLUSIVE MODE;'
        ' PERFORM pg_advisory_xact_lock(7165010, 1);');
BEGIN
    IF now_on = before THEN
        RAISE EXCEPTION 'append_payment_events is not the function of migration 0007';
    END IF;
    EXECUTE now_on;
END $$;
