"""Planning before anything starts: a configuration's resources, the hosts that hold it, the device it
computes on, and how to divide devices between prefill and decode.

In: a `ClusterConfig`, a checkpoint's header, what hosts have (`engine.gpu.Node`), or a load and the devices
to divide. Out: a `Plan`, or findings that say what does not fit and why; a `Comparison` of splits. Pure but
for reading the checkpoint's header and processes that try out splits; it changes no state.
"""
