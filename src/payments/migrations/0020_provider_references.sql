-- oldest: 0005
-- The providers' own ids of charges, and which payment each belongs to: a payment method that can be
-- used once, sent with two keys, must not be charged twice. The append function claims them, under its
-- lock and in its transaction.

-- One row for each reference that an event holds (PaymentInitiated, PaymentReferenced), written by
-- append_payment_events alone.
CREATE TABLE provider_references (
    gateway    text NOT NULL,
    reference  text NOT NULL COLLATE "C",
    payment_id uuid NOT NULL,
    PRIMARY KEY (gateway, reference)
);

-- The reference out of an event's stored bytes; '' if it holds none.
CREATE FUNCTION stored_reference(state bytea) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT split_part(split_part(encode(state, 'escape'), '"provider_reference":"', 2), '"', 1)
$$;

-- Appends a batch: each append whole or not at all, in the order given, all in this transaction.
--
-- An append is some consecutive events of one stream. One row per append: streams, first_versions
-- (the version of its first event), sizes (how many events), predecessors (the state of the event
-- before it as its caller knows it, NULL if it need not be compared: a log that went back may have
-- grown again to the same version). One row per event: append_nos (which append it belongs to,
-- counted from 1, never decreasing), topics, states. `told` is the time by the application's clock,
-- NULL if it has none. `exclusively`: refuse captures and references that another payment has.
-- Returns one row per append, in order:
--   outcome   'appended'  this call stored its events
--             'repeated'  the very same events (topic and state) stood there already
--             'conflict'  the stream has another last version, other events stand there, or its last
--                         event is not the predecessor
--             'captured'  another payment of the same provider names the capture; nothing was stored
--             'claimed'   another payment of the same provider has the reference; nothing was stored
--   position  where its last event stands; NULL unless it is stored
--   first_state  for a conflict the state of the stream's first event, if it has one: the caller
--             learns whose stream it is without having to ask again
--
-- SECURITY DEFINER: a role may append without being allowed to insert (docs/security.md).
CREATE OR REPLACE FUNCTION append_payment_events(
    streams uuid[], first_versions bigint[], sizes integer[],
    append_nos integer[], topics text[], states bytea[],
    predecessors bytea[], told timestamptz, exclusively boolean
) RETURNS TABLE (outcome text, "position" bigint, first_state bytea)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
-- Planning took twice as long as running; and a plan made while the table was small must not scan it.
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
AS $$
DECLARE
    head     bigint;      -- the last position that is taken
    before   bigint;      -- the same, before this batch
    clock    timestamptz := clock_timestamp();
    stamp    timestamptz; -- recorded_at of this batch
    versions bigint[];    -- for append i: the last version of its stream before this batch, -2 if
                          -- that event is another one than the predecessor; for a leader, as of now
    last     bigint;      -- the same for the append at hand, with what the batch appended before it
    places   integer[];   -- for a leader: where in the batch its stream's last event stands
    leader   integer;     -- the first append in the batch that has the stream at hand
    skipped  integer[];   -- for append i: how many events of the batch stand before its first
    bases    bigint[];    -- for append i: what to add to an event's place in the batch to get its
                          -- position; NULL when the append conflicts
    captures text[];      -- that this batch names
    taken    integer[] := '{}'; -- appends whose capture another payment names
    claimed  integer[] := '{}'; -- appends whose reference another payment has
    provider text;        -- of the append at hand
    events   integer := 0;
    written  integer;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'append_payment_events needs READ COMMITTED'
            USING ERRCODE = 'invalid_transaction_state';
    END IF;

    -- Positions are given out under this lock, and it is held until the commit is done. So the
    -- order of positions is the order of commits: a reader that has seen position n never has to
    -- look below n again. VOLATILE and READ COMMITTED matter here: each statement below must see
    -- what the previous holder of the lock committed. It is a table of its own: on payment_events
    -- the lock would fight autovacuum, and an advisory lock can be taken by everybody.
    LOCK TABLE append_lock IN SHARE UPDATE EXCLUSIVE MODE;

    SELECT e.notification_id, e.recorded_at INTO head, stamp
      FROM payment_events e ORDER BY e.notification_id DESC LIMIT 1;
    head := coalesce(head, 0);
    before := head;
    -- A clock that is far ahead must not become the log's time for good: of two that are more than
    -- a minute apart the earlier one counts. And time never runs backwards along the log, nor leaves
    -- what the table takes: an outcome is never refused for a clock.
    IF told IS NOT NULL AND (told < clock - interval '60 s' OR told > clock + interval '60 s') THEN
        clock := least(clock, told);
    END IF;
    stamp := least(greatest(clock, stamp, '2000-01-01Z'::timestamptz), '2200-01-01Z'::timestamptz);

    versions := ARRAY(
        SELECT (SELECT CASE WHEN s.predecessor IS NULL OR s.predecessor = e.state
                            THEN e.originator_version ELSE -2 END
                  FROM payment_events e WHERE e.originator_id = s.stream
                 ORDER BY e.originator_version DESC LIMIT 1)
          FROM unnest(streams, predecessors) WITH ORDINALITY AS s (stream, predecessor, no)
         ORDER BY s.no);

    IF exclusively AND topics && ARRAY['PaymentCharged', 'LateCaptureFound'] THEN
        captures := ARRAY(
            SELECT DISTINCT captured_transaction(e.state)
              FROM unnest(topics, states) AS e (topic, state)
             WHERE e.topic IN ('PaymentCharged', 'LateCaptureFound'));
        -- Nearly always nobody names them, which one look into the index tells.
        IF EXISTS (SELECT FROM payment_events e
                    WHERE captured_transaction(e.state) = ANY (captures)
                      AND e.topic IN ('PaymentCharged', 'LateCaptureFound'))
           OR cardinality(captures) < cardinality(topics) - cardinality(
                  array_remove(array_remove(topics, 'PaymentCharged'), 'LateCaptureFound'))
        THEN
            taken := ARRAY(
                SELECT c.no
                  FROM (SELECT e.no, e.capture,
                               row_number() OVER (PARTITION BY e.capture ORDER BY e.no) AS nth
                          FROM (SELECT b.no, nullif(captured_transaction(b.state), '') AS capture
                                  FROM unnest(append_nos, topics, states) AS b (no, topic, state)
                                 WHERE b.topic IN ('PaymentCharged', 'LateCaptureFound')) AS e) AS c
                 WHERE c.capture IS NOT NULL
                   -- One look into the index for each: a join could be planned to read all captures.
                   AND (c.nth > 1 OR (
                       SELECT e.originator_id FROM payment_events e
                        WHERE captured_transaction(e.state) = c.capture
                          AND e.topic IN ('PaymentCharged', 'LateCaptureFound')
                          AND e.originator_id <> streams[c.no]
                          -- The same id at another provider is another capture.
                          AND (SELECT initiated_gateway(f.state) FROM payment_events f
                                WHERE f.originator_id = e.originator_id AND f.originator_version = 1)
                            = coalesce((SELECT initiated_gateway(f.state) FROM payment_events f
                                         WHERE f.originator_id = streams[c.no]
                                           AND f.originator_version = 1),
                                       (SELECT initiated_gateway(b.state)
                                          FROM unnest(append_nos, topics, states)
                                            AS b (no, topic, state)
                                         WHERE b.no = c.no AND b.topic = 'PaymentInitiated' LIMIT 1))
                        LIMIT 1) IS NOT NULL));
        END IF;
    END IF;

    FOR i IN 1 .. cardinality(streams) LOOP
        leader := array_position(streams, streams[i]);
        skipped[i] := events;
        bases[i] := NULL;
        IF places[leader] IS NULL THEN
            last := versions[i];
        ELSIF predecessors[i] IS NULL OR predecessors[i] = states[places[leader]] THEN
            last := versions[leader];
        ELSE
            last := -2;
        END IF;
        -- A stream begins at version 1; other users of the library may begin at 0.
        IF first_versions[i] = last + 1 OR (last IS NULL AND first_versions[i] IN (0, 1)) THEN
            IF sizes[i] > 1 OR position('"provider_reference":"'::bytea IN states[events + 1]) > 0 THEN
                provider := coalesce(
                    (SELECT initiated_gateway(e.state) FROM payment_events e
                      WHERE e.originator_id = streams[i] AND e.originator_version = 1),
                    (SELECT initiated_gateway(b.state)
                       FROM unnest(append_nos, topics, states) AS b (no, topic, state)
                      WHERE streams[b.no] = streams[i] AND b.topic = 'PaymentInitiated' LIMIT 1),
                    '');
                IF exclusively AND EXISTS (SELECT FROM unnest(states[events + 1 : events + sizes[i]]) AS b (state)
                             JOIN provider_references r
                               ON r.gateway = provider AND r.reference = stored_reference(b.state)
                            WHERE r.payment_id <> streams[i])
                THEN
                    claimed := claimed || i;
                ELSIF NOT i = ANY (taken) THEN
                    INSERT INTO provider_references (gateway, reference, payment_id)
                    SELECT DISTINCT provider, stored_reference(b.state), streams[i]
                      FROM unnest(states[events + 1 : events + sizes[i]]) AS b (state)
                     WHERE stored_reference(b.state) <> ''
                        ON CONFLICT DO NOTHING;
                END IF;
            END IF;
            IF NOT i = ANY (taken) AND NOT i = ANY (claimed) THEN
                bases[i] := head - events;
                head := head + sizes[i];
                versions[leader] := first_versions[i] + sizes[i] - 1;
                places[leader] := events + sizes[i];
            END IF;
        ELSE
            taken := array_remove(taken, i); -- it is decided again on the stream as it is
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
    GET DIAGNOSTICS written = ROW_COUNT;
    -- A trigger or a rule of somebody else may have swallowed rows.
    IF written <> head - before THEN
        RAISE EXCEPTION 'payment_events took % of % events', written, head - before
            USING ERRCODE = 'triggered_action_exception';
    END IF;

    IF head = before THEN
        -- What is answered from the log must have reached the standby as well, and a commit waits
        -- for it only if its transaction wrote to the WAL: after a crash between the commit and the
        -- standby's word, events stand here that a failover would lose.
        PERFORM pg_logical_emit_message(true, 'payments', '');
    END IF;

    FOR i IN 1 .. cardinality(streams) LOOP
        IF bases[i] IS NOT NULL THEN
            outcome := 'appended';
            "position" := bases[i] + skipped[i] + sizes[i];
        ELSIF i = ANY (taken) THEN
            outcome := 'captured';
            "position" := NULL;
        ELSIF i = ANY (claimed) THEN
            outcome := 'claimed';
            "position" := NULL;
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

-- A function that is replaced loses the path that 0007_append.sql pinned.
DO $$
BEGIN
    EXECUTE format(
        'ALTER FUNCTION append_payment_events(uuid[], bigint[], integer[], integer[], text[],'
        ' bytea[], bytea[], timestamptz, boolean) SET search_path = pg_catalog, %I, pg_temp',
        current_schema());
END $$;

-- Whoever may read the log may read them.
DO $$
DECLARE
    reader text;
BEGIN
    FOR reader IN
        SELECT DISTINCT CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE quote_ident(r.rolname) END
          FROM pg_class c CROSS JOIN aclexplode(c.relacl) a LEFT JOIN pg_roles r ON r.oid = a.grantee
         WHERE c.oid = 'payment_events'::regclass AND a.privilege_type = 'SELECT'
    LOOP
        EXECUTE format('GRANT SELECT ON provider_references TO %s', reader);
    END LOOP;
END $$;
