-- The rows: every value comes from a hash of its row's number and of the seed, so that the same settings
-- make the same database. Settings (strings): demo.seed; demo.first and demo.last, the days between which
-- everything happened; and how many rows: demo.users, demo.workflows, demo.executions, demo.audit_log.
SET ROLE agentweave_owner;
CREATE FUNCTION pg_temp.n(name text) RETURNS bigint LANGUAGE sql STABLE AS
    $$ SELECT current_setting('demo.' || name)::bigint $$;
CREATE FUNCTION pg_temp.pick(i bigint, salt integer, below bigint) RETURNS bigint LANGUAGE sql STABLE AS
    $$ SELECT (hashint8extended(i, pg_temp.n('seed') + salt) & 9223372036854775807) % below $$;
CREATE FUNCTION pg_temp.one_of(i bigint, salt integer, VARIADIC choices text[]) RETURNS text LANGUAGE sql STABLE AS
    $$ SELECT choices[1 + pg_temp.pick(i, salt, cardinality(choices))] $$;
CREATE FUNCTION pg_temp.moment(i bigint, total bigint) RETURNS timestamptz LANGUAGE sql STABLE AS $$
    SELECT first + (current_setting('demo.last')::timestamptz - first) * (i::double precision / total)
    FROM CAST(current_setting('demo.first') AS timestamptz) AS first
$$;

-- What people and agents say: sentences of 7 to 15 words, used again and again as in real logs.
CREATE TEMPORARY TABLE phrases ON COMMIT DROP AS
SELECT n, (SELECT string_agg(words[1 + pg_temp.pick(n * 31 + word, 1, cardinality(words))], ' ')
           FROM generate_series(1, 7 + pg_temp.pick(n, 2, 9)) AS word) AS phrase
FROM generate_series(0, 4095) AS n, regexp_split_to_array(
    'agent tool call retry queue token prompt answer review draft invoice ticket refund parser webhook batch vector '
    'index search summary customer order parcel route carrier cache timeout schema column report daily weekly '
    'budget approval human escalated merged closed opened assigned labelled translated planned executed verified '
    'skipped started finished because after before without within übermäßig café 東京', '\s+') AS words;
ANALYZE phrases;

INSERT INTO users (public_id, email, display_name, roles, preferences, created_at)
SELECT md5('user ' || i || ' ' || pg_temp.n('seed'))::uuid,
       pg_temp.one_of(i, 10, 'ada', 'grace', 'linus', 'margaret', 'edsger', 'barbara') || i || '@example.org',
       initcap(p.phrase),
       CASE WHEN pg_temp.pick(i, 11, 10) = 0 THEN '{admin,member}' ELSE '{member}' END::text[],
       jsonb_build_object('theme', pg_temp.one_of(i, 12, 'dark', 'light'),
                          'notify', pg_temp.pick(i, 13, 2) = 0, 'page', 10 * pg_temp.pick(i, 14, 10)),
       pg_temp.moment(i, pg_temp.n('users'))
FROM generate_series(1, pg_temp.n('users')) AS i JOIN phrases p ON p.n = i % 4096 ORDER BY i;

INSERT INTO workflows (owner_id, slug, name, description, tags, current_version, is_active, created_at, updated_at)
SELECT 1 + pg_temp.pick(i, 20, pg_temp.n('users')), 'workflow-' || i, initcap(p.phrase), p.phrase || '; ' || q.phrase,
       ARRAY[pg_temp.one_of(i, 21, 'sales', 'support', 'finance'), pg_temp.one_of(i, 22, 'beta', 'stable')],
       3, pg_temp.pick(i, 23, 10) > 0, pg_temp.moment(i, pg_temp.n('workflows')), pg_temp.moment(i, pg_temp.n('workflows')) + interval '1 h'
FROM generate_series(1, pg_temp.n('workflows')) AS i
JOIN phrases p ON p.n = pg_temp.pick(i, 24, 4096) JOIN phrases q ON q.n = pg_temp.pick(i, 25, 4096) ORDER BY i;

INSERT INTO workflow_versions (workflow_id, version, definition, created_by, created_at)
SELECT w, v,
       jsonb_build_object('name', 'workflow ' || w, 'version', v, 'nodes', nodes.list,
                          'limits', jsonb_build_object('usd', pg_temp.pick(w * 3 + v, 30, 500) / 100.0, 'retries', v)),
       1 + pg_temp.pick(w, 20, pg_temp.n('users')), pg_temp.moment(w, pg_temp.n('workflows')) + v * interval '1 h'
FROM generate_series(1, pg_temp.n('workflows')) AS w, generate_series(1, 3) AS v,
     LATERAL (SELECT jsonb_agg(jsonb_build_object(
                  'id', node, 'kind', pg_temp.one_of(w * 97 + v * 7 + node, 31, 'prompt', 'tool', 'branch', 'review'),
                  'key', md5((w * 101 + v * 11 + node)::text), 'prompt', p.phrase, 'next', node + 1)) AS list
              FROM generate_series(1, 3 + pg_temp.pick(w, 32, 6)) AS node
              JOIN phrases p ON p.n = pg_temp.pick(w * 89 + v * 5 + node, 33, 4096)) AS nodes;

