-- What is made after the rows, because it is faster then: references, indexes, triggers, views, grants.
SET ROLE agentweave_owner;
DO $$
DECLARE
    document oid;
BEGIN
    FOR document IN SELECT e.document FROM workflow_exports AS e LOOP
        EXECUTE format('GRANT SELECT ON LARGE OBJECT %s TO agentweave_readonly', document);
    END LOOP;
END
$$;
ALTER TABLE workflows ADD CONSTRAINT workflows_current_version_fkey
    FOREIGN KEY (id, current_version) REFERENCES workflow_versions DEFERRABLE INITIALLY DEFERRED;
ALTER TABLE executions ADD CONSTRAINT executions_version_fkey
    FOREIGN KEY (workflow_id, workflow_version) REFERENCES workflow_versions;
ALTER TABLE execution_steps ADD CONSTRAINT execution_steps_execution_fkey
    FOREIGN KEY (execution_id, started_at) REFERENCES executions ON DELETE CASCADE;

CREATE INDEX workflows_search_idx ON workflows USING gin (search);
CREATE INDEX workflows_name_trgm_idx ON workflows USING gin (name gin_trgm_ops);
CREATE INDEX workflow_versions_definition_idx ON workflow_versions USING gin (definition jsonb_path_ops);
CREATE INDEX executions_workflow_idx ON executions (workflow_id, started_at DESC);
CREATE INDEX executions_open_idx ON executions (started_at) WHERE finished_at IS NULL;
CREATE INDEX audit_log_at_idx ON audit_log USING brin (at);

CREATE FUNCTION record_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO audit_log (action, relation, before, after)
    VALUES (lower(TG_OP), TG_TABLE_NAME,
            CASE WHEN TG_OP <> 'INSERT' THEN to_jsonb(OLD) - 'search' - 'key_sha256' END,
            CASE WHEN TG_OP <> 'DELETE' THEN to_jsonb(NEW) - 'search' - 'key_sha256' END);
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION record_change() IS 'Writes who changed what into audit_log';
CREATE TRIGGER workflows_audit AFTER INSERT OR UPDATE OR DELETE ON workflows
    FOR EACH ROW EXECUTE FUNCTION record_change();
CREATE TRIGGER api_keys_audit AFTER INSERT OR UPDATE OR DELETE ON api_keys
    FOR EACH ROW EXECUTE FUNCTION record_change();

CREATE VIEW active_workflows AS
    SELECT w.id, w.slug, w.name, w.current_version, jsonb_array_length(v.definition -> 'nodes') AS nodes
    FROM workflows w JOIN workflow_versions v ON v.workflow_id = w.id AND v.version = w.current_version
    WHERE w.is_active;
CREATE MATERIALIZED VIEW daily_usage AS
    SELECT date_trunc('day', started_at) AS day, count(*) AS executions, sum(cost_usd) AS cost_usd
    FROM executions GROUP BY 1;
CREATE UNIQUE INDEX daily_usage_day_key ON daily_usage (day);

GRANT USAGE ON SCHEMA public TO agentweave_readonly;
GRANT SELECT ON ALL TABLES IN SCHEMA public TO agentweave_readonly;
REVOKE SELECT ON api_keys FROM agentweave_readonly;
GRANT SELECT (id, user_id, prefix, scopes, valid) ON api_keys TO agentweave_readonly;
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO agentweave_app;
REVOKE UPDATE, DELETE ON audit_log FROM agentweave_app;
GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO agentweave_app;
ALTER DEFAULT PRIVILEGES FOR ROLE agentweave_owner IN SCHEMA public GRANT SELECT ON TABLES TO agentweave_readonly;
RESET ROLE;
