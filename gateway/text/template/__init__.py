"""What a chat template may do: a closed set of operations, each with a bound on its result that is known
before it runs."""
