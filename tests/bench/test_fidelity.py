"""The replay that plans are made of serves as the simulator does, which knows more."""

from bench.reproduction.fidelity import both


def test_replayed_goodput_is_within_a_percent_of_the_simulators() -> None:
    found = [both(seed) for seed in range(3)]
    simulated = sum(one.num_good_simulated for one in found)
    replayed = sum(one.num_good_replayed for one in found)
    assert 0.8 < simulated / sum(one.num_requests for one in found) < 0.99  # objectives that some miss
    assert abs(replayed / simulated - 1) < 0.01
