"""The errors a user can meet: each is one sentence that says what was wrong, where, and what to do.

The command line prints the sentence and leaves with the error's exit code (BSD ``sysexits`` numbers); a library user catches
[`UserError`][vitdistill.errors.UserError].
"""


class UserError(Exception):
    """Something the user asked for cannot be done; the message is the one sentence to show."""

    exit_code = 64


class DataError(UserError):
    """Input data is damaged or does not fit: images, weights, checkpoints, class lists."""

    exit_code = 65


class NonFiniteError(UserError):
    """A loss, a gradient or a teacher's answer is NaN or infinite."""

    exit_code = 70


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
