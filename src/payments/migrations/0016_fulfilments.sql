-- oldest: 0005
-- Captured payments whose order may not have been fulfilled. No read model: it holds what Order
-- Service said, and `payments reconcile orders` finds it again.

-- One row per payment; none once its order is known to be confirmed by it, or its money went back.
--   suspect      nobody asked yet, or the order's status is not known: see said and problem
--   unfulfilled  ORDER_STATUS_URL shows its order as failed
--   paid_twice   its order is confirmed, and was paid before by another payment that stands
--   given_back   the service gave it back itself (UNFULFILLED=refund)
CREATE TABLE fulfilments (
    payment_id   uuid        PRIMARY KEY,
    order_id     uuid        NOT NULL,
    state        text        NOT NULL
                 CHECK (state IN ('suspect', 'unfulfilled', 'paid_twice', 'given_back')),
    -- What the response to its SUCCESS said of the order:
    --   nothing            nothing that we understand
    --   already_processed  that it was decided before, in response to the first attempt
    --   repeated           the same, in response to a later attempt: an earlier one may have done it
    --   failed             that it is failed
    --   not_asked          none was a reason: the payment was found beside another one of its order,
    --                      or by `payments reconcile orders`
    said         text        NOT NULL
                 CHECK (said IN ('nothing', 'already_processed', 'repeated', 'failed', 'not_asked')),
    order_status text,        -- as ORDER_STATUS_URL showed it last, in its own words
    problem      text,        -- why that told nothing; NULL if it told the status
    found_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    checked_at   timestamptz, -- when ORDER_STATUS_URL was asked last
    failed_since timestamptz, -- the first of the readings in a row that showed it as failed
    given_back_at timestamptz,
    attempts     integer     NOT NULL DEFAULT 0, -- how often it was asked
    next_at      timestamptz NOT NULL DEFAULT clock_timestamp(), -- when it may be claimed; or a lease
    claim        bigint       -- of the process that asks; a result is taken from no other, and
                              -- then it is NULL again
);

CREATE INDEX fulfilments_next ON fulfilments (next_at) WHERE state <> 'given_back';
CREATE INDEX fulfilments_found ON fulfilments (found_at);
CREATE INDEX fulfilments_given_back ON fulfilments (given_back_at) WHERE state = 'given_back';
-- What is listed and counted (queries/fulfilments.py), however many there are that nobody can judge.
CREATE INDEX fulfilments_shown ON fulfilments (state, found_at, payment_id)
 WHERE NOT (state = 'suspect' AND said IN ('nothing', 'repeated') AND checked_at IS NULL);

-- Never the same number twice, also when a row went and came again.
CREATE SEQUENCE fulfilment_claims;

-- Each time that the service stopped giving back by itself, since it had given back too much, and who
-- let it go on. While a row has no lifted_at, nothing is given back.
CREATE TABLE giving_back_stopped (
    id            bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    stopped_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    reason        text        NOT NULL,
    lifted_at     timestamptz,
    lifted_by     text, -- the person
    lifted_reason text  -- theirs
);

CREATE UNIQUE INDEX giving_back_stopped_now ON giving_back_stopped ((true)) WHERE lifted_at IS NULL;

-- What the service began to give back by itself in the last hour, since it was let go on: what counts
-- towards stopping.
CREATE TABLE giving_back_begun (
    payment_id uuid        PRIMARY KEY,
    begun_at   timestamptz NOT NULL
);

-- Whether one more payment may be given back now; if so it counts, once however often it is asked
-- about within an hour. At most `fewest` may go in an hour, or one in `one_in` of those that were
-- begun and captured in it, if that is more. Otherwise nothing is given back any more.
--   begun    it may
--   stops    it may not, and from now on none may
--   stopped  none may
--
-- One process at a time: two must not both find room for the last one. The lock is one that only
-- those who write the table can take.
CREATE FUNCTION begin_giving_back(payment uuid, fewest integer, one_in integer) RETURNS text
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    moment   timestamptz;
    others   bigint;
    captured bigint;
BEGIN
    LOCK TABLE giving_back_begun IN SHARE ROW EXCLUSIVE MODE;
    IF EXISTS (SELECT FROM giving_back_stopped WHERE lifted_at IS NULL) THEN
        RETURN 'stopped';
    END IF;
    moment := clock_timestamp();
    DELETE FROM giving_back_begun WHERE begun_at < moment - interval '1 hour';
    others := (SELECT count(*) FROM giving_back_begun WHERE payment_id <> payment);
    IF others >= fewest THEN
        -- No more of them are looked at than would do.
        captured := (
            SELECT count(*) FROM (
                SELECT FROM payments
                 WHERE status IN ('SUCCESS', 'REFUNDED')
                   AND created_at > moment AT TIME ZONE 'UTC' - interval '1 hour'
                 LIMIT (others + 1) * one_in) AS enough);
        IF (others + 1) * one_in > captured THEN
            INSERT INTO giving_back_stopped (reason) VALUES (format(
                '%s were given back within an hour, in which %s were captured: at most %s may be, '
                'or one in %s of these', others, captured, fewest, one_in));
            RETURN 'stops';
        END IF;
    END IF;
    INSERT INTO giving_back_begun VALUES (payment, moment)
        ON CONFLICT (payment_id) DO UPDATE SET begun_at = excluded.begun_at;
    RETURN 'begun';
END $$;

-- Whoever calls back also notes what the responses said, and whoever reads callbacks may read that.
DO $$
DECLARE
    granted record;
BEGIN
    FOR granted IN
        SELECT DISTINCT CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE quote_ident(r.rolname) END AS grantee,
               a.privilege_type AS privilege
          FROM pg_class c CROSS JOIN aclexplode(c.relacl) a LEFT JOIN pg_roles r ON r.oid = a.grantee
         WHERE c.oid = 'callback_lanes'::regclass
           AND a.privilege_type IN ('SELECT', 'INSERT', 'UPDATE', 'DELETE')
    LOOP
        EXECUTE format('GRANT %s ON fulfilments, giving_back_stopped, giving_back_begun TO %s',
                       granted.privilege, granted.grantee);
        IF granted.privilege = 'UPDATE' THEN
            EXECUTE format('GRANT USAGE ON SEQUENCE fulfilment_claims TO %s', granted.grantee);
        END IF;
    END LOOP;
END $$;
