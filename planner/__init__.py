"""Planning before anything starts: a configuration's resources, the hosts that hold it, and the device it
computes on.

In: a `ClusterConfig`, a checkpoint's header, what hosts have (`engine.gpu.Node`). Out: a `Plan`, or findings
that say what does not fit and why. Pure but for reading the checkpoint's header; it changes no state.
"""
