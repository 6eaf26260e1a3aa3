"""One decoder for training and serving: `model(tokens_T, positions_T, attend) -> hidden_TD`, driven by `ModelConfig`."""
