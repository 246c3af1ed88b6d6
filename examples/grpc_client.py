"""A stream over gRPC: `python examples/grpc_client.py 127.0.0.1:50051 "The with statement"`."""

import sys

import grpc

from pdserve.proto import pdserve_pb2 as pb, pdserve_pb2_grpc


def main(address: str, prompt: str) -> None:
    with grpc.insecure_channel(address) as channel:
        generation = pdserve_pb2_grpc.GenerationStub(channel)
        request = pb.GenerateRequest(
            prompt=pb.Prompt(text=prompt),
            sampling=pb.SamplingParams(max_tokens=24, temperature=0.0),
        )
        for event in generation.GenerateStream(request, timeout=60):
            match event.WhichOneof("event"):
                case "tokens":
                    print(event.tokens.text, end="", flush=True)
                case "choice_end":
                    print(f"\n[{pb.FinishReason.Name(event.choice_end.finish_reason)}]")
                case "end":
                    attempt = event.end.timeline.attempts[-1]
                    print(f"prefill on {attempt.prefill.worker}, decode on {attempt.decode.worker}")


if __name__ == "__main__":
    main(*sys.argv[1:])
