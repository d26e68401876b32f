"""What backups.toml may say, and the errors that name file, key and the nearest valid one."""

from datetime import timedelta
from pathlib import Path

import pytest

from backup_pipeline.config import CONFIG_VARIABLE, Secret, find, load
from backup_pipeline.config_file import parse
from backup_pipeline.errors import ConfigError
from backup_pipeline.storage.directory import folder_of

PATH = Path("/etc/backups.toml")
MINIMAL = """
[store]
url = "file:///srv/backups"
[databases.app]
dsn = "postgresql://backup@db/app"
"""


def changed(**replacements: str) -> str:
    text = MINIMAL
    for old, new in replacements.items():
        text = text.replace(old, new)
    return text


def test_a_minimal_file_has_the_three_tiers() -> None:
    database = parse(MINIMAL, PATH).database("app")
    assert [(tier.name, tier.cron, tier.keep) for tier in database.tiers] == [
        ("daily", "0 2 * * *", 7),
        ("weekly", "0 2 * * 0", 4),
        ("monthly", "0 2 1 * *", 12),
    ]
    assert database.proof == "content"
    assert database.prove.at_once(10**15)
    assert database.manual_keep == timedelta(days=14)


def test_defaults_reach_every_database_and_yield_to_its_own_keys() -> None:
    text = MINIMAL + 'jobs = 3\n[defaults]\njobs = 2\nowner = "platform"\n'
    database = parse(text, PATH).database("app")
    assert (database.jobs, database.owner) == (3, "platform")


