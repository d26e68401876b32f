"""`python -m backup_pipeline.demo`: the demo, or with `dev` its servers with Dagster's UI.

Exit codes are those of backup-pipeline; 130 after Ctrl-C.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

from backup_pipeline.demo import dev, filler, place, story
from backup_pipeline.errors import BackupError

_ROWS = "DEMO_ROWS"


def main() -> int:
    """Run what the arguments say; every server is stopped on return."""
    arguments = _parse()
    # A plain `kill` shall stop the servers as Ctrl-C does; and a shell that started us in the background
    # has left Ctrl-C's signal ignored, for our children too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    what = f"python -m backup_pipeline.demo {arguments.what}".rstrip()
    try:
        with place.held(arguments.folder, what) as here:
            if arguments.what == "dev":
                return dev.serve(here, port=arguments.port, rows=arguments.rows)
            story.tell(here, rows=arguments.rows)
    except KeyboardInterrupt:
        print("\nstopped; all servers have ended", file=sys.stderr)
        return 130
    except BackupError as error:
        print(f"\nERROR: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m backup_pipeline.demo", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "what",
        nargs="?",
        default="",
        choices=["", "dev"],
        metavar="dev",
        help="Dagster's UI over the same data",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=place.default_folder(),
        help="where all of it is kept (.demo in the checkout)",
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=os.environ.get(_ROWS, str(filler.ROWS)),  # argparse reads a text by `type`
        help=f"about how many rows to make, some 500 bytes each (${_ROWS}, else {filler.ROWS:,})",
    )
    parser.add_argument("--port", type=int, help=f"dev: the UI's port ({dev.PORT} when it is free)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
