"""The errors a user can meet: each is one sentence that says what was wrong, where, and what to do.

The command line prints the sentence and leaves with the error's exit code (BSD ``sysexits``
numbers); a library user catches [`UserError`][vitdistill.errors.UserError].
"""


class UserError(Exception):
    """Something the user asked for cannot be done; the message is the one sentence to show.

    Attributes:
        agreed: whether every process of a run raises it, so that the first one says it for all.
    """

    exit_code = 64
    agreed = False


class DataError(UserError):
    """Input data is damaged or does not fit: images, weights, checkpoints, class lists.

    Attributes:
        image: where one image of a source cannot be read, the names of the source and of the image
            in it.
    """

    exit_code = 65
    image: tuple[str, str] | None = None


class MissingSplit(DataError):
    """A data set has no such split at all, as opposed to a damaged one."""


class NonFiniteError(UserError):
    """A loss, a gradient or a teacher's answer is NaN or infinite."""

    exit_code = 70


class OutOfMemory(UserError):
    """The memory of the GPU or of the machine is used up."""

    exit_code = 71


class DiskError(UserError):
    """A file could not be written: no room, or an I/O error."""

    exit_code = 74


class Preempted(UserError):
    """The run was asked to stop, saved its state, and can be resumed by the same command."""

    exit_code = 75


class PermissionDenied(UserError):
    """A path may not be read or written."""

    exit_code = 77


class ConfigError(UserError):
    """A setting is wrong, or cannot take effect together with the others."""

    exit_code = 78
