"""The OpenAI-compatible HTTP server: translates JSON to the messages of the gRPC API and back; everything
else is shared."""
