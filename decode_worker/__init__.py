"""The bandwidth-bound half: KV comes in, tokens go out. Serves whole requests too, when it is asked for both
phases."""
