-- oldest: 0005
-- A time, unless Python has none like it: infinity, or a year before 1 or after 9999. Then NULL.
--
-- A single SELECT, not STRICT, without SET and SECURITY DEFINER: so Postgres puts the expression
-- into the query that calls it.
CREATE FUNCTION readable_time(moment timestamptz) RETURNS timestamptz
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE WHEN moment >= '0001-01-01Z' AND moment < '10000-01-01Z' THEN moment END
$$;

-- The same of a column that holds UTC without saying so.
CREATE FUNCTION readable_time(moment timestamp) RETURNS timestamptz
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE WHEN moment >= '0001-01-01' AND moment < '10000-01-01'
                THEN moment AT TIME ZONE 'UTC' END
$$;

-- Whoever may read a table may need them, also where the owner gives out nothing by default.
GRANT EXECUTE ON FUNCTION readable_time(timestamptz), readable_time(timestamp) TO PUBLIC;
