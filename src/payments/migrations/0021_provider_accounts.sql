-- oldest: 0005
-- Which account of each provider this database's payments are in: another one would know nothing of
-- what was captured.

-- One row for each provider that has accounts, made by the first process that was told its account.
-- Whoever removes one accepts the account of the next process that starts.
CREATE TABLE provider_accounts (
    gateway  text        NOT NULL PRIMARY KEY,
    account  text        NOT NULL, -- the provider's own id of it
    noted_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- The version before keeps the simulated provider's in simulated_ledger, which stays for it.
INSERT INTO provider_accounts (gateway, account, noted_at)
SELECT 'simulated', id::text, noted_at FROM simulated_ledger;

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
        EXECUTE format('GRANT %s ON provider_accounts TO %s', granted.privilege, granted.grantee);
    END LOOP;
END $$;
