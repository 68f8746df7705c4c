-- oldest: 0005
-- Refunds that were never sent, and declined payments that may turn out to be captured.

-- A declined payment is asked about once more, where its gateway says for how long a decline may
-- turn; with the abandoned ones, for which nobody waits.
ALTER TABLE unsettled_payments
    DROP CONSTRAINT unsettled_payments_kind_check,
    DROP COLUMN abandoned,
    ADD COLUMN abandoned boolean NOT NULL
        GENERATED ALWAYS AS (kind IN ('abandoned', 'declined')) STORED,
    ADD CONSTRAINT unsettled_payments_kind_check
        CHECK (kind IN ('charge', 'abandoned', 'declined', 'late_capture', 'refund'));

CREATE INDEX unsettled_payments_due ON unsettled_payments (abandoned, due_at);

-- Refunds under way that a call to the provider has failed to reach at least once, and returns of
-- late captures. Not told by the log: what is missing here counts as sent when its event was
-- recorded.
CREATE TABLE refund_sendings (
    refund_id     uuid        PRIMARY KEY,
    payment_id    uuid        NOT NULL,
    sendings      integer     NOT NULL, -- how many were begun
    first_sent_at timestamptz,          -- of those that may have arrived the first; NULL: none has
    noted_at      timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE INDEX refund_sendings_of_payment ON refund_sendings (payment_id);

-- Whoever settles notes what was sent.
DO $$
DECLARE
    grantee text;
BEGIN
    FOR grantee IN
        SELECT DISTINCT CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE quote_ident(r.rolname) END
          FROM pg_class c CROSS JOIN aclexplode(c.relacl) a LEFT JOIN pg_roles r ON r.oid = a.grantee
         WHERE c.oid = 'unsettled_payments'::regclass AND a.privilege_type = 'UPDATE'
    LOOP
        EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON refund_sendings TO %s', grantee);
    END LOOP;
END $$;