def test_prove_takes_three_forms() -> None:
    def policy(value: str) -> tuple[bool, bool, str]:
        prove = parse(MINIMAL + f"prove = {value}\n", PATH).database("app").prove
        return prove.at_once(10), prove.at_once(10**12), prove.cron

    assert policy('"always"') == (True, True, "")
    assert policy('"0 4 * * 6"') == (False, False, "0 4 * * 6")
    assert policy('{ up_to = "200GB", cron = "0 4 * * 6" }') == (True, False, "0 4 * * 6")


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (MINIMAL + "jbs = 2\n", "databases.app.jbs: unknown key", "jobs"),
        (MINIMAL + "[defaults]\nbindir = '/x'\n", "defaults.bindir: unknown key", "bin_dir"),
        (MINIMAL + "[stor]\n", "stor: unknown key", "store"),
        (MINIMAL + 'jobs = "2"\n', "databases.app.jobs: expected a valid integer", ""),
        (MINIMAL + "jobs = 0\n", "databases.app.jobs: expected greater than or equal to 1", ""),
        (MINIMAL + 'proof = "sha"\n', "databases.app.proof: expected 'content' or 'counts'", ""),
        (MINIMAL + 'password = "hunter2"\n', "databases.app.password: expected { env", ""),
        (MINIMAL + 'password = { envv = "X" }\n', "databases.app.password.envv: unknown key", "env"),
        (MINIMAL + 'prove = "sometimes"\n', 'databases.app.prove: expected "always", a cron', ""),
        (
            MINIMAL + '[databases.app.tiers.daily]\ncron = "0 2 * *"\nkeep = 7\n',
            'databases.app.tiers.daily.cron: found "0 2 * *", expected five cron fields',
            "",
        ),
        (
            MINIMAL + '[databases.app.tiers.daily]\ncron = "0 2 * * *"\nkep = 7\n',
            "databases.app.tiers.daily.kep: unknown key",
            "keep",
        ),
        (
            MINIMAL + '[databases.app.tiers.daily]\ncron = "0 2 * * *"\n',
            "databases.app.tiers.daily.keep: missing",
            "must be given",
        ),
        (
            MINIMAL + '[databases.app.tiers.manual]\ncron = "0 2 * * *"\nkeep = 1\n',
            "databases.app.tiers.manual: this name cannot be used",
            "manual",
        ),
        (MINIMAL + 'prove = "0 0 4 * * 6"\n', 'databases.app.prove: expected "always", a cron', ""),
        (
            MINIMAL + '[databases.app.tiers.latest]\ncron = "0 2 * * *"\nkeep = 1\n',
            "databases.app.tiers.latest: this name cannot be used",
            "taken",
        ),
        *(
            (
                MINIMAL + f"[databases.app.tiers.daily]\nkeep = 1\ncron = '{cron}'\n",
                f'databases.app.tiers.daily.cron: found "{cron}", expected {expected}',
                "",
            )
            for cron, expected in (
                ("0 2 LW * *", "ranges and steps"),
                ("0 2 1,L * *", "L alone as the day"),
                ("0 2 * * 5L", "ranges and steps"),
                ("0 2 5/2 * *", "ranges and steps"),
                ("0 2 * * 1-1", "ranges and steps"),
                ("0 2 1 * 1#1", "L alone as the day, or #"),
                ("0 2 */2 * 0", "a day or a weekday, or a list for each"),
                ("0 2 1-31 * 0", "a day or a weekday, or a list for each"),
                ("0 2 1 * */2", "a day or a weekday, or a list for each"),
            )
        ),
        (MINIMAL + "prove = '0 4 */2 * 6'\n", '; found "0 4 */2 * 6", expected a day or a weekday', ""),
        *(
            (MINIMAL + f"owner = '{owner}'\n", f'databases.app.owner: found "{owner}", expected an', "")
            for owner in ("Jane Doe <jane@example.net>", "jane@localhost", "team:", "@x")
        ),
        (
            MINIMAL
            + "[databases.app.tiers.a-b]\ncron = '0 2 * * *'\nkeep = 1\n[databases.shop]\ndsn = 'host=x'\n"
            + "[databases.shop.tiers.a_b]\ncron = '0 3 * * *'\nkeep = 1\n",
            "databases.shop.tiers.a_b: this and a-b of app become one name",
            "same way",
        ),
        (
            MINIMAL + "[databases.app.tiers.b__c]\ncron = '0 2 * * *'\nkeep = 1\n",
            "databases.app.tiers.b__c: this name cannot be used",
            "in a row",
        ),
        (MINIMAL + "[databases.a-_b]\ndsn = 'host=x'\n", "databases.a-_b: this name cannot be used", ""),
        (
            MINIMAL + "[databases.app.tiers.prove]\ncron = '0 2 * * *'\nkeep = 1\n",
            "databases.app.tiers.prove: this name cannot be used",
            "taken",
        ),
        (MINIMAL + "stall_timeout = '0s'\n", 'databases.app.stall_timeout: found "0s", expected', ""),
        (MINIMAL + "stall_timeout = '999ms'\n", 'databases.app.stall_timeout: found "999ms", expected', ""),
        (MINIMAL + "manual_keep = '59m'\n", 'databases.app.manual_keep: found "59m", expected', ""),
        (MINIMAL + "lock_timeout = '0.0001s'\n", 'databases.app.lock_timeout: found "0.0001s", expected', ""),
        (MINIMAL + "manual_keep = '99999999999999w'\n", "databases.app.manual_keep: found", ""),
        (MINIMAL + "manual_keep = '5001d'\n", "databases.app.manual_keep: found", ""),
        ("[store]\nurl = 's3://b/x'\n", 'store.url: found the bucket "b", expected two letters', ""),
        ("[store]\nurl = 's3://bucket/x//y'\n", "store.url: found", ""),
        (MINIMAL + "import_from = 's3://old//dumps'\n", "databases.app.import_from: found", ""),
        (
            "[store]\nurl = 's3://bucket'\naccess_key_id = { env = 'X' }\n",
            "store.secret_access_key: missing",
            "access_key_id",
        ),
        (
            "[store]\nurl = 's3://bucket'\nsecret_access_key = { env = 'X' }\n",
            "store.access_key_id: missing",
            "secret_access_key",
        ),
        (MINIMAL + "[databases.str]\ndsn = 'host=x'\njbs = 2\n", "databases.str.jbs: unknown key", "jobs"),
        (MINIMAL + "[databases.constrained-x]\njobs = 2\n", "databases.constrained-x.dsn: missing", ""),
        ("[store]\nurl = 's3://buckets'\n[databases.app]\n", "databases.app.dsn: missing", ""),
        (changed(file="ftp"), 'store.url: expected "s3://bucket/prefix"', ""),
        (
            MINIMAL + "[databases.'a.b']\ndsn = 'host=x'\n",
            "databases.a.b: this name cannot be used",
            "letters",
        ),
        (
            MINIMAL + "[databases.App]\ndsn = 'host=x'\n",
            "databases: app and App become one name in Dagster (app)",
            "Rename",
        ),
        ("[store\n", "not valid TOML", ""),
        (
            MINIMAL + "[defaults]\nimport_from = 's3://old/dumps'\n",
            "defaults.import_from: expected only below [databases.…]",
            "folder of its own",
        ),
        (
            MINIMAL.replace("url", 'storage_class = "DEEP_ARCHIVE"\nurl'),
            'store.storage_class: found "DEEP_ARCHIVE", expected a class that is read at once',
            "GLACIER_IR",
        ),
        (
            MINIMAL
            + "[databases.app.tiers.monthly]\ncron = '0 2 1 * *'\nkeep = 12\nstorage_class = 'glacier'\n",
            'databases.app.tiers.monthly.storage_class: found "glacier", expected a class that is read at',
            "INTELLIGENT_TIERING",
        ),
    ],
)
def test_an_error_names_the_file_the_key_and_the_nearest(text: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, PATH)
    assert caught.value.message.startswith(f"{PATH}: ")
    assert message in caught.value.message
    assert hint in caught.value.hint


