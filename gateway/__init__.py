"""The clients' doors: the gRPC server, and the way from text to tokens and back."""

import os

# gRPC's core would write a line to stderr for each frame of any peer that it does not like; its first use
# reads this
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
