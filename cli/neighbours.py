"""This user's other clusters on this machine, whose instances compute on the same cores."""

from collections.abc import Iterator

import grpc

from ..core import admin_socket
from ..engine.gpu import probe_node
from ..planner.plan import Plan
from ..proto import pdserve_pb2 as pb, pdserve_pb2_grpc

TIMEOUT_S = 2.0


def neighbours(planned: Plan) -> Iterator[str]:
    """Yields a line for each cluster that would share cores with the planned one, as there are too few for
    both."""
    num_cores = len(probe_node().cores)
    num_left = num_cores - sum(pool.instances * pool.num_cpus for pool in planned.pools)
    for socket in admin_socket.find_all():
        status = _status(str(socket))
        num_taken = 0.0 if status is None else sum(host.num_cores_taken for host in status.hosts)
        if status is not None and num_taken > num_left:
            yield (
                f"the cluster that serves {status.model} takes {num_taken:g} of this machine's {num_cores}"
                " cores; the two clusters share them and slow each other down"
            )


def _status(socket: str) -> pb.ClusterStatus | None:
    """Returns the state of the cluster behind a socket; None where none answers."""
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        try:
            stub: pdserve_pb2_grpc.ClusterStub = pdserve_pb2_grpc.ClusterStub(channel)
            return stub.GetStatus(pb.GetStatusRequest(), timeout=TIMEOUT_S)
        except grpc.RpcError:
            return None
