from hypothesis import given, strategies as st

from pdserve.core.gpu_shares import GpuShares


def test_instances_share_a_gpu_before_another_one_is_touched() -> None:
    shares = GpuShares(2)
    assert [shares.take(0.5), shares.take(0.5), shares.take(1.0)] == [0, 0, 1]
    assert shares.find(0.1) is None


def test_the_fullest_gpu_with_room_is_taken() -> None:
    shares = GpuShares(3)
    shares.take_back(0, 0.3)
    shares.take_back(2, 0.6)
    assert [shares.find(share) for share in (0.4, 0.5, 0.7, 0.8)] == [2, 0, 0, 1]


def test_thirds_fill_a_gpu() -> None:
    shares = GpuShares(1)
    assert [shares.take(1 / 3) for _ in range(3)] == [0, 0, 0]
    shares = GpuShares(1)
    for _ in range(3):
        shares.give_back(shares.take(1 / 3), 1 / 3)
    assert shares.find(1.0) == 0


def test_a_returned_share_is_free_again() -> None:
    shares = GpuShares(1)
    gpu = shares.take(0.7)
    assert shares.find(0.7) is None
    shares.give_back(gpu, 0.7)
    assert shares.find(1.0) == 0


@given(
    asked=st.lists(st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.7, 1.0]), max_size=30), num_gpus=st.integers(0, 4)
)
def test_no_gpu_is_ever_overfull(asked: list[float], num_gpus: int) -> None:
    shares, taken = GpuShares(num_gpus), [0.0] * num_gpus
    for share in asked:
        gpu = shares.find(share)
        if gpu is None:
            assert all(used + share > 1.0 for used in taken)
        else:
            assert shares.take(share) == gpu
            taken[gpu] += share
            assert taken[gpu] <= 1.0 + 1e-6