INSERT INTO executions (workflow_id, workflow_version, status, input, output, cost_usd, started_at, finished_at)
SELECT 1 + pg_temp.pick(i, 40, pg_temp.n('workflows')), 1 + pg_temp.pick(i, 41, 3), status::run_status,
       jsonb_build_object('ticket', pg_temp.pick(i, 42, 1000000), 'text', p.phrase),
       CASE status WHEN 'succeeded' THEN jsonb_build_object('answer', q.phrase, 'score', pg_temp.pick(i, 43, 1000) / 1000.0)
       END, pg_temp.pick(i, 44, 2000000) / 1000000.0, began,
       CASE WHEN status <> 'running' THEN began + pg_temp.pick(i, 45, 90000) * interval '1 ms' END
FROM generate_series(1, pg_temp.n('executions')) AS i
JOIN phrases p ON p.n = pg_temp.pick(i, 46, 4096) JOIN phrases q ON q.n = pg_temp.pick(i, 47, 4096),
     LATERAL (SELECT pg_temp.one_of(i, 48, 'succeeded', 'succeeded', 'succeeded', 'failed', 'cancelled', 'running'),
                     pg_temp.moment(i, pg_temp.n('executions'))) AS run (status, began)
ORDER BY i;

INSERT INTO execution_steps (execution_id, started_at, step, node, status, tokens, took_ms, log)
SELECT e.id, e.started_at, s,
       pg_temp.one_of(e.id + s, 50, 'plan', 'search', 'call-tool', 'write', 'review'),
       e.status, pg_temp.pick(e.id * 5 + s, 51, 8000), pg_temp.pick(e.id * 5 + s, 52, 900000) / 100.0,
       'request ' || md5((e.id * 5 + s)::text) || ' ' || p.phrase || E'\n' || q.phrase || ' in '
       || pg_temp.pick(e.id * 5 + s, 53, 100000) || E' us\n' || r.phrase
FROM executions e CROSS JOIN LATERAL generate_series(1, 1 + pg_temp.pick(e.id, 54, 4)) AS s
JOIN phrases p ON p.n = pg_temp.pick(e.id * 5 + s, 55, 4096)
JOIN phrases q ON q.n = pg_temp.pick(e.id * 5 + s, 56, 4096)
JOIN phrases r ON r.n = pg_temp.pick(e.id * 5 + s, 57, 4096);

INSERT INTO api_keys (user_id, prefix, key_sha256, scopes, valid, last_used_from)
SELECT 1 + pg_temp.pick(i, 60, pg_temp.n('users')), left(md5('prefix' || i), 8),
       sha256(convert_to('key ' || i || ' ' || pg_temp.n('seed'), 'UTF8')),
       ARRAY['run', pg_temp.one_of(i, 61, 'read', 'write')],
       tstzrange(pg_temp.moment(i, pg_temp.n('users') * 2), pg_temp.moment(i, pg_temp.n('users') * 2) + interval '1 year'),
       CASE WHEN pg_temp.pick(i, 62, 3) > 0
            THEN ('198.51.100.' || pg_temp.pick(i, 63, 255))::inet ELSE '2001:db8::1'::inet + pg_temp.pick(i, 64, 9999) END
FROM generate_series(1, pg_temp.n('users') * 2) AS i ORDER BY i;

INSERT INTO audit_log (at, actor, action, relation, before, after)
SELECT pg_temp.moment(i, pg_temp.n('audit_log')), 'agentweave_app', 'update', 'workflows',
       jsonb_build_object('id', pg_temp.pick(i, 70, pg_temp.n('workflows')), 'name', p.phrase),
       jsonb_build_object('id', pg_temp.pick(i, 70, pg_temp.n('workflows')), 'name', q.phrase, 'by', md5(i::text))
FROM generate_series(1, pg_temp.n('audit_log')) AS i
JOIN phrases p ON p.n = pg_temp.pick(i, 71, 4096) JOIN phrases q ON q.n = pg_temp.pick(i, 72, 4096) ORDER BY i;

INSERT INTO settings (key, value, updated_at)
VALUES ('region', '"eu-central"', pg_temp.moment(0, 1)), ('maintenance', 'false', pg_temp.moment(0, 1)),
       ('limits', '{"executions_per_minute": 600, "usd_per_day": 250.5}', pg_temp.moment(0, 1));

INSERT INTO workflow_exports (workflow_id, document)
SELECT id, lo_from_bytea(0, convert_to(repeat(description || E'\n', 400), 'UTF8'))
FROM workflows WHERE id <= 12 ORDER BY id;
RESET ROLE;
