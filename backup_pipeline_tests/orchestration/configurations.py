"""Configurations that several of these tests share."""

from pathlib import Path

from backup_pipeline.config import Config
from backup_pipeline.config_file import parse

TWO = """
[store]
url = "s3://backups/production"
access_key_id = { env = "BACKUP_S3_KEY" }
secret_access_key = { env = "BACKUP_S3_SECRET" }

[databases.agentweave]
dsn = "postgresql://backup@db.example.net/agentweave"
password = { env = "BACKUP_DB_PASSWORD" }
restore_dsn = "postgresql://restore@db.example.net/postgres"
owner = "platform"

[databases.shop-eu]
dsn = "postgresql://backup@db.example.net/shop"
owner = "shop@example.net"
prove = { up_to = "2GB", cron = "0 4 * * 6" }

[databases.shop-eu.tiers.daily]
cron = "0 2 * * *"
keep = 14

[databases.shop-eu.tiers.yearly]
cron = "0 5 1 1 *"
keep = 3

[databases.archive]
dsn = "postgresql://backup@db.example.net/archive"
prove = "0 4 * * 6"
"""


HEAD = '[store]\nurl = "file:///srv/backups"\n'


def database(name: str, keys: str = "", **tiers: str) -> str:
    """A database's tables: its own `keys`, and the cron of each tier."""
    tables = [f'[databases.{name}.tiers.{tier}]\ncron = "{cron}"\nkeep = 2\n' for tier, cron in tiers.items()]
    return "".join([f'[databases.{name}]\ndsn = "host=h dbname=x"\n{keys}\n', *tables])


ACCEPTED = {
    "two": TWO,
    **{
        f"cron {cron}": HEAD + database("one", daily="0 2 * * *") + database("two", daily=cron)
        for cron in ("00 2 * * *", "0 02 * * *", "0  2 * * *", "0 2 * * mon", "0 2 L * *", "0 2 * * 1#2")
    },
    "proofs": HEAD + database("one", 'prove = "0 4 * * 6"') + database("two", 'prove = "00  4 * * 6"'),
    **{
        f"owner {owner}": HEAD + database("one", f'owner = "{owner}"')
        for owner in ("Jane Doe", "team:Jane Doe", "jane.doe+pg@example.net", "team:a@b")
    },
    "names": HEAD + database("a", b_c="0 2 * * *", c="0 2 * * *") + database("a_b", c="0 3 * * *"),
}
"""Configurations that are right, and that Dagster has to load."""


def configuration(text: str = TWO, path: Path = Path("/etc/backup-pipeline/backups.toml")) -> Config:
    """The configuration that a file of this text holds."""
    return parse(text, path)
