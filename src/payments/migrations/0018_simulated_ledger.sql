-- oldest: 0005
-- Which ledger the simulated provider keeps of this database's payments: a process that finds another
-- one would know nothing of what was captured.

-- One row, made by the first process with a ledger in a file. Whoever removes it accepts the ledger
-- of the next process that starts.
CREATE TABLE simulated_ledger (
    single   boolean     PRIMARY KEY DEFAULT true CHECK (single),
    id       uuid        NOT NULL, -- the one that stands in the file
    noted_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- Whoever may read the log may read it, and whoever settles may make it.
DO $$
DECLARE
    granted record;
BEGIN
    FOR granted IN
        SELECT DISTINCT CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE quote_ident(r.rolname) END AS grantee,
               CASE a.privilege_type WHEN 'UPDATE' THEN 'INSERT' ELSE 'SELECT' END AS privilege
          FROM pg_class c CROSS JOIN aclexplode(c.relacl) a LEFT JOIN pg_roles r ON r.oid = a.grantee
         WHERE (c.oid = 'payment_events'::regclass AND a.privilege_type = 'SELECT')
            OR (c.oid = 'unsettled_payments'::regclass AND a.privilege_type = 'UPDATE')
    LOOP
        EXECUTE format('GRANT %s ON simulated_ledger TO %s', granted.privilege, granted.grantee);
    END LOOP;
END $$;
