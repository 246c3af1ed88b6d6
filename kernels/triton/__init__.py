"""The GPU kernels, in Triton: an implementation of `Kernels` (`kernels.py`), and its parts.

Each operation is defined by its torch reference (`kernels/reference.py`; `kernels/sampling.py` and
`kernels/wire.py` for those that `Kernels` does not have); it is a list of launches (`launch.py`). A launch is
a value: production and tests run it, in Triton's interpreter where there is no GPU; the compile gate
(`footprint.py`) compiles it for a GPU that need not be present."""
