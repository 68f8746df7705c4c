-- oldest: 0005
-- Webhooks of providers: which payment to ask about now. Never what became of it.

-- One row per event of a provider, so that one that is delivered again does nothing; and for a while
-- those of payments that are not known yet. It names the payment by our id or by the provider's.
CREATE TABLE provider_hints (
    gateway     text        NOT NULL,
    event_id    text        NOT NULL COLLATE "C",
    payment_id  uuid,
    reference   text        COLLATE "C",
    received_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (gateway, event_id)
);

CREATE INDEX provider_hints_payment ON provider_hints (payment_id) WHERE payment_id IS NOT NULL;
CREATE INDEX provider_hints_reference ON provider_hints (gateway, reference)
 WHERE reference IS NOT NULL;
CREATE INDEX provider_hints_received ON provider_hints (received_at);

-- Whether to ask even if it is too early: a declined payment is otherwise asked about once, days later.
-- The version before does not read it, and asks then.
ALTER TABLE unsettled_payments ADD COLUMN hinted boolean NOT NULL DEFAULT false;

-- Whoever may read the log may read them, and whoever settles may add and remove them.
DO $$
DECLARE
    granted record;
BEGIN
    FOR granted IN
        SELECT DISTINCT CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE quote_ident(r.rolname) END AS grantee,
               CASE a.privilege_type WHEN 'UPDATE' THEN 'SELECT, INSERT, DELETE' ELSE 'SELECT' END
               AS privileges
          FROM pg_class c CROSS JOIN aclexplode(c.relacl) a LEFT JOIN pg_roles r ON r.oid = a.grantee
         WHERE (c.oid = 'payment_events'::regclass AND a.privilege_type = 'SELECT')
            OR (c.oid = 'unsettled_payments'::regclass AND a.privilege_type = 'UPDATE')
    LOOP
        EXECUTE format('GRANT %s ON provider_hints TO %s', granted.privileges, granted.grantee);
    END LOOP;
END $$;
