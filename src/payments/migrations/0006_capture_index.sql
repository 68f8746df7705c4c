-- oldest: 0005
-- Captures by the provider's own id of them, so that the append finds out whether another payment
-- names the same one. The expression is that of captured_transaction() in 0007, which Postgres
-- expands to it: a function of our own could not be part of this file, which holds one statement.
CREATE INDEX CONCURRENTLY IF NOT EXISTS payment_events_capture
    ON payment_events (split_part(split_part(encode(state, 'escape'), '"provider_txn_id":"', 2), '"', 1))
 WHERE topic IN ('PaymentCharged', 'LateCaptureFound');
