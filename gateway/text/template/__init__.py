"""The operations of chat templates: a closed set, each with a bound on its result that is known before it
runs."""
