-- Evidence that the log is what it was, and what a rebuild of a read model took out of its way.

-- One row per event, written by the follower `seals` soon after the event's commit: a chain of
-- SHA-256 over the log in the order of positions (src/payments/events/chain.py). Whoever alters the
-- log must alter every later seal too, and then still differs from a head that was kept elsewhere.
CREATE TABLE log_seals (
    position bigint PRIMARY KEY,
    hash     bytea  NOT NULL CHECK (length(hash) = 32)
);

CREATE FUNCTION refuse_change_of_log_seals() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'log_seals is append-only: % is refused', TG_OP
        USING ERRCODE = 'insufficient_privilege';
END $$;

CREATE TRIGGER log_seals_append_only
    BEFORE UPDATE OR DELETE OR TRUNCATE ON log_seals
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change_of_log_seals();

ALTER TABLE log_seals ENABLE ALWAYS TRIGGER log_seals_append_only;

INSERT INTO followers (name, position) VALUES ('seals', 0);

-- Rows of read models that differed from the log, as they were before `payments rebuild` wrote
-- what the log says, or removed them. For people; it may be emptied.
CREATE TABLE replaced_rows (
    rebuilt_at timestamptz NOT NULL, -- the same for all rows of one rebuild
    table_name text        NOT NULL,
    id         uuid        NOT NULL,
    row        jsonb       NOT NULL
);

CREATE INDEX replaced_rows_of_rebuild ON replaced_rows (rebuilt_at);
