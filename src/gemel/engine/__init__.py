"""Token ids in, token ids out: paged keys and values, continuous batching, sampling."""
