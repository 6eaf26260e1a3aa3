"""Text in, text out, over the engine: encode, detokenize as tokens come, stop at strings."""
