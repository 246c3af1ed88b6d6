"""Where there is no GPU, Triton's kernels run in its interpreter. Triton decides so when it is imported, and
others import it too (transformers does), so the wish must stand before the first test module is read."""

import os
import signal

import hypothesis
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from bench.gpu.interpreter import patch_language_once  # imports triton

patch_language_once()

# A shell has its background jobs ignore it, and with them all processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No test asserts a time: an example may take longer on a busy machine.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")
