"""`pdserve requests`: the requests that are being served, and those that ended last."""

from collections.abc import Iterator, Sequence

from google.protobuf.json_format import MessageToJson

from ..proto import pdserve_pb2 as pb
from .client import Client
from .explain import milliseconds
from .status import age, aligned
from .terminal import show

COLUMNS = ("REQUEST", "OUTCOME", "TOKENS", "TTFT", "TIME", "AGE")
WIDE_COLUMNS = (*COLUMNS, "PREFILL", "DECODE", "CLIENT")


def show_requests(client: Client, max_requests: int, output: str) -> None:
    """Prints them."""
    found = client.cluster.ListRequests(pb.ListRequestsRequest(max_requests=max_requests))
    if output == "json":
        print(
            MessageToJson(found, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        )
        return
    show("\n".join(request_lines(found.requests, output == "wide")))


def request_lines(requests: Sequence[pb.RequestSummary], wide: bool = False) -> Iterator[str]:
    if not requests:
        yield "no requests"
        return
    rows: list[Sequence[str]] = [WIDE_COLUMNS if wide else COLUMNS]
    yield from aligned([*rows, *(_row(request, wide) for request in requests)], gap=2)


def _row(request: pb.RequestSummary, wide: bool) -> Sequence[str]:
    row = (
        request.request_id,
        request.outcome,
        f"{request.prompt_tokens}+{request.completion_tokens}",
        _length(request.first_token_s) if request.HasField("first_token_s") else "-",
        _length(request.duration_s),
        age(request.age_s),
    )
    places = (request.prefill_worker or "-", request.decode_worker or "-")
    return (*row, *places, request.client or "-") if wide else row


def _length(seconds: float) -> str:
    return milliseconds(seconds) if seconds < 10 else f"{seconds:.1f} s"
