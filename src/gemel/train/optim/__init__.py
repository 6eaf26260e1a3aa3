"""Optimizers: one file per method, and apart from them where weights and state are stored, so that each works with each."""

from gemel.train.optim.optimizer import Optimizer, build, indivisible

__all__ = ["Optimizer", "build", "indivisible"]
