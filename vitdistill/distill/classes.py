"""A teacher's classes matched with the data set's, by name."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError, Set
from ..messages import listed


@dataclass(frozen=True)
class ClassMatch:
    """How a teacher's classes answer for the data set's.

    Attributes:
        index: positions of the data set's classes among the teacher's; None: as they are.
        remark: what the user should know of it.
        classes: names the teacher then answers with, in order; empty if it carries none.
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
) -> ClassMatch:
    """Match a teacher's classes to the data set's by name.

    A teacher that knows more classes answers for the data set's alone. Another order is accepted
    only with ``reorder``, so that nobody is surprised by it. A teacher without class names is taken
    at its count; the preflight proves its order.

    Raises:
        ConfigError: a class is missing, or the order or the count differs.
    """
    who, wanted = f"the {name}", tuple(classes)
    known = None if teacher_classes is None else tuple(teacher_classes)
    count = len(wanted if known is None else known)
    if count != teacher_count:
        reason = (
            f"{who} answers with {teacher_count} classes and the data set has {count}"
            if known is None
            else f"{who} names {count} classes but answers with {teacher_count}"
        )
        raise ConfigError(
            reason,
            fix="give a teacher trained on these classes, or whose config.json names all of its"
            " own (label_names)",
            field=f"teachers.{name}.model",
        )
    if known is None:
        remark = "it carries no class names: their order is proved by its accuracy"
        return ClassMatch(None, remark, wanted)
    if known == wanted:
        return ClassMatch(None, "its classes are the data set's, in order", wanted)
    missing = [label for label in wanted if label not in known]
    if missing:
        raise ConfigError(
            f"{who} does not know {len(missing)} of the data set's {len(wanted)} classes"
            f" ({listed(missing)})",
            fix="give a teacher trained on them",
            field=f"teachers.{name}.model",
        )
    twice = [label for label in wanted if known.count(label) > 1] if len(set(known)) < count else []
    if twice:
        raise ConfigError(
            f"{who} has two classes called {twice[0]!r}, and one is meant",
            fix="give them different names in its config.json",
            field=f"teachers.{name}.model",
        )
    if count == len(wanted) and not reorder:
        first = next(
            i for i, pair in enumerate(zip(wanted, known, strict=True)) if len({*pair}) > 1
        )
        raise ConfigError(
            f"{who} has the data set's classes in another order (class {first} is"
            f" {wanted[first]!r} in the data set and {known[first]!r} in {who})",
            fix=Set(f"teachers.{name}.reorder_classes", True),
            field=f"teachers.{name}.reorder_classes",
        )
    how = "reordered by name" if count == len(wanted) else f"{len(wanted)} of its {count}, by name"
    position = {label: i for i, label in enumerate(known)}
    index = tuple(position[label] for label in wanted)
    return ClassMatch(index, f"the data set's classes are {how}", wanted)
