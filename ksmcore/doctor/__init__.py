"""Is all well with ksmcore on this machine, and if not, what can be done? `examine` tells."""

from ksmcore.doctor.checks import Check, Level
from ksmcore.doctor.diagnosis import Diagnosis, examine

__all__ = ["Check", "Diagnosis", "Level", "examine"]
