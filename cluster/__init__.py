"""The only room that knows Ray: it starts the processes, watches over them and ties the other rooms
together."""

import os

# Ray writes a long text to our stdout whenever a process dies, whatever is asked of its logging; the status
# says it shorter
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
