"""The only package that uses Ray: it starts the processes, supervises them and connects the other
packages."""

import os

# Ray writes a long text to our stdout whenever a process dies, whatever its logging settings; the status
# is more concise
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
