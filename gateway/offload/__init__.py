"""Work that would stall the head's loop, in one process with limited resources: reading large bodies and
messages, and tokenising long prompts.

    gateway/http/body.py, gateway/grpc/auth_interceptor.py, gateway/intake.py
        -> Offload -> JobQueue -> the intake process -> Worker
    gateway/intake.py, http/completions.py
        -> FairThreads -> JobQueue -> two threads of the head

Small inputs stay in the head and use the same functions, so results and refusals are the same in both places.
A job that takes too much time or memory ends the process and is refused; the other jobs go to the next
process."""
