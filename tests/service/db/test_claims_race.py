"""Many runners claim at once: no job is claimed twice, none is left behind."""

import threading
from collections import Counter

from service.db.engine import Database
from service.db.repositories import jobs, leases
from service.db.repositories.leases import Owner
from service.states import JobKind

JOBS, RUNNERS = 24, 6


def test_every_job_is_claimed_exactly_once(database: Database, database_url: str) -> None:
    with database.write() as session:
        made = {
            jobs.create(session, kind=JobKind.SEARCH, request={}, request_digest="d").id for _ in range(JOBS)
        }
    claims: Counter[str] = Counter()
    lock = threading.Lock()

    def claim_all(name: str) -> None:
        own = Database(database_url)
        idle = 0
        while idle < 3:
            with own.write() as session:
                job = leases.claim(session, Owner(name, "host", 1, "p"), 3600)
            idle = idle + 1 if job is None else 0
            if job is not None:
                with lock:
                    claims[job.id] += 1
        own.close()

    threads = [threading.Thread(target=claim_all, args=(f"r{index}",)) for index in range(RUNNERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(claims) == made
    assert set(claims.values()) == {1}
