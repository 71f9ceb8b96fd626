"""What cannot work together, refused before any compute is spent."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import fields

from ..errors import Add, ConfigError, Drop, Set, fields_below
from ..labels.layout import Layout
from ..messages import suggest
from ..methods.base import Masking, Objective, TeacherObjective, TokenSelector
from ..vit.needs import Needs
from ..vit.network import Network


def resolve(needs: Needs, network: Network, reader: str) -> Needs:
    """Resolve the blocks that ``reader`` needs of ``network``; refuse what it does not have."""
    lacks = {
        "feature maps": (needs.hidden or needs.features) and not (network.walks or network.dims),
        "attention": (needs.attention or needs.qkv) and network.attention_source is None,
        "logits": needs.logits and network.num_classes == 0,
    }
    for what, lacking in lacks.items():
        if lacking:
            what = f"{reader} reads {what}, and {_the(network)} has none"
            fix = ("take another network, such as a plain ViT", "leave out what reads them")
            raise ConfigError(what, fix, field=_model(network))
    try:
        return needs.resolve(network.depth)
    except IndexError as error:
        raise ConfigError(f"{reader} reads from {_the(network)}, where {error}") from None


def teacher_of(name: str, objective: Objective, teachers: Mapping[str, Network]) -> Network | None:
    """Return the teacher that an objective reads, if any; refuse an unknown one."""
    if not isinstance(objective, TeacherObjective):
        return None
    wanted = objective.teacher
    if wanted not in teachers:
        what = f"{name} reads a teacher named {wanted!r}, and there is none of that name"
        fix = suggest(wanted, teachers) if teachers else Set(f"teachers.{wanted}.model")
        raise ConfigError(what, fix, field=f"objectives.{name}.teacher")
    return teachers[wanted]


def check_objective(
    name: str,
    objective: Objective,
    student: Network,
    teacher: Network | None,
    masking: Masking | None,
) -> None:
    """Refuse an objective that does not suit these networks or this masking."""
    with _naming(name, objective):
        objective.check(student, teacher)
    if objective.needs_masking and masking is None:
        what = f"{name} learns from hidden patches, and nothing hides any"
        raise ConfigError(what, Add("random_masking"), field="masking")
    if objective.needs_every_patch and masking is not None:
        what = f"{name} reads every patch of the student, and {_kind(masking)} hides some"
        raise ConfigError(what, (Drop(name), Drop("masking")), field="masking")


def check_teachers_read(needs: Mapping[str, Needs]) -> None:
    """Refuse a teacher that no objective reads."""
    for name, of_teacher in needs.items():
        if not of_teacher:
            what = f"no objective reads the teacher {name!r}"
            raise ConfigError(what, (Add("kd"), Drop(name)), field=f"teachers.{name}")


def check_heads(student: Network, objectives: Mapping[str, Objective]) -> None:
    """Refuse an untrained head that would still be part of the student's prediction."""
    trained: set[str] = set()
    for name, objective in objectives.items():
        with _naming(name, objective):
            trained |= {*objective.trains_heads(student)}
    for head in student.answering or student.heads:
        if trained and head not in trained:
            reader = {"class": "ce", "distillation": "kd"}.get(head, f"kd:{head}")
            raise ConfigError(
                f"no objective trains the {head} head of {student.architecture}, which is part of"
                " its prediction",
                fix=(Add(reader), Set("objectives.ce.head", "all")),
                field="objectives",
            )


def check_stored(
    labels: Mapping[str, Layout],
    stored: Mapping[str, Needs],
    selector: TokenSelector | None,
    masking: Masking | None,
) -> None:
    """Refuse stored answers that lack what is read, or whose patches would be chosen."""
    for name, layout in labels.items():
        where, field = f"the labels of the {name}", f"teachers.{name}.labels"
        chooses = masking or (selector if selector and name in selector.teachers else None)
        if chooses is not None:
            what = f"{where} are its answers to whole images, and {_kind(chooses)} hides patches"
            part = Drop("selector" if chooses is selector else "masking")
            raise ConfigError(what, (part, "run the teacher in place of its labels"), field=field)
        needs = stored[name]
        absent = ["attention"] if needs.attention or needs.qkv else []
        absent += ["logits"] if needs.logits and layout.logits is None else []
        blocks = sorted(needs.hidden - {block for block, _, _ in layout.hidden})
        absent += [f"hidden states after block {block}" for block in blocks]
        absent += ["final features"] if needs.features and layout.features is None else []
        if absent:
            what = f"{where} do not hold its {' and '.join(absent)}"
            # Attention is too large to be stored.
            again = () if "attention" in absent else ("label again with this recipe",)
            raise ConfigError(what, (*again, "leave out what reads them"), field=field)


