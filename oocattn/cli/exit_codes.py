"""The exit codes of the `oocattn` command.

Bad usage is what the words of a command show by themselves: an option that there is not, a value that it cannot have, or
options that exclude or need each other. What is found in what they name, and all else, is a failure.
"""

from __future__ import annotations

DONE, FAILED, BAD_USAGE, INCONCLUSIVE, TIME_LIMIT, HUNG_UP, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 75, 129, 130, 143

EXIT_CODES = {
    DONE: "done",
    FAILED: "failed",
    BAD_USAGE: "bad usage",
    INCONCLUSIVE: "verify is inconclusive",
    TIME_LIMIT: "time limit reached or SIGUSR1, or `status --watch` saw the run interrupted",
    HUNG_UP: "hung up",
    INTERRUPTED: "interrupted",
    TERMINATED: "terminated",
}
"""Every exit code, and what it says. 75 is EX_TEMPFAIL of sysexits.h: not an error, try again later. From 128 on it is a
signal's number and 128."""


def explain_exit_codes() -> str:
    """One sentence for --help."""
    codes = ", ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items())
    return (
        f"Exit codes: {codes}; resume continues a run that ended with {TIME_LIMIT} or more, and the same "
        "command a survey or verify --all-rows."
    )
