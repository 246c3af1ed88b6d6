"""The tokens allowed next when a request's output has to follow a grammar. llguidance computes them, in a
process of its own.

    client's constraint -> sources (text) -> GrammarChecker, at the gateway -> SamplingParams.grammar
    worker: sequence -> GrammarProcess -> token mask -> sampler

Grammars come from clients, and what they cost cannot be predicted from their text: `(a{1000}){1000}` compiles
in a millisecond and its first mask takes a second, or more. So neither gateway nor workers compute on them; a
process does that may die of them."""
