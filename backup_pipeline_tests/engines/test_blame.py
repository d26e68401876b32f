"""What a failed load says of the backup: pg_restore's and PostgreSQL's own words, one by one."""

import pytest

from backup_pipeline.engines.postgres.blame import Blame, blame
from backup_pipeline.errors import ToolError

QUERY = "could not execute query: "
COPY = 'COPY failed for table "t": '

CASES = {
    Blame.BACKUP: (
        f'{QUERY}ERROR:  relation "public.t" already exists',
        f'{QUERY}ERROR:  role "gone" does not exist',
        f'{QUERY}ERROR:  collation "public.german" for encoding "UTF8" does not exist',
        f"{QUERY}ERROR:  permission denied for schema private",
        f'{COPY}ERROR:  invalid input syntax for type integer: "No space left on device"',
        f'{COPY}ERROR:  duplicate key value violates unique constraint "t_pkey"',
        "did not find magic string in file header",
        "could not read from input file: end of file",
        "could not uncompress data: incorrect data check",
        "something that no version said before",
    ),
    Blame.SERVER: (
        f'{QUERY}ERROR:  could not create locale "de_DE.utf8": No such file or directory',
        f'{QUERY}ERROR:  collation "pg_catalog.de_DE" for encoding "UTF8" does not exist',
        f'{QUERY}ERROR:  could not access file "$libdir/timescaledb-2.14": No such file or directory',
        f'{QUERY}ERROR:  could not load library "/usr/lib/x.so": libgeos.so: cannot open shared object file',
        f'{QUERY}ERROR:  could not open dictionary file "/x.dict": No such file or directory',
        f'{QUERY}ERROR:  extension "vector" is not available',
        f'{QUERY}ERROR:  extension "pg_trgm" has no installation script nor update path for version "9"',
        f'{QUERY}FATAL:  extension "timescaledb" must be preloaded',
        f"{QUERY}ERROR:  pg_cron can only be loaded via shared_preload_libraries",
        f"{QUERY}ERROR:  can only create extension in database postgres",
    ),
    Blame.CLIENT: (
        "unsupported version (1.16) in file header",
        "archive is compressed, but this installation does not support compression",
    ),
    Blame.MISHAP: (
        f'{COPY}ERROR:  could not extend file "base/5/16390": No space left on device',
        f'{QUERY}ERROR:  could not write to file "base/pgsql_tmp/x": No space left on device',
        f'{QUERY}ERROR:  could not resize shared memory segment "/x" to 8 bytes: No space left on device',
        f"{QUERY}ERROR:  out of memory",
        f"{QUERY}ERROR:  out of shared memory",
        f"{QUERY}FATAL:  terminating connection due to administrator command",
        f"{QUERY}FATAL:  the database system is in recovery mode",
        f"{QUERY}ERROR:  canceling statement due to statement timeout",
        f"{QUERY}ERROR:  deadlock detected",
        f"{QUERY}server closed the connection unexpectedly",
        f"{QUERY}no connection to the server",
        "error returned by PQputCopyData: server closed the connection unexpectedly",
        'connection to server on socket "/tmp/.s.PGSQL.5432" failed: FATAL:  too many connections for "r"',
        'connection to server at "h", port 5432 failed: Connection refused',
        "a worker process died unexpectedly",
        "out of memory",
        'could not open input file "x": Permission denied',
    ),
}


@pytest.mark.parametrize(("wanted", "said"), [(blame, said) for blame in CASES for said in CASES[blame]])
def test_words(wanted: Blame, said: str) -> None:
    assert blame(ToolError(f"pg_restore failed: {said}")) is wanted
    assert blame(ToolError(f"pg_restore ended with exit code 1: pg_restore: error: {said}")) is wanted


