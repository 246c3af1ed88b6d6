"""Tool calls: a request's tools, the grammar that constrains a model to them, and the calls parsed from a
response's text."""
