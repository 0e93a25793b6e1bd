"""What is run as a program imports this before all else, so that it can be interrupted while the rest is imported.

Meanwhile nothing is collected: looking for garbage among a million objects that stay took an eighth of a program's
start. `run_entry_point` has it collected again.
"""

import gc

from quantrack.interrupts import OWN

OWN.heed()
gc.disable()
