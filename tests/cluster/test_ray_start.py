"""Ray's processes that a cluster of one host has no use for are not started."""

from ray._private.node import Node

from pdserve.cluster.ray_start import UNUSED, without_unused_processes


def test_within_the_block_rays_methods_start_nothing_and_afterwards_they_are_back() -> None:
    methods = [getattr(Node, name) for name in UNUSED]
    with without_unused_processes():
        for name in UNUSED:
            assert getattr(Node, name)(None, include_dashboard=False) is None
    assert [getattr(Node, name) for name in UNUSED] == methods
