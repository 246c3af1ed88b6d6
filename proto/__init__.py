"""The gRPC interface: .proto files, and the code that `scripts/generate_proto` makes from them."""
