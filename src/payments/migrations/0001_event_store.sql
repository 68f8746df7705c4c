-- The event store: one append-only table, one function that writes it, one view to read it by hand.

-- Every fact about every payment, in the order in which it was committed.
-- A stream is one payment (originator_id); a position is a place in the whole log (notification_id,
-- 1, 2, 3 … without gaps). The column names are those of the eventsourcing library.
CREATE TABLE payment_events (
    notification_id    bigint      NOT NULL,
    originator_id      uuid        NOT NULL,
    originator_version bigint      NOT NULL,
    topic              text        NOT NULL,
    state              bytea       NOT NULL,
    recorded_at        timestamptz NOT NULL,
    CONSTRAINT payment_events_stream PRIMARY KEY (originator_id, originator_version),
    CONSTRAINT payment_events_position UNIQUE (notification_id)
);

CREATE FUNCTION refuse_change_of_payment_events() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'payment_events is append-only: % is refused', TG_OP
        USING ERRCODE = 'insufficient_privilege';
END $$;

CREATE TRIGGER payment_events_append_only
    BEFORE UPDATE OR DELETE OR TRUNCATE ON payment_events
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change_of_payment_events();

-- ALWAYS: also in sessions that run as a replica, where ordinary triggers are silent.
ALTER TABLE payment_events ENABLE ALWAYS TRIGGER payment_events_append_only;

-- Appends a batch: each append whole or not at all, in the order given, all in this transaction.
--
-- An append is some consecutive events of one stream. One row per append: streams, first_versions
-- (the version of its first event), sizes (how many events). One row per event: append_nos (which
-- append it belongs to, counted from 1, never decreasing), topics, states.
-- Returns one row per append, in order:
--   outcome   'appended'  this call stored its events
--             'repeated'  the very same events (topic and state) stood there already
--             'conflict'  the stream has another last version, or other events stand there
--   position  where its last event stands; NULL for a conflict
--   first_state  for a conflict the state of the stream's first event, if it has one: the caller
--             learns whose stream it is without having to ask again
CREATE FUNCTION append_payment_events(
    streams uuid[], first_versions bigint[], sizes integer[],
    append_nos integer[], topics text[], states bytea[]
) RETURNS TABLE (outcome text, "position" bigint, first_state bytea)
LANGUAGE plpgsql VOLATILE
-- Planning took twice as long as running; and a plan made while the table was small must not scan it.
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
AS $$
DECLARE
    head     bigint;      -- the last position that is taken
    stamp    timestamptz; -- recorded_at of this batch
    versions bigint[];    -- for append i: the last version of its stream before this batch, or, if
                          -- i is the first of its stream in the batch, as of now
    leader   integer;     -- the first append in the batch that has the stream at hand
    skipped  integer[];   -- for append i: how many events of the batch stand before its first
    bases    bigint[];    -- for append i: what to add to an event's place in the batch to get its
                          -- position; NULL when the append conflicts
    events   integer := 0;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'append_payment_events needs READ COMMITTED'
            USING ERRCODE = 'invalid_transaction_state';
    END IF;

    -- Positions are given out under this lock, and it is held until the commit is done. So the
    -- order of positions is the order of commits: a reader that has seen position n never has to
    -- look below n again. VOLATILE and READ COMMITTED matter here: each statement below must see
    -- what the previous holder of the lock committed. Not LOCK TABLE, which fights autovacuum.
    PERFORM pg_advisory_xact_lock(7165010, 1);

    SELECT e.notification_id, e.recorded_at INTO head, stamp
      FROM payment_events e ORDER BY e.notification_id DESC LIMIT 1;
    head := coalesce(head, 0);
    -- Time never runs backwards along the log, even when the server's clock was set back.
    stamp := greatest(clock_timestamp(), stamp);

    versions := ARRAY(
        SELECT (SELECT max(e.originator_version) FROM payment_events e
                 WHERE e.originator_id = s.stream)
          FROM unnest(streams) WITH ORDINALITY AS s (stream, no) ORDER BY s.no);

    FOR i IN 1 .. cardinality(streams) LOOP
        leader := array_position(streams, streams[i]);
        skipped[i] := events;
        -- A stream begins at version 1; other users of the library may begin at 0.
        IF first_versions[i] = versions[leader] + 1
           OR (versions[leader] IS NULL AND first_versions[i] IN (0, 1)) THEN
            bases[i] := head - events;
            head := head + sizes[i];
            versions[leader] := first_versions[i] + sizes[i] - 1;
        ELSE
            bases[i] := NULL;
        END IF;
        events := events + sizes[i];
    END LOOP;

    INSERT INTO payment_events
           (notification_id, originator_id, originator_version, topic, state, recorded_at)
    SELECT bases[e.no] + e.place,
           streams[e.no],
           first_versions[e.no] + e.place - skipped[e.no] - 1,
           e.topic, e.state, stamp
      FROM unnest(append_nos, topics, states) WITH ORDINALITY AS e (no, topic, state, place)
     WHERE bases[e.no] IS NOT NULL;

    -- A hint only: followers also poll.
    NOTIFY payment_events;

    FOR i IN 1 .. cardinality(streams) LOOP
        IF bases[i] IS NOT NULL THEN
            outcome := 'appended';
            "position" := bases[i] + skipped[i] + sizes[i];
        ELSE
            SELECT CASE WHEN count(*) = sizes[i] THEN max(stored.notification_id) END INTO "position"
              FROM unnest(append_nos, topics, states) WITH ORDINALITY AS e (no, topic, state, place)
              JOIN payment_events stored
                ON stored.originator_id = streams[i]
               AND stored.originator_version = first_versions[i] + e.place - skipped[i] - 1
               AND stored.topic = e.topic AND stored.state = e.state
             WHERE e.no = i;
            outcome := CASE WHEN "position" IS NULL THEN 'conflict' ELSE 'repeated' END;
        END IF;
        first_state := NULL;
        IF outcome = 'conflict' THEN
            SELECT e.state INTO first_state
              FROM payment_events e WHERE e.originator_id = streams[i] AND e.originator_version = 1;
        END IF;
        RETURN NEXT;
    END LOOP;
END $$;

-- JSON of an event's state, or NULL where the bytes are not JSON: the view must show every row.
CREATE FUNCTION payment_event_json(state bytea) RETURNS json
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS $$
BEGIN
    RETURN convert_from(state, 'UTF8')::json;
EXCEPTION WHEN data_exception OR statement_too_complex THEN
    RETURN NULL;
END $$;

-- When the fact happened, by the application's clock; NULL where that cannot be read.
CREATE FUNCTION payment_event_occurred_at(state bytea) RETURNS timestamptz
LANGUAGE plpgsql STABLE STRICT PARALLEL SAFE AS $$
BEGIN
    RETURN (convert_from(state, 'UTF8')::json ->> 'occurred_at')::timestamptz;
EXCEPTION WHEN data_exception OR statement_too_complex THEN
    RETURN NULL;
END $$;

-- The log for people: json, not jsonb, so that the text is exactly what is stored.
CREATE VIEW payment_event_log AS
SELECT notification_id    AS "position",
       originator_id      AS payment_id,
       originator_version AS version,
       topic              AS type,
       payment_event_json(state) AS data,
       payment_event_occurred_at(state) AS occurred_at,
       recorded_at
  FROM payment_events;
