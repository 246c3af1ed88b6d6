"""The compute-bound half: prompts come in, first tokens go to the client and KV blocks to a decode worker."""
