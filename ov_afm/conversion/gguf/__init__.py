"""Read a GGUF file: configuration, tokenizer and weights."""
