"""Translates between text and tokens: tokenizer, chat template, detokenizer, stop strings. Independent of
gRPC and HTTP."""
