"""A cluster of this machine is for this machine: nothing of it listens where others could connect."""

from __future__ import annotations

import ipaddress

import psutil
import pytest

pytestmark = pytest.mark.ray


def listening() -> dict[int, list[str]]:
    """Addresses that this process and its descendants listen on, by port."""
    found: dict[int, list[str]] = {}
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        try:
            for one in process.net_connections("inet"):
                if one.status == psutil.CONN_LISTEN:
                    found.setdefault(one.laddr.port, []).append(one.laddr.ip)
        except psutil.Error:
            continue  # it has just ended
    return found


def test_the_local_cluster_listens_on_the_loopback_alone() -> None:
    pytest.importorskip("ray")
    from optin_export.distributed.ray_session import Options, Session

    before = set(listening())
    with Session(Options("local", workers=1)) as session:
        task = session.submit(abs, -1)
        assert [value for _, value, _ in session.finished({task: "one"}, lambda: None)] == [1]
        opened = {port: places for port, places in listening().items() if port not in before}
    assert len(opened) >= 3  # at least those of Ray's store, of its scheduler and of this process
    for places in opened.values():
        for place in places:
            address = ipaddress.ip_address(place)
            mapped = getattr(address, "ipv4_mapped", None)
            assert (mapped or address).is_loopback, opened
