"""Between text and tokens: tokenizer, chat template, detokenizer, stop strings. Nothing here knows gRPC or
HTTP."""
