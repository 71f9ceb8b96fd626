"""A teacher's classes matched with the data set's, by name."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from .teacher import setting


@dataclass(frozen=True)
class ClassMatch:
    """How a teacher's classes answer for the data set's: positions to pick (None: as they are), and
    a remark for the user.

    ``classes`` are the names it then answers with, in order; empty when it carries none.
    """

    index: tuple[int, ...] | None
    remark: str
    classes: tuple[str, ...] = ()


def match_classes(
    name: str,
    teacher_classes: Sequence[str] | None,
    teacher_count: int,
    classes: Sequence[str],
    reorder: bool,
    source: str = "",
) -> ClassMatch:
    """Match a teacher's classes to the data set's by name; ``source`` is the file its answers are
    in, where it does not run.

    A teacher that knows more classes answers for the data set's alone. Names in another order are
    used only when ``reorder`` is set, so that a surprise is seen. A teacher that carries no class
    names is taken at its count, and the preflight proves its order.

    Raises:
        ConfigError: a class is missing, the order differs, or the counts do.
    """
    who, ours = f"the {name} of {source}" if source else f"the {name}", tuple(classes)
    if teacher_classes is None:
        if teacher_count != len(ours):
            raise ConfigError(
                f"{who} answers with {teacher_count} classes and the data set has {len(ours)}:"
                " train or fine-tune a teacher on these classes, or give one whose config.json"
                " names its classes (label_names)"
            )
        return ClassMatch(
            None, "it carries no class names: their order is proved by its accuracy", ours
        )
    its = tuple(teacher_classes)
    if len(its) != teacher_count:
        raise ConfigError(
            f"{who} names {len(its)} classes but answers with {teacher_count}: its config.json is"
            " wrong"
        )
    if its == ours:
        return ClassMatch(None, "its classes are the data set's, in order", ours)
    position = {label: i for i, label in enumerate(its)}
    missing = [label for label in ours if label not in position]
    if missing:
        shown = ", ".join(repr(label) for label in missing[:3]) + (
            ", ..." if len(missing) > 3 else ""
        )
        raise ConfigError(
            f"{who} does not know {len(missing)} of the data set's {len(ours)} classes ({shown}):"
            " give a teacher trained on them"
        )
    index = tuple(position[label] for label in ours)
    twice = (
        next((label for label in ours if its.count(label) > 1), None)
        if len(position) < len(its)
        else None
    )
    if twice is not None:
        raise ConfigError(
            f"{who} has two classes called {twice!r}, and one is meant: give them different names"
            " in its config.json"
        )
    if len(its) == len(ours) and not reorder:
        first = next(
            i for i, (our, other) in enumerate(zip(ours, its, strict=True)) if our != other
        )
        raise ConfigError(
            f"{who} has the data set's classes in another order (class {first} is {ours[first]!r}"
            f" in the data set and {its[first]!r} in {who}): pass"
            f" {setting(name, 'reorder_classes')} to match them by name"
        )
    kind = (
        "are reordered by name"
        if len(its) == len(ours)
        else f"are {len(ours)} of its {len(its)}, by name"
    )
    return ClassMatch(index, f"the data set's classes {kind}", ours)
