"""The clients' doors: the gRPC server, and the way from text to tokens and back."""
