"""The kernels of the GPU, in Triton: an implementation of `Kernels` (`kernels.py`), and what it is made of.

An operation means what its torch reference says (`kernels/reference.py`; `kernels/sampling.py` and
`kernels/wire.py` for those that `Kernels` does not have); it is a list of launches (`launch.py`). A launch is
a value: production and tests run it, in Triton's interpreter where there is no GPU; the compile gate
(`footprint.py`) compiles it for a GPU that need not be there."""
