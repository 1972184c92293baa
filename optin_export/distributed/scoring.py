"""Execute the scoring's shards on workers: each holds the model once; finished shards are kept in the run folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from optin_export.distributed.costs import Book
from optin_export.distributed.finished_shards import Memory
from optin_export.distributed.ray_session import Pool, Session
from optin_export.scoring import Map, Partial, Shard, Spread
from optin_export.scoring.shards import Work


def spread_over(session: Session, run: Path, key: str, book: Book, force: bool = False, gpus: int = 0) -> Spread:
    """A `Spread` for `scoring.score`: the session's workers execute shards, except for finished ones.

    run: the run folder. key: hash of all that the scoring depends on. gpus: number that a worker needs for the model.
    """
    memory = Memory(run / "cluster" / "shards", key)
    if force:
        memory.clear()

    @contextlib.contextmanager
    def spread(work: Work) -> Iterator[Map]:
        with contextlib.ExitStack() as open_:
            pools: list[Pool] = []

            def workers() -> Pool:
                # Only if there is work to do: a resumed run may already have every shard.
                if not pools:
                    pools.append(open_.enter_context(session.pool(work, gpus=gpus)))
                    pools[0].lost = lambda line: book.log("driver", line)
                    book.stage("scoring").bytes_out += pools[0].bytes_out
                return pools[0]

            def run_shards(shards: Sequence[Shard]) -> Iterable[Partial]:
                known = {shard: memory.get(shard) for shard in shards}
                missing = [shard for shard in shards if known[shard] is None]
                book.stage("scoring").reused += len(shards) - len(missing)
                fresh = workers().map(missing) if missing else iter(())
                for shard in shards:
                    found = known[shard]
                    if found is None:
                        found, facts = next(fresh)
                        memory.put(shard, found)
                        book.done("scoring", _described(shard), facts)
                        book.stage("scoring").bytes_back += facts["bytes"]
                    yield found

            yield run_shards
            for pool in pools:
                book.stage("scoring").retried += pool.retried
        book.save()
        memory.clear()

    return spread


def _described(shard: Shard) -> str:
    what = {
        "exact": f" of {shard.group}, {len(shard.units)} units",
        "sizes": "",
    }.get(shard.kind, f" {shard.start} to {shard.start + shard.count - 1}")
    return f"batch {shard.batch}: {shard.kind}{what}"
