"""The bandwidth-bound half: KV comes in, tokens go out. Also serves whole requests when it is asked for both
phases."""
