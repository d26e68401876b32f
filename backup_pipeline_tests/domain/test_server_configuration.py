"""Configuration that others may have written: read as PostgreSQL reads it, and nothing planted comes back."""

import contextlib
from collections.abc import Collection

import pytest

from backup_pipeline.domain.server_configuration import (
    HEADER,
    Decision,
    Rule,
    decide,
    decide_rules,
    parse_settings,
    render,
    render_rules,
)
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.server import connect


def decided(text: str, *, allowed: Collection[str] = (), here: Collection[str] = ()) -> dict[str, Decision]:
    settings, odd = parse_settings(text, "postgresql.conf")
    assert odd == ()
    found = decide(settings, allowed=allowed, exists=lambda path: path in here)
    return {each.setting.name: each for each in found}


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("work_mem = 8MB", "work_mem", "8MB"),
        ("work_mem 8MB # half of it", "work_mem", "8MB"),
        ("  Work_Mem='8MB'  ", "work_mem", "8MB"),
        ("log_line_prefix = '%m [%p] #it''s '", "log_line_prefix", "%m [%p] #it's "),
        (r"search_path = 'a\'b\\c\n\101'", "search_path", "a'b\\c\nA"),
        ("auto_explain.log_min_duration = '3s'", "auto_explain.log_min_duration", "3s"),
        ("max_connections=100\r", "max_connections", "100"),
    ],
)
def test_a_line_is_read_as_postgresql_reads_it(line: str, name: str, value: str) -> None:
    ((setting,), odd) = parse_settings(f"# before\n\n{line}\n", "x.conf")
    assert (setting.name, setting.value, setting.where, odd) == (name, value, "x.conf:3", ())


def test_what_cannot_be_read_is_named() -> None:
    assert parse_settings("work_mem = 'open\nport = 5432\n= 3\n", "x.conf")[1] == ("x.conf:1", "x.conf:3")


def test_of_several_the_last_is_in_force() -> None:
    assert decided("port = 1\nPort = 2\n")["port"].setting.value == "2"


@pytest.mark.parametrize(
    "line",
    [
        "shared_preload_libraries = 'evil'",
        "session_preload_libraries = evil",
        "local_preload_libraries = 'evil'",
        "dynamic_library_path = '/tmp:$libdir'",
        "extension_control_path = '/tmp'",
        "jit_provider = 'evil'",
        "ssl_passphrase_command = 'sh -c evil'",
        "oauth_validator_libraries = 'evil'",
        "plperl.on_init = 'system(q(evil))'",
    ],
)
def test_what_runs_code_comes_back_only_by_name(line: str) -> None:
    ((name, left),) = decided(line).items()
    assert (left.kept, left.allowable) == (False, True)
    assert decided(line, allowed=[name])[name].kept
    assert not decided(line, allowed=["another"])[name].kept


@pytest.mark.parametrize(
    "line",
    [
        "archive_command = 'evil'",
        "archive_library = 'evil'",
        "restore_command = 'evil'",
        "archive_cleanup_command = 'evil'",
        "recovery_end_command = 'evil'",
        "recovery_target_time = '2026-01-01'",
        "primary_conninfo = 'host=old'",
        "synchronous_standby_names = '*'",
        "data_directory = '/elsewhere'",
        "hba_file = '/elsewhere'",
    ],
)
def test_what_belongs_to_the_old_server_never_comes_back(line: str) -> None:
    name = line.partition(" ")[0]
    left = decided(line, allowed=[name])[name]
    assert (left.kept, left.allowable) == (False, False)


def test_each_setting_that_runs_something_is_known_by_its_name(postgres: LocalCluster) -> None:
    """Those of the server itself, by what they are called: a new version may bring another one."""
    with contextlib.closing(connect(postgres.endpoint())) as session:
        rows = session.execute(
            "SELECT name FROM pg_settings WHERE context <> 'internal' AND (name ~ '(librar|command|provider)'"
            " OR short_desc ~* '(shell command|librar)')"
        ).fetchall()
    names = {str(name) for (name,) in rows}
    harmless = {name for name in names if decided(f"{name} = 'x'")[name].kept}
    assert {"archive_command", "shared_preload_libraries", "ssl_passphrase_command"} <= names
    assert harmless <= {"log_replication_commands", "ssl_passphrase_command_supports_reload"}


def test_files_that_are_not_here_take_tls_with_them_and_say_so() -> None:
    files = "ssl_cert_file = '/etc/tls/a.crt'\nssl_key_file = '/etc/tls/a.key'\nlog_directory = '/var/l'"
    text = f"ssl = on\n{files}"
    without = decided(text, here=["/etc/tls/a.crt"])
    assert {name for name, each in without.items() if each.kept} == {"ssl_cert_file"}
    assert "TLS WOULD BE OFF" in without["ssl"].reason
    everything = decided(text, here=["/etc/tls/a.crt", "/etc/tls/a.key", "/var/l"])
    assert all(each.kept for each in everything.values())
    assert decided("ssl = off")["ssl"].kept
    assert not decided("unix_socket_directories = '/run/a, \"/tmp\"'", here=["/tmp"])[
        "unix_socket_directories"
    ].kept


