"""The options of the command line about clusters."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from optin_export.errors import InputError

if TYPE_CHECKING:
    from optin_export.distributed.ray_session import Options


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("on several processes or machines, by Ray (pip install 'optin-export[ray]')")
    group.add_argument(
        "--cluster",
        metavar="WHERE",
        help="local: processes of this machine; auto: the cluster it belongs to; ray://HOST:PORT or HOST:PORT",
    )
    group.add_argument("--workers", type=int, metavar="N", help="default: as many as the cluster has CPUs")
    group.add_argument(
        "--cluster-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="for joining the cluster (at most 60), for a worker to start, and for one shard (default 600)",
    )
    group.add_argument(
        "--shared-files", action="store_true", help="all nodes see this machine's files at the same paths"
    )


def cluster_options(options: argparse.Namespace) -> Options | None:
    """What they say, or None without --cluster. Raises InputError for values that are none."""
    if options.cluster is None:
        if options.workers is not None or options.shared_files:
            raise InputError("--workers and --shared-files have no cluster", "they are for --cluster", "add --cluster")
        return None
    from optin_export.distributed.ray_session import Options

    where = options.cluster
    if where not in ("local", "auto") and not where.rpartition(":")[2].isdigit():
        raise InputError(f"--cluster {where} names no cluster", "it has no port", "local, auto or ray://HOST:PORT")
    if (options.workers is not None and options.workers < 1) or not options.cluster_timeout > 0:
        raise InputError("--workers and --cluster-timeout are counts", "they have to be above 0", "leave them out")
    return Options(where, options.workers, options.cluster_timeout, options.shared_files)
