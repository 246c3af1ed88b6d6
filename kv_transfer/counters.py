"""Counts the events on an endpoint since its start, for metrics and tests. Only the endpoint's thread writes
them."""

from dataclasses import dataclass


@dataclass
class TransferCounters:
    num_links_opened: int = 0
    num_links_closed: int = 0
    num_connects_refused: int = 0
    num_sent: int = 0
    num_received: int = 0
    num_send_failures: int = 0
    num_receive_failures: int = 0
    num_nacks: int = 0  # chunks or commits of a wrong size, checksum or order
    num_stale_messages: int = 0  # dropped: of another epoch, or of a transfer that has ended
