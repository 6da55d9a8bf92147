"""Ways a registry directory can be wrong. No status here: gateway/ gives one where it answers.

RegistryError
|- WriteError        the disk says no: full, read-only, gone, broken
|- UnsafeFileError   a file that is a link, no regular file, too large, or outside
|- ManifestError     a manifest that cannot be believed
|- RolloutError      a plan that is wrong, or a rollout that does not allow what was asked
|- RevisionError     a revision that cannot be read: it is not there, it is damaged, or of a
|                    later release
|- ChangeError       a change that cannot be made; below it NotThereError, and ProtectedError for
|                    one that must be insisted on
`- ConflictError     somebody else was faster; below it PreconditionError
"""

import errno
import os


class RegistryError(Exception):
    """Something in the registry directory is not as it must be."""


class WriteError(RegistryError):
    """A file could not be written; what was there before is there still."""

    def __init__(self, name: str, error: OSError) -> None:
        self.errno = error.errno or 0
        """Of the system call that failed."""
        reason = os.strerror(self.errno) if self.errno else type(error).__name__
        super().__init__(f"{name!r} cannot be written: {reason}")

    @property
    def is_full(self) -> bool:
        """Whether it is for want of space."""
        return self.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class UnsafeFileError(RegistryError):
    """A file that is not read as part of a version, with the reason."""


class UntrustedError(RegistryError):
    """A version that nobody whose key is trusted has signed, or that was changed since."""


class ManifestError(RegistryError):
    """A `manifest.json` that cannot be believed, with the reason."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"manifest.json: {problem}")


class RevisionError(RegistryError):
    """A revision that cannot be read: damaged, or the disk says no."""


class DamagedRevisionError(RevisionError):
    """A file that holds no revision, or another than its name says."""


class RevisionNotFoundError(RevisionError):
    """No revision has this number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"there is no revision {number}")


class NewerFormatError(RevisionError):
    """A later release of driftgate has written it: read and change it with that one."""

    def __init__(self, what: str, given: int, known: int) -> None:
        super().__init__(f"{what}: format {given}; this release reads up to {known}: upgrade it")


class RolloutError(RegistryError):
    """A plan is wrong, or a rollout does not allow this; `problems` holds all there is."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


class ChangeError(RegistryError):
    """A change that cannot be made. `problems` holds everything that is wrong with it."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


class NotThereError(ChangeError):
    """It changes a model, version, alias or route that is not there."""


class ProtectedError(ChangeError):
    """It can be made, but only by whoever says that it is meant: --force, --take-over."""


class ConflictError(RegistryError):
    """Somebody else has changed the same thing meanwhile; the sentence says who, and what."""


class PreconditionError(ConflictError):
    """What is in force is not the revision that the change was meant for."""
