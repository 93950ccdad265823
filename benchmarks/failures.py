"""Why something was not measured."""

from common.errors import is_out_of_memory

BEGUN = "begun and not ended"
NO_TIME = "not measured: no time left"
OUT_OF_MEMORY = "out of memory"


def reason(error: BaseException) -> str:
    """One line."""
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first[:300]}"
