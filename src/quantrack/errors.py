"""The errors a user may see: one line each, naming the input and the fix."""


class QuantrackError(Exception):
    """Something in the inputs or on the machine stops the work; the program exits with 1."""

    exit_code = 1


class NotFiniteError(QuantrackError):
    """A network gives NaN or infinite values."""


class UsageError(QuantrackError):
    """A setting that can be refused before any work starts; the program exits with 2."""

    exit_code = 2


OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "failed to allocate memory",
    "bad allocation",
    "bad_alloc",
)


def memory_problem(error: Exception) -> str | None:
    """One line for an error of any library that says that memory ran out; None for other errors."""
    text = " ".join(str(error).split())
    if not isinstance(error, MemoryError) and not any(words in text.lower() for words in OUT_OF_MEMORY):
        return None
    kind = type(error).__name__
    return f"memory ran out ({kind}: {text[:160]}); give a smaller imgsz, another device, or free memory"


def place_and_reason(error: OSError) -> str:
    """The place and the reason, without Python's number of the error."""
    places = " and ".join(str(place) for place in (error.filename, error.filename2) if place is not None)
    reason = error.strerror or str(error)
    return f"{places}: {reason}" if places else reason
