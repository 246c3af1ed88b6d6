"""The servers that clients connect to (gRPC and HTTP), and the path from text to tokens and back."""

import os

# gRPC's core would log a line to stderr for each malformed frame of any peer; the variable is read at its
# first use
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