def importing(app: str, shop: str) -> str:
    return MINIMAL + f"import_from = '{app}'\n[databases.shop]\ndsn = 'host=db'\nimport_from = '{shop}'\n"


@pytest.mark.parametrize(
    ("app", "shop"),
    [
        ("s3://old/dumps", "s3://old/dumps"),
        ("s3://old/dumps/", "s3://old/dumps"),
        ("s3://old", "s3://old/shop"),
        ("s3://old/app/shop", "s3://old/app"),
        ("file:///srv/old", "file:///srv/./x/../old/"),
        ("file:///srv/o%6cd", "file:///srv/old"),
        ("file:old", "file:///etc/old/shop"),
    ],
)
def test_two_databases_never_import_from_one_place(app: str, shop: str) -> None:
    with pytest.raises(ConfigError, match="app and shop import from one place") as refused:
        parse(importing(app, shop), PATH)
    assert refused.value.message.startswith(f"{PATH}: databases.shop.import_from: ")
    assert "folder of its own" in refused.value.hint


@pytest.mark.parametrize(
    ("app", "shop"), [("s3://old/app", "s3://old/apple"), ("file:///old", "s3://old"), ("", "s3://old")]
)
def test_databases_import_from_places_of_their_own(app: str, shop: str) -> None:
    databases = parse(importing(app, shop), PATH).databases
    assert [databases[name].import_from for name in ("app", "shop")] == [app, shop]


def test_two_names_of_one_folder_are_one_place(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "link").symlink_to("old")
    with pytest.raises(ConfigError, match="import from one place"):
        parse(importing("file:old", "file:link"), tmp_path / "backups.toml")


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://u:hunter2@db/app",
        "host=db password=hunter2",
        "host=db scram_client_key=hunter2",
        "postgresql://db/app?oauth_client_secret=hunter2",
        "postgresql://db/app?user=u&passwor%64=hunter2",
        "PASSWORD=hunter2 host=db",
        "postgresql://db/app?SSLPASSWORD=hunter2",
        "hunter2",
    ],
)
def test_a_secret_in_a_dsn_is_refused_and_not_shown(dsn: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(changed(**{"postgresql://backup@db/app": dsn}), PATH)
    assert "databases.app.dsn" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_secrets_are_read_late_and_never_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = parse(
        MINIMAL + 'password = { env = "APP_PASSWORD" }\nrestore_password = { file = "secret" }\n',
        tmp_path / "backups.toml",
    )
    database = config.database("app")
    assert database.password is not None
    assert database.restore_password is not None
    with pytest.raises(ConfigError, match=r"databases\.app\.password: .* APP_PASSWORD is not set") as unset:
        database.password.reveal()
    assert unset.value.message.startswith(f"{tmp_path}/backups.toml: ")
    with pytest.raises(ConfigError, match=r"databases\.app\.restore_password: .*/secret: ") as unread:
        database.restore_password.reveal()
    assert unread.value.message.startswith(f"{tmp_path}/backups.toml: ")
    (tmp_path / "secret").write_text("hunter2\n")
    monkeypatch.setenv("APP_PASSWORD", "hunter2")
    assert database.password.reveal() == database.restore_password.reveal() == "hunter2"
    assert "hunter2" not in repr(config)
    assert "hunter2" not in repr(Secret("hunter2"))


def test_paths_are_meant_from_the_file(tmp_path: Path) -> None:
    config = parse(changed(**{"file:///srv/backups": "file:store"}), tmp_path / "backups.toml")
    assert config.store.url == f"file://{tmp_path}/store"


@pytest.mark.parametrize("folder", ["pc%20x", "sp ace", "h#sh"])
def test_a_path_in_the_file_is_quoted_and_the_file_s_own_folder_is_not(tmp_path: Path, folder: str) -> None:
    path = tmp_path / folder / "backups.toml"
    config = parse(changed(**{"file:///srv/backups": "file:sto%20re"}), path)
    assert folder_of(config.store.url) == tmp_path / folder / "sto re"


def test_the_file_is_found_by_option_then_variable_then_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match=r"no configuration at .*backups\.toml"):
        find()
    for name in ("backups.toml", "by-variable.toml", "by-option.toml"):
        (tmp_path / name).write_text(MINIMAL)
    assert find().name == "backups.toml"
    monkeypatch.setenv(CONFIG_VARIABLE, "by-variable.toml")
    assert find().name == "by-variable.toml"
    assert load("by-option.toml").path == tmp_path / "by-option.toml"


