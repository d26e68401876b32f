"""Configurations that several of these tests share."""

from pathlib import Path

from backup_pipeline.config import Config
from backup_pipeline.config_file import parse

TWO = """
[store]
url = "s3://backups/production"
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


def configuration(text: str = TWO, path: Path = Path("/etc/backup-pipeline/backups.toml")) -> Config:
    """The configuration that a file of this text holds."""
    return parse(text, path)
