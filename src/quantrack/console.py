"""The `quantrack` command's first moment: it can be interrupted while the rest is imported."""

from quantrack.interrupts import OWN


def main() -> None:
    """Run the command."""
    OWN.heed()
    from quantrack.cli import app

    app()
