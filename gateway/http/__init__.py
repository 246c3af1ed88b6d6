"""The OpenAI-compatible HTTP door: JSON to the messages of the gRPC door and back; everything else is shared
with that door."""
