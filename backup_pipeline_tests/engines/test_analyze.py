"""The planner's statistics after a restore: what cannot be gathered is told, and ends nothing."""

from backup_pipeline.engines.postgres import restore
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline_tests.engines.restoring import execute, fetch


def test_what_cannot_be_analyzed_is_told_and_the_rest_is_analyzed(
    admin: Endpoint, database: Endpoint
) -> None:
    execute(
        database,
        "CREATE TABLE public.a (x int); CREATE TABLE public.b (x int); CREATE TABLE public.c (x int)",
        "CREATE FUNCTION public.inner_f(int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT $1'",
        "CREATE FUNCTION public.f(int) RETURNS int LANGUAGE plpgsql IMMUTABLE"
        " AS 'BEGIN RETURN inner_f($1); END'",
        "CREATE STATISTICS public.s ON (public.f(x)) FROM public.b",
        *(f"INSERT INTO public.{table} SELECT generate_series(1, 500)" for table in "abc"),
    )
    (told,) = restore.analyze(admin, database.database)
    assert told.startswith("ANALYZE of public.b failed: function inner_f(integer) does not exist")
    assert restore.try_analyze(admin, database.database) == (told,)
    counted = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND reltuples = 500"
    assert fetch(database, f"{counted} ORDER BY 1") == [("a",), ("c",)]


def test_a_lost_session_does_not_end_a_restore_at_its_statistics(admin: Endpoint, database: Endpoint) -> None:
    execute(
        database,
        "CREATE TABLE public.a (x int)",
        "CREATE FUNCTION public.f(int) RETURNS int LANGUAGE plpgsql IMMUTABLE"
        " AS 'BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN $1; END'",
        "CREATE STATISTICS public.s ON (public.f(x)) FROM public.a",
        "INSERT INTO public.a VALUES (1), (2)",
    )
    (told,) = restore.analyze(admin, database.database)
    assert told.startswith("ANALYZE failed: terminating connection")
