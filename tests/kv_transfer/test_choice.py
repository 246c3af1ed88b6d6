"""The link that a pair chooses, and the peers that the acceptor refuses because of it."""

from collections.abc import Callable

import pytest

from pdserve.kv_transfer import TransferConfig
from pdserve.kv_transfer.choice import Place, choose_link
from pdserve.kv_transfer.hub import refusal
from pdserve.kv_transfer.link import LinkError
from pdserve.kv_transfer.pair import Identity, Local
from pdserve.kv_transfer.protocol import PROTOCOL_VERSION, Connect

from .device_doubles import DeviceWorker, SharedMemory, device_layout
from .support import ArrayStore, Recorder

CPU, CPU_ELSEWHERE = Place("a", ""), Place("b", "")
GPU, NEIGHBOUR, GPU_ELSEWHERE = Place("a", "GPU-0"), Place("a", "GPU-1"), Place("b", "GPU-2")


@pytest.mark.parametrize(
    ("mine", "theirs", "transport", "link"),
    [
        (CPU, CPU, "auto", "shm"),
        (CPU, CPU_ELSEWHERE, "auto", "gloo"),
        (GPU, GPU, "auto", "cuda_ipc"),
        (GPU, NEIGHBOUR, "auto", "nccl"),
        (GPU, GPU_ELSEWHERE, "auto", "nccl"),
        (GPU, NEIGHBOUR, "shm", "shm"),
        (GPU, GPU_ELSEWHERE, "nccl", "nccl"),
        (GPU, CPU, "auto", "shm"),
        (CPU_ELSEWHERE, GPU, "auto", "gloo"),
        (CPU, CPU, "gloo", "gloo"),
        (GPU, GPU, "shm", "shm"),
        (GPU, GPU, "gloo", "gloo"),
        (GPU, GPU, "cuda_ipc", "cuda_ipc"),
    ],
)
def test_the_link_suits_both_places(mine: Place, theirs: Place, transport: str, link: str) -> None:
    assert choose_link(mine, theirs, transport) == choose_link(theirs, mine, transport) == link


@pytest.mark.parametrize(
    ("mine", "theirs", "transport", "error"),
    [
        (
            CPU,
            CPU_ELSEWHERE,
            "shm",
            "kv.transport: got 'shm', expected auto or gloo: the two workers cannot share memory",
        ),
        (
            GPU,
            GPU_ELSEWHERE,
            "shm",
            "got 'shm', expected auto or gloo or nccl: the two workers cannot share memory",
        ),
        (
            GPU,
            NEIGHBOUR,
            "cuda_ipc",
            "got 'cuda_ipc', expected auto or shm or gloo or nccl: the two workers are not on one",
        ),
        (
            GPU,
            GPU,
            "nccl",
            "got 'nccl', expected auto or shm or gloo or cuda_ipc: the two workers are not on two GPUs",
        ),
        (GPU, CPU, "nccl", "got 'nccl', expected auto or shm or gloo: the two workers are not on two GPUs"),
        (
            CPU,
            CPU,
            "cuda_ipc",
            "got 'cuda_ipc', expected auto or shm or gloo: the two workers are not on one GPU",
        ),
    ],
)
def test_an_impossible_link_is_refused_by_name(
    mine: Place, theirs: Place, transport: str, error: str
) -> None:
    with pytest.raises(LinkError) as caught:
        choose_link(mine, theirs, transport)
    assert error in str(caught.value)


@pytest.fixture
def here() -> Callable[[SharedMemory | None], Local]:
    def make(gpu: SharedMemory | None) -> Local:
        store = ArrayStore(device_layout(), 4)
        identity = Identity("d", 1, Place("here", "" if gpu is None else gpu.uuid))
        return Local(identity, store, Recorder(store), TransferConfig())

    return make


def greeting(link: str, gpu: str) -> Connect:
    return Connect(
        version=PROTOCOL_VERSION,
        source_worker_id="p",
        source_incarnation=1,
        target_worker_id="d",
        target_incarnation=1,
        epoch=1,
        link=link,
        layout=device_layout(),
        gpu=gpu,
    )


def test_the_acceptor_allows_cuda_ipc_only_within_its_own_gpu(
    here: Callable[[SharedMemory | None], Local],
) -> None:
    assert refusal(greeting("cuda_ipc", "GPU-0"), here(SharedMemory("GPU-0"))) is None
    for gpu, mine in (
        ("GPU-1", SharedMemory("GPU-0")),
        ("", SharedMemory("GPU-0")),
        ("", None),
        ("GPU-0", None),
    ):
        assert "link 'cuda_ipc' from GPU" in str(refusal(greeting("cuda_ipc", gpu), here(mine)))
    assert refusal(greeting("shm", "GPU-1"), here(SharedMemory("GPU-0"))) is None
    assert refusal(greeting("nccl", "GPU-1"), here(SharedMemory("GPU-0"))) is None
    for gpu, mine in (("GPU-0", SharedMemory("GPU-0")), ("", SharedMemory("GPU-0")), ("GPU-0", None)):
        assert "link 'nccl' from GPU" in str(refusal(greeting("nccl", gpu), here(mine)))
    assert "link 'pigeon', expected one of shm, gloo, cuda_ipc, nccl" in str(
        refusal(greeting("pigeon", ""), here(None))
    )


def test_the_acceptor_refuses_another_wire_format(here: Callable[[SharedMemory | None], Local]) -> None:
    local = here(None)
    local.store = ArrayStore(device_layout("int8"), 4)
    assert refusal(greeting("shm", ""), local) == "the KV layouts differ in wire: 'int8' here, 'raw' there"


def test_a_cpu_has_no_link_within_a_gpu() -> None:
    with pytest.raises(ValueError, match="got 'cuda_ipc', expected one of auto, shm, gloo on a processor"):
        DeviceWorker("p", device_layout(), on_gpu=False, transport="cuda_ipc")
