-- oldest: 0005
-- Which log this is, and what it lost: a failover to a standby that lagged, or a restore, takes
-- back what was acknowledged.

-- One row, made with the schema; a restored copy keeps it.
CREATE TABLE log_identity (
    single boolean PRIMARY KEY DEFAULT true CHECK (single),
    id     uuid    NOT NULL DEFAULT gen_random_uuid()
);

INSERT INTO log_identity DEFAULT VALUES;

-- One row when a process finds that the log lacks what was acknowledged (`found`), and one when a
-- person has accepted that (`accepted`, `payments log accept-loss`). A loss is open while a `found`
-- has no `accepted` behind it; nothing is given back meanwhile.
CREATE TABLE log_losses (
    id            bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind          text        NOT NULL CHECK (kind IN ('found', 'accepted')),
    at            timestamptz NOT NULL DEFAULT clock_timestamp(),
    by            text        NOT NULL, -- the process, or the person
    reason        text        NOT NULL,
    kept_position bigint      NOT NULL, -- up to here the log is known to be as it was
    lost_position bigint      NOT NULL, -- the old head: the last position that is known to be lost
    lost_hash     bytea,                -- its seal, if it is known
    head_position bigint      NOT NULL, -- the new head: the log's end then
    head_hash     bytea                 -- its seal, if there was one yet
);

CREATE FUNCTION refuse_change_of_log_losses() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is append-only: % is refused', TG_TABLE_NAME, TG_OP
        USING ERRCODE = 'insufficient_privilege';
END $$;

CREATE TRIGGER log_losses_append_only
    BEFORE UPDATE OR DELETE OR TRUNCATE ON log_losses
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change_of_log_losses();
ALTER TABLE log_losses ENABLE ALWAYS TRIGGER log_losses_append_only;

CREATE TRIGGER log_identity_append_only
    BEFORE UPDATE OR DELETE OR TRUNCATE ON log_identity
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change_of_log_losses();
ALTER TABLE log_identity ENABLE ALWAYS TRIGGER log_identity_append_only;

-- Whoever may append or read the log may tell and read its losses.
DO $$
DECLARE
    granted record;
BEGIN
    FOR granted IN
        SELECT DISTINCT CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE quote_ident(r.rolname) END AS grantee,
               a.privilege_type AS privilege
          FROM pg_class c CROSS JOIN aclexplode(c.relacl) a LEFT JOIN pg_roles r ON r.oid = a.grantee
         WHERE c.oid = 'payment_events'::regclass AND a.privilege_type IN ('SELECT', 'INSERT')
    LOOP
        EXECUTE format('GRANT %s ON log_losses TO %s', granted.privilege, granted.grantee);
        IF granted.privilege = 'SELECT' THEN
            EXECUTE format('GRANT SELECT ON log_identity TO %s', granted.grantee);
        END IF;
    END LOOP;
END $$;