def test_a_file_in_a_folder_that_may_not_be_entered_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def denied(path: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", denied)
    with pytest.raises(ConfigError, match=r"backups\.toml: cannot be read: Permission denied"):
        find(str(tmp_path / "backups.toml"))


def test_an_unknown_database_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(MINIMAL, PATH).database("ap")
    assert caught.value.hint == "Did you mean app?"


def test_an_endpoint_may_be_named_by_a_variable_that_is_read_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("S3_ENDPOINT", raising=False)
    text = '[store]\nurl = "s3://backups/team"\nendpoint = { env = "S3_ENDPOINT" }\n'
    store = parse(text, PATH).store
    with pytest.raises(ConfigError, match=r"store\.endpoint: the environment variable S3_ENDPOINT"):
        store.located()
    monkeypatch.setenv("S3_ENDPOINT", "127.0.0.1:9000")
    with pytest.raises(ConfigError, match=r"store\.endpoint: found '127\.0\.0\.1:9000'"):
        store.located()
    monkeypatch.setenv("S3_ENDPOINT", "http://127.0.0.1:9000")
    assert store.located().endpoint == "http://127.0.0.1:9000"


CLUSTER = """
[clusters.main]
dsn = "postgresql://replicator@db/postgres"
"""


def test_a_cluster_of_two_lines_has_a_window_of_a_day() -> None:
    cluster = parse(MINIMAL + CLUSTER, PATH).cluster("main")
    assert cluster.recovery_window == timedelta(hours=24)
    assert (cluster.base_backup_cron, cluster.checkpoint, cluster.max_rate_bytes_s) == (
        "0 2 * * *",
        "spread",
        None,
    )
    assert not cluster.incremental_cron
    assert cluster.agent_socket == "/run/backup_pipeline/main.sock"


def test_a_cluster_s_keys_are_read_and_places_are_meant_from_the_file() -> None:
    text = MINIMAL + CLUSTER + 'data_directory = "main"\nsocket = "agent.sock"\nrecovery_window = "7d"\n'
    text += 'base_backup = { cron = "0 3 * * *", incremental = "0 3 * * 1-6", checkpoint = "fast", '
    text += 'max_rate = "50MB" }\n'
    cluster = parse(text, PATH).cluster("main")
    assert (cluster.data_directory, cluster.agent_socket) == ("/etc/main", "/etc/agent.sock")
    assert cluster.recovery_window == timedelta(days=7)
    assert (cluster.base_backup_cron, cluster.checkpoint) == ("0 3 * * *", "fast")
    assert cluster.incremental_cron == "0 3 * * 1-6"
    assert cluster.max_rate_bytes_s == 50_000_000


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (CLUSTER.replace("main", "APP"), "clusters: app and APP become one name in Dagster", "Rename"),
        (CLUSTER + "windw = '1d'\n", "clusters.main.windw: unknown key", "recovery_window"),
        (CLUSTER + "base_backup = { cronn = '' }\n", "clusters.main.base_backup.cronn: unknown key", "cron"),
        ("[clusters.main]\n", "clusters.main.dsn: missing", "must be given"),
    ],
)
def test_a_cluster_s_errors_name_its_key(text: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(MINIMAL + text, PATH)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_a_cluster_that_is_not_there_is_told_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no cluster mian is configured") as caught:
        parse(MINIMAL + CLUSTER, PATH).cluster("mian")
    assert "main" in caught.value.hint
