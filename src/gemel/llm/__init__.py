"""Text in, text out: the engine with a tokenizer on top, for batches (`offline`) and for services (`online`)."""