def test_what_is_written_is_read_again_as_it_was() -> None:
    value = "it's a \\ #\nnew line\r"
    first = decided("search_path = 'it''s a \\\\ #\\nnew line\\r'\nrestore_command = 'a\\nport = 7'")
    assert first["search_path"].setting.value == value
    text = render(first.values(), ["a note"])
    assert text.startswith(HEADER)
    ((setting,), odd) = parse_settings(text, "x")
    assert (setting.name, setting.value, odd) == ("search_path", value, ())


@pytest.mark.parametrize(
    "line",
    [
        "primary_conninfo = 'host=old password=hunter'",
        "restore_command = 'fetch --key hunter'",
        "ssl_passphrase_command = 'echo hunter'",
    ],
)
def test_what_is_left_out_is_shown_and_written_without_its_value(line: str) -> None:
    ((name, left),) = decided(line).items()
    assert left.shown == f"{name} (postgresql.conf:1)"
    assert render([left]) == f"{HEADER}\n# left out: {name} (postgresql.conf:1)\n"


def test_a_command_that_was_allowed_is_written_whole_and_shown_by_name() -> None:
    line = "ssl_passphrase_command = 'echo hunter'"
    kept = decided(line, allowed=["ssl_passphrase_command"])["ssl_passphrase_command"]
    assert (kept.shown, kept.line) == ("ssl_passphrase_command (postgresql.conf:1)", line)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ("ldapbindpasswd=hunter ldapport=1", "ldapbindpasswd=*** ldapport=1"),
        ('ldapbindpasswd="hunter 2" ldapport=1', "ldapbindpasswd=*** ldapport=1"),
        ('"ldapbindpasswd=hunter 2" ldapport=1', "ldapbindpasswd=*** ldapport=1"),
        ('radiussecrets="""hunter 1"",""hunter 2""" radiusports=1', "radiussecrets=*** radiusports=1"),
        ("radiussecrets=hunter,hunter", "radiussecrets=***"),
        ('ldapbindpasswd="hunter', "ldapbindpasswd=***"),
    ],
)
def test_a_rule_is_shown_without_its_passwords(options: str, shown: str) -> None:
    rule = Rule(f"host all all all ldap {options}", kept=True)
    assert rule.shown == f"host all all all ldap {shown}"
    assert rule.text in render_rules([rule])
    assert "hunter" not in render_rules([Rule(rule.text, kept=False)])


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("local all all trust", True),
        ("host all all 10.0.0.0/8 scram-sha-256", True),
        ("host trust all 10.0.0.0/8 scram-sha-256  # trust", True),
        ("host all all 0.0.0.0/0 trust", False),
        ("hostssl all all 0.0.0.0 0.0.0.0 Trust", False),
        ('"host" "a # b" "all" all "trust"', False),
        ("host all, postgres all all trust", False),
        ("host all all 0.0.0.0/0 ldap ldapserver=evil", False),
        ('"host" all all 0.0.0.0/0 "LDAP" ldapserver=evil', False),
        ("hostssl all all 0.0.0.0 0.0.0.0 radius radiusservers=evil radiussecrets=known", False),
        ("hostnossl all all all pam pamservice=evil", False),
        ("hostgssenc all all all ident map=evil", False),
        ("host all all all oauth issuer=https://evil.example scope=openid", False),
        ("local all all ldap ldapserver=evil", False),
        ("local all, postgres all radius", False),
        ("local all all ident", True),
        ("local ldap pam peer", True),
        ("host ldap pam ident scram-sha-256", True),
        ("hosts /^(.*)$ ldap", True),  # of pg_ident.conf
        ("host all @admins all scram-sha-256", False),
        ("include other.conf", False),
        ("include_if_exists /etc/evil", False),
    ],
)
def test_rules_that_let_anybody_in_or_lead_elsewhere_stay_out(line: str, kept: bool) -> None:
    (rule,) = decide_rules(f"# comment\n\n{line}\n", allowed=[])
    assert rule.kept is kept
    lines = render_rules([rule]).splitlines()
    assert lines == [HEADER, line if kept else f"# left out: {rule.shown}"]


@pytest.mark.parametrize("method", ["trust", "ident", "ldap", "radius", "pam", "oauth"])
def test_a_method_that_is_held_back_can_be_allowed(method: str) -> None:
    line = f"host all all all {method}"
    (rule,) = decide_rules(line, allowed=[method])
    assert rule.kept
    (rule,) = decide_rules(line, allowed=["another"])
    assert f"(--allow {method} brings it back)" in rule.reason


def test_a_rule_that_goes_on_in_the_next_line_is_one() -> None:
    (rule,) = decide_rules("host all all \\\n0.0.0.0/0 \\\ntrust\n", allowed=[])
    assert not rule.kept
