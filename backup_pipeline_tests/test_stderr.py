"""What is left out of a tool's errors, and what stays in."""

import pytest

from backup_pipeline.stderr import from_a_message_on, without_values

TOC = "pg_restore: while PROCESSING TOC:\npg_restore: from TOC entry 7; 6100 17 SUBSCRIPTION sub postgres\n"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            f"{TOC}pg_restore: error: could not execute query: ERROR:  must be superuser\n"
            "Command was: CREATE SUBSCRIPTION sub CONNECTION 'password=SECRET\nHINT:  SECRET';\n"
            "\n\npg_restore: warning: errors ignored on restore: 1\n",
            f"{TOC}pg_restore: error: could not execute query: ERROR:  must be superuser\n"
            "pg_restore: warning: errors ignored on restore: 1\n",
        ),
        (
            'pg_restore: error: could not execute query: ERROR:  syntax error at or near "x"\n'
            "LINE 2:  password 'SECRET' x\n                       ^\nHINT:  Try again.\nCommand was: SECRET",
            'pg_restore: error: could not execute query: ERROR:  syntax error at or near "x"\n'
            "HINT:  Try again.\n",
        ),
        (
            'pg_restore: error: COPY failed for table "m": ERROR:  invalid input syntax for type money:'
            ' "$SECRET\nSECRET"\nCONTEXT:  COPY m, line 1, column price: "$SECRET\nSECRET"\n',
            'pg_restore: error: COPY failed for table "m": ERROR:  invalid input syntax for type money: "…"\n'
            "CONTEXT:  COPY m, line 1, column price\n",
        ),
        (
            'pg_restore: error: COPY failed for table "m": ERROR:  new row for relation "m" violates check'
            ' constraint "c"\nDETAIL:  Failing row contains (1, SECRET\n, SECRET).\n'
            'CONTEXT:  COPY m, line 3: "SECRET"',
            'pg_restore: error: COPY failed for table "m": ERROR:  new row for relation "m" violates check'
            ' constraint "c"\nDETAIL:  Failing row contains (…)\nCONTEXT:  COPY m, line 3\n',
        ),
        (
            "pg_restore: error: could not execute query: ERROR:  could not create unique index\n"
            "DETAIL:  Key (mail)=(SECRET)) is duplicated.\n",
            "pg_restore: error: could not execute query: ERROR:  could not create unique index\n"
            "DETAIL:  Key (mail)=(…) is duplicated.\n",
        ),
        (
            'pg_restore: error: COPY failed for table "m": ERROR:  value "777SECRET" is out of range for type'
            ' integer\nCONTEXT:  PL/pgSQL function f(integer) line 3 at RAISE\nSQL statement "SECRET"\n'
            'COPY m, line 9, column "a": "SECRET"\n',
            'pg_restore: error: COPY failed for table "m": ERROR:  value "…" is out of range for type'
            " integer\n"
            "CONTEXT:  PL/pgSQL function f(integer) line 3 at RAISE; COPY m, line 9\n",
        ),
        (
            "pg_dump: error: Dumping the contents of table failed: PQgetResult() failed.\n"
            "pg_dump: detail: Error message from server: ERROR:  gone\n"
            "pg_dump: detail: Command was: COPY public.t (SECRET) TO stdout;\n",
            "pg_dump: error: Dumping the contents of table failed: PQgetResult() failed.\n"
            "pg_dump: detail: Error message from server: ERROR:  gone\n",
        ),
        (
            "2026-11-22 10:00:00.000 UTC [7] ERROR:  gone\n"
            "2026-11-22 10:00:00.000 UTC [7] STATEMENT:  CREATE USER MAPPING\n\tSECRET\nlast\n",
            "2026-11-22 10:00:00.000 UTC [7] ERROR:  gone\nlast\n",
        ),
        ('initdb: error: invalid locale name "xx"\n', 'initdb: error: invalid locale name "xx"\n'),
        (
            'pg_restore: error: connection to server on socket "/x" failed: No such file\n\tIs it running?\n',
            'pg_restore: error: connection to server on socket "/x" failed: No such file\n\tIs it running?\n',
        ),
    ],
)
def test_statements_and_values_are_left_out(said: str, told: str) -> None:
    assert without_values(said) == told
    assert without_values(told) == told
    assert "SECRET" not in told


def test_half_a_statement_is_left_out() -> None:
    assert from_a_message_on("SECRET')\npg_restore: error: more\n") == "pg_restore: error: more\n"
    assert from_a_message_on("nothing but SECRET") == ""
