"""Fitting what a kind of memory can learn on a bank's own journal: `raymem train`."""

from raymem.train.run import TrainReport, TrainSettings, train, trainable

__all__ = ["TrainReport", "TrainSettings", "train", "trainable"]