def stored_temperatures(
    labels: Mapping[str, Layout],
    teachers: Mapping[str, Network],
    objectives: Mapping[str, Objective],
) -> dict[str, float | None]:
    """Return the temperature at which each objective reads stored logits; None: complete ones."""
    return {
        name: _temperature(name, objective, labels[objective.teacher])
        for name, objective in objectives.items()
        if isinstance(objective, TeacherObjective) and objective.teacher in labels
        if objective.teacher_needs(teachers[objective.teacher]).logits
    }


def _temperature(name: str, objective: TeacherObjective, layout: Layout) -> float | None:
    logits, wanted = layout.logits, objective.teacher_temperatures
    if logits is None or logits.is_complete:
        return None
    hold = f"the labels of the {objective.teacher} hold {logits.k} of an image's classes"
    field = f"teachers.{objective.teacher}.labels"
    if wanted is None or len(wanted) > 1:
        what = f"{name} reads complete logits, and {hold}"
        raise ConfigError(what, "label again, in the encoding float16", field=field)
    if wanted and wanted[0] not in logits.temperatures:
        right = ", ".join(f"{t:g}" for t in logits.temperatures)
        what = (
            f"{name} reads logits at temperature {wanted[0]:g}, and {hold}, valid only at {right}"
        )
        declared = Set(f"objectives.{name}.temperature", logits.temperatures[0])
        again = f"label again, at the temperature {wanted[0]:g}"
        raise ConfigError(what, (declared, again), field=field)
    return wanted[0] if wanted else logits.temperatures[0]


def check_masking(
    masking: Masking,
    student: Network,
    teachers: Mapping[str, Network],
    objectives: Mapping[str, Objective],
    live: Mapping[str, Needs],
    selector: TokenSelector | None,
) -> None:
    """Refuse a masking without effect, or networks that cannot see the same patches."""
    kind = _kind(masking)
    if selector is not None:
        what = f"{kind} and {_kind(selector)} both choose the patches a teacher sees"
        raise ConfigError(what, (Drop("masking"), Drop("selector")), field="selector")
    for network in (student, *teachers.values()):
        if not network.walks:
            what = f"{kind} hides patches, and {_the(network)} cannot be run on a part of them"
            raise ConfigError(what, "take a plain ViT", field=_model(network))
        if network.grid != student.grid:
            grids = " and ".join(map(_grid, (student, network)))
            what = f"{kind} shows the same patches to all, and student and {_the(network)} have"
            size = f"teachers.{network.name}.image_size"
            sizes = network.grid[0] * student.patch_size[0], student.grid[0] * network.patch_size[0]
            fixes = Set("student.image_size", sizes[0]), Set(size, sizes[1])
            raise ConfigError(f"{what} {grids}", fixes, field=size)
    count, more = masking.count(student.num_patches), masking.teacher_count(student.num_patches)
    if more > count and (not teachers or any(needs.attention for needs in live.values())):
        why = "an objective compares their attention" if teachers else "there is no teacher"
        what = f"{kind} shows teachers more patches than the student, and {why}"
        fix, field = "leave masking.teacher_mask_rate out", "masking.teacher_mask_rate"
        raise ConfigError(what, fix, field=field)
    for name, objective in objectives.items():
        if objective.needs_masking and count == student.num_patches:
            what = f"{name} learns from hidden patches, and {kind} hides none of the {count}"
            raise ConfigError(what, Set("masking.mask_rate", 0.75))


def chosen_teachers(
    selector: TokenSelector, teachers: Mapping[str, Network], live: Mapping[str, Needs]
) -> Iterable[str]:
    """Return the names of the teachers a selector chooses for; refuse unknown ones, or none."""
    kind = _kind(selector)
    if not live:
        what = f"{kind} chooses the patches a teacher sees, but no teacher runs"
        fixes = Set("teachers.teacher.model"), Drop("selector")
        raise ConfigError(what, fixes, field="selector")
    for name in selector.teachers:
        if name not in teachers:
            what = f"{kind} chooses for a teacher named {name!r}, and there is none of that name"
            raise ConfigError(what, suggest(name, teachers), field="selector.teachers")
    return selector.teachers or tuple(live)


def _naming(name: str, objective: Objective) -> AbstractContextManager[None]:
    """Make an objective's errors name its fields from the root of the recipe."""
    return fields_below(f"objectives.{name}", {field.name for field in fields(objective)})


def _kind(method: object) -> str:
    return type(method).__name__


def _the(network: Network) -> str:
    return f"the {network.name} ({network.architecture})"


def _grid(network: Network) -> str:
    """Return ``8 x 8 (images of 32 in patches of 4 pixels)``."""
    (rows, columns), size, patch = network.grid, network.image_size[0], network.patch_size[0]
    return f"{rows} x {columns} (images of {size} in patches of {patch} pixels)"


def _model(network: Network) -> str:
    return "student.model" if network.name == "student" else f"teachers.{network.name}.model"
