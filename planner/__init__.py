"""Planning before anything starts: what a configuration needs, which hosts hold it, and on what device it
computes.

In: a `ClusterConfig`, a checkpoint's header, what hosts have (`engine.gpu.Node`). Out: a `Plan`, or findings
that say what does not fit and why. Pure but for reading the checkpoint's header; nobody's state is changed.
"""
