"""Encoding: from a model's rows to the keys, tokens and values that a mechanism stores, and to keys of queries."""

from raymem.encode.calibration import Calibration, Range
from raymem.encode.encoder import Encoder
from raymem.encode.fit import calibrate
from raymem.encode.keys import KeyMaker
from raymem.encode.values import residual_values

__all__ = ["Calibration", "Encoder", "KeyMaker", "Range", "calibrate", "residual_values"]
