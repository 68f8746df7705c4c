-- oldest: 0005
-- Payments of the service that had this database before (docs/migrating-from-node.md).

-- The ids that they had there: what asks for one of these finds its payment. One row for each that
-- was imported, so that an import that was interrupted goes on behind it.
CREATE TABLE legacy_payment_ids (
    legacy_id  uuid PRIMARY KEY,
    payment_id uuid NOT NULL
);

-- The import, at most one: what was asked for, and whether it is complete. Until then no service
-- starts: a key whose row is still to come would be charged again.
CREATE TABLE legacy_import (
    one          boolean     PRIMARY KEY DEFAULT true CHECK (one),
    gateway      text        NOT NULL,
    timezone     text        NOT NULL,
    begun_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    completed_at timestamptz
);

-- Whoever may read the log may read them.
DO $$
DECLARE
    grantee text;
BEGIN
    FOR grantee IN
        SELECT DISTINCT CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE quote_ident(r.rolname) END
          FROM pg_class c CROSS JOIN aclexplode(c.relacl) a LEFT JOIN pg_roles r ON r.oid = a.grantee
         WHERE c.oid = 'payment_events'::regclass AND a.privilege_type = 'SELECT'
    LOOP
        EXECUTE format('GRANT SELECT ON legacy_payment_ids, legacy_import TO %s', grantee);
    END LOOP;
END $$;
