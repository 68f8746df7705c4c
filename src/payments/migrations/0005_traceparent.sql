-- The trace that a callback belongs to: that of the event it tells, from the event's metadata.
ALTER TABLE callback_deliveries ADD COLUMN traceparent text;
