"""Encoding: from the rows that a model leaves behind to what a memory mechanism stores and is asked with."""

from raymem.encode.calibration import Calibration, Range
from raymem.encode.encoder import Encoder
from raymem.encode.fit import calibrate
from raymem.encode.keys import KeyMaker
from raymem.encode.values import residual_values

__all__ = ["Calibration", "Encoder", "KeyMaker", "Range", "calibrate", "residual_values"]
