"""A test that leaves a setting of the process, or a cluster in it, changed is told so."""

from __future__ import annotations

from distributed import LocalCluster
from process_state import differences, process_state


def test_a_worker_that_has_begun_or_ended_is_named() -> None:
    alone = process_state()
    with LocalCluster(n_workers=1, processes=False, dashboard_address=None) as cluster:
        (worker,) = cluster.workers.values()
        beside = process_state()
        assert worker.address in "".join(differences(alone, beside))
        beside = process_state()
        cluster.sync(worker.close)
        assert worker.address in "".join(differences(beside, process_state()))
