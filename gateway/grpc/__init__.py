"""The gRPC server's services, and the interceptor that authenticates and bounds every call before its message
is read."""
