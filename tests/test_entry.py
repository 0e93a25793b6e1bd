"""What stops a command."""

import signal

import pytest

from quantrack.entry import _interruptible


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_interrupt_and_are_given_back(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # which whoever runs the tests may have it ignore
    try:
        with _interruptible():
            pass
        assert signal.getsignal(number) is signal.SIG_DFL
        with pytest.raises(KeyboardInterrupt), _interruptible():
            signal.raise_signal(number)
    finally:
        signal.signal(number, before)


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _interruptible():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
