-- Roles belong to the whole server, not to a database: made when they are missing.
DO $$
DECLARE
    missing text;
BEGIN
    FOR missing IN
        SELECT name FROM unnest(ARRAY['agentweave_owner', 'agentweave_app', 'agentweave_readonly']) AS name
        WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = name)
    LOOP
        EXECUTE format('CREATE ROLE %I', missing);
    END LOOP;
END
$$;
ALTER ROLE agentweave_app LOGIN CONNECTION LIMIT 50;
GRANT agentweave_readonly TO agentweave_app;
