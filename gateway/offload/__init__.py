"""Work that would stall the head's loop, in one limited process beside it: reading large bodies and messages,
and tokenising long prompts.

    gateway/http/body.py, gateway/grpc/guard.py, gateway/intake.py -> Offload -> JobQueue -> the intake
    process -> Worker gateway/intake.py, http/completions.py -> FairThreads -> JobQueue -> two threads of the
    head

What is small stays in the head, by the same functions: where something was read cannot be told from the
result, nor from the refusal. A job that takes too much time or memory ends the process, and is refused; the
others are asked of the next one."""
