"""The `quantrack` command's first moment: it can be interrupted while the rest is imported."""

import gc

from quantrack.interrupts import OWN


def main() -> None:
    """Run the command."""
    OWN.heed()
    gc.disable()  # as in `program`
    from quantrack.cli import app

    gc.enable()
    app()
