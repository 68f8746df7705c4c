-- oldest: 0005
-- What stays open is told in the log when it becomes a case for a person, and then rarely, whichever
-- process comes upon it, and whatever was restarted meanwhile.

-- When that was last, and of which level that line was: 30 a warning, 40 an error, 50 critical.
-- NULL: not yet.
ALTER TABLE unsettled_payments
    ADD COLUMN told_at    timestamptz,
    ADD COLUMN told_level smallint;
