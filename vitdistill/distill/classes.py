"""A teacher's classes matched with the data set's, by name."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError, Set
from ..messages import listed


@dataclass(frozen=True)
class ClassMatch:
    """How a teacher's classes answer for the data set's."""

    index: tuple[int, ...] | None  # the data set's classes among the teacher's; None: as they are
    remark: str  # what the user should know of it
    classes: tuple[str, ...] = ()  # names the teacher then answers with, in order


def match_classes(
    name: str,
    teacher_classes: Sequence[str] | None,
    teacher_count: int,
    classes: Sequence[str],
    reorder: bool,
    index: Sequence[int] | None = None,
) -> ClassMatch:
    """Match a teacher's classes to the data set's by name.

    A teacher that knows more classes answers for the data set's alone. Another order is accepted
    only with ``reorder``, so that nobody is surprised by it. A teacher without class names needs
    the same number of them, in the order of ``index``; the preflight proves that order.

    Raises:
        ConfigError: a class is missing, or the order or the count differs.
    """
    wanted, known = tuple(classes), None if teacher_classes is None else tuple(teacher_classes)
    model, reordering = f"teachers.{name}.model", f"teachers.{name}.reorder_classes"
    count = len(wanted if known is None else known)
    if count != teacher_count:
        whose = "the data set has" if known is None else "names"
        raise ConfigError(
            f"the {name} answers with {teacher_count} classes, but {whose} {count}",
            fix="give a teacher trained on these classes, or one whose config.json names all of its"
            " classes (label_names)",
            field=model,
        )
    if index is not None and known not in (None, wanted):
        ordering = f"teachers.{name}.class_order"
        what = f"the classes of the {name} have names, so class_order does not apply"
        raise ConfigError(what, Set(ordering, "same"))
    if index is not None:
        return ClassMatch(tuple(index), "its classes are in the order that is set", wanted)
    if known is None:
        remark = "its classes have no names: its accuracy proves their order"
        return ClassMatch(None, remark, wanted)
    if known == wanted:
        return ClassMatch(None, "its classes are the data set's, in order", wanted)
    position, counts = {label: i for i, label in enumerate(known)}, Counter(known)
    missing = [label for label in wanted if label not in position]
    if missing:
        what = f"the {name} does not know {len(missing)} of the data set's {len(wanted)} classes"
        what = f"{what} ({listed(missing)})"
        raise ConfigError(what, "give a network that was trained on them", field=model)
    twice = [label for label in wanted if counts[label] > 1]
    if twice:
        what = f"the {name} has two classes called {twice[0]!r}, and one is meant"
        raise ConfigError(what, "give them different names in its config.json", field=model)
    if count == len(wanted) and not reorder:
        first = next(i for i, label in enumerate(wanted) if known[i] != label)
        raise ConfigError(
            f"the {name} has the data set's classes in another order (class {first} is"
            f" {wanted[first]!r} in the data set and {known[first]!r} in the {name})",
            fix=Set(reordering, True),
        )
    how = "reordered by name" if count == len(wanted) else f"{len(wanted)} of its {count}, by name"
    index = tuple(position[label] for label in wanted)
    return ClassMatch(index, f"the data set's classes are {how}", wanted)