@pytest.mark.parametrize(
    "message",
    [
        "pg_restore was killed by SIGKILL",
        "pg_restore was killed by SIGKILL: pg_restore: error: x",
        "pg_restore did not answer within 900 s and was ended",
        "pg_restore ended with exit code 127",
        "cannot start /usr/bin/pg_restore: Cannot allocate memory",
    ],
)
def test_without_an_error_of_its_own_it_is_a_mishap(message: str) -> None:
    assert blame(ToolError(message)) is Blame.MISHAP


def test_the_log_knows_the_state() -> None:
    error = ToolError(f"pg_restore failed: {QUERY}ERROR:  it went wrong")
    assert blame(error) is Blame.BACKUP
    for state, wanted in (
        ("53100", Blame.MISHAP),
        ("57P01", Blame.MISHAP),
        ("F0000", Blame.SERVER),
        ("23505", Blame.BACKUP),
    ):
        log = f"00000 LOG:  ready\n{state} ERROR:  it went wrong\n53100 ERROR:  another\n"
        assert blame(error, log=log) is wanted


def test_a_crash_in_the_log_is_a_mishap_whatever_was_said() -> None:
    error = ToolError(f"pg_restore failed: {QUERY}ERROR:  it went wrong")
    log = "00000 LOG:  client backend (PID 17) was terminated by signal 9: Killed\n"
    assert blame(error, log=log) is Blame.MISHAP
    assert blame(error, log=log.replace("client backend", "server process")) is Blame.MISHAP
    assert blame(error, log="XX000 PANIC:  could not write\n") is Blame.MISHAP
    assert blame(error, log="\t00000 PANIC:  quoted in a message\n") is Blame.BACKUP


def test_a_failing_extension_is_of_the_place() -> None:
    said = f"pg_restore failed: {QUERY}ERROR:  syntax error"
    assert blame(ToolError(said, detail={"at": 'EXTENSION "odd"'})) is Blame.SERVER
    assert blame(ToolError(said, detail={"at": 'COMMENT "EXTENSION odd"'})) is Blame.BACKUP


def test_what_a_role_may_not_do_and_what_nobody_can_read() -> None:
    refused = ToolError(f"pg_restore failed: {QUERY}ERROR:  must be owner of table t")
    assert blame(refused, superuser=False) is Blame.SERVER
    assert blame(refused, superuser=True) is Blame.BACKUP
    foreign = ToolError(f"pg_restore failed: {QUERY}FEHLER:  Relation »t« existiert bereits")
    assert blame(foreign, english=False) is Blame.MISHAP


REACHING = {
    Blame.FILES: (
        ('could not open file "/srv/rates.csv" for reading: Permission denied', "42501"),
        ('could not open file "/srv/rates.csv": Permission denied', "42501"),
        ('could not open directory "/srv": Permission denied', "42501"),
        ('could not stat file "/srv/rates.csv": Permission denied', "42501"),
    ),
    Blame.NETWORK: (
        ('could not connect to server "far"', "08001"),
        ("could not establish connection", "08001"),
        ("it went wrong", "08001"),
    ),
}


@pytest.mark.parametrize("wanted", REACHING)
def test_what_reaches_out_of_a_confined_server_is_no_fault_of_the_backup(wanted: Blame) -> None:
    elsewhere = Blame.MISHAP if wanted is Blame.NETWORK else Blame.BACKUP
    for message, state in REACHING[wanted]:
        error = ToolError(f"pg_restore failed: {QUERY}ERROR:  {message}")
        log = f"{state} ERROR:  {message}\n"
        assert blame(error, log=log, hidden=True, cut_off=True) is wanted
        assert blame(error, log=log) is elsewhere


def test_a_connection_that_the_scratch_server_itself_lost_is_a_mishap() -> None:
    for said in CASES[Blame.MISHAP]:
        assert blame(ToolError(f"pg_restore failed: {said}"), hidden=True, cut_off=True) is Blame.MISHAP
    denied = ToolError(
        f'pg_restore failed: {COPY}ERROR:  invalid input syntax for type int: "Permission denied"'
    )
    assert blame(denied, hidden=True, cut_off=True) is Blame.BACKUP
