"""`raymem demo`: what one agent read helps another, which never saw it, on real parts on this machine."""

from raymem.demo.play import Figures, run

__all__ = ["Figures", "run"]
