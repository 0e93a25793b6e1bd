"""What is run as a program imports this before all else, so that it can be interrupted while the rest is imported."""

from quantrack.interrupts import OWN

OWN.heed()
