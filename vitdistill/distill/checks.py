"""What cannot work together, refused before any compute is spent."""

from collections.abc import Iterable, Mapping

from ..errors import Add, ConfigError, Drop, Give, Set
from ..labels.layout import Layout
from ..messages import suggest
from ..methods.base import Masking, Objective, TeacherObjective, TokenSelector
from ..vit.needs import Needs
from ..vit.network import Network


def resolve(needs: Needs, network: Network, reader: str) -> Needs:
    """Resolve the blocks that ``reader`` needs of ``network``; refuse what it does not have."""
    where = f"the {network.name} ({network.architecture})"
    if (needs.hidden or needs.features) and not (network.walks or network.dims):
        raise ConfigError(
            f"{reader} reads feature maps, and {where} gives none",
            fix="take a timm model with forward_intermediates",
            field=_model(network),
        )
    if (needs.attention or needs.qkv) and network.attention_source is None:
        raise ConfigError(
            f"{reader} reads attention, and {where} has none that can be recorded",
            fix="take a plain ViT",
            field=_model(network),
        )
    if needs.logits and network.num_classes == 0:
        raise ConfigError(
            f"{reader} reads logits, and {where} has no classifier",
            fix=("take one with a head", "take objectives that read features"),
            field=_model(network),
        )
    try:
        return needs.resolve(network.depth)
    except IndexError as error:
        raise ConfigError(f"{reader} reads from {where}, where {error}") from None


def check_objective(
    name: str,
    objective: Objective,
    student: Network,
    teachers: Mapping[str, Network],
    masking: Masking | None,
) -> None:
    """Refuse an objective that has no such teacher, or cannot compare these networks."""
    teacher = None
    if isinstance(objective, TeacherObjective):
        teacher = teachers.get(objective.teacher)
        if teacher is None:
            raise ConfigError(
                f"the objective {name!r} reads a teacher named {objective.teacher!r}, and there is"
                " none of that name",
                fix=suggest(objective.teacher, teachers)
                if teachers
                else Set(f"teachers.{objective.teacher}.model"),
                field=f"objectives.{name}.teacher",
            )
    objective.check(student, teacher)
    if objective.needs_masking and masking is None:
        raise ConfigError(
            f"{name} learns from hidden patches, and nothing hides any",
            fix=Add("random_masking"),
            field="masking",
        )
    if objective.needs_every_patch and masking is not None:
        raise ConfigError(
            f"{name} reads every patch of the student, and {_kind(masking)} hides some",
            fix=(Drop(name), Drop("masking")),
            field="masking",
        )


def check_teachers_read(needs: Mapping[str, Needs]) -> None:
    """Refuse a teacher that no objective reads."""
    for name, of_teacher in needs.items():
        if not of_teacher:
            raise ConfigError(
                f"no objective reads the teacher {name!r}",
                fix=(Add("kd"), Drop(name)),
                field=f"teachers.{name}",
            )


def check_heads(student: Network, objectives: Mapping[str, Objective]) -> None:
    """Refuse an untrained head that would still be part of the student's prediction."""
    trained = {
        head for objective in objectives.values() for head in objective.trains_heads(student)
    }
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
    """Refuse to read what stored answers do not hold, or to choose their patches."""
    for name, layout in labels.items():
        where, field = f"the labels of the {name}", f"teachers.{name}.labels"
        for part, method, chooses in (
            ("masking", masking, masking is not None),
            ("selector", selector, selector is not None and name in selector.teachers),
        ):
            if chooses:
                raise ConfigError(
                    f"{where} are its answers to whole images, and {_kind(method)} hides patches",
                    fix=(Drop(part), f"leave {field} out"),
                    field=field,
                )
        needs = stored[name]
        if needs.attention or needs.qkv:
            raise ConfigError(
                f"an objective reads attention of the {name}, which labels do not hold",
                fix=f"leave {field} out",
                field=field,
            )
        absent = ["logits"] if needs.logits and layout.logits is None else []
        blocks = sorted(needs.hidden - {block for block, _, _ in layout.hidden})
        absent += [f"hidden states after block {block}" for block in blocks]
        if needs.features and layout.features is None:
            absent.append("features after the final norm")
        if absent:
            raise ConfigError(
                f"{where} do not hold its {' and '.join(absent)}",
                fix=("label again with this recipe", "leave out what reads them"),
                field=field,
            )


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
        raise ConfigError(
            f"{name} reads complete logits, and {hold}",
            fix=Give("encoding", "float16"),
            field=field,
        )
    if wanted and wanted[0] not in logits.temperatures:
        declared = ", ".join(f"{t:g}" for t in logits.temperatures)
        raise ConfigError(
            f"{name} reads logits at temperature {wanted[0]:g}, and {hold}, right at {declared}"
            " only",
            fix=(
                Set(f"objectives.{name}.temperature", logits.temperatures[0]),
                Give("temperatures", wanted[0]),
            ),
            field=field,
        )
    return wanted[0] if wanted else logits.temperatures[0]


def check_masking(
    masking: Masking,
    student: Network,
    teachers: Mapping[str, Network],
    objectives: Mapping[str, Objective],
    live: Mapping[str, Needs],
    selector: TokenSelector | None,
) -> None:
    """Refuse a masking of networks that cannot see the same patches, or of no effect."""
    kind = _kind(masking)
    if selector is not None:
        raise ConfigError(
            f"{kind} and {_kind(selector)} both choose the patches a teacher sees",
            fix=(Drop("masking"), Drop("selector")),
            field="selector",
        )
    for network in (student, *teachers.values()):
        where = f"the {network.name} ({network.architecture})"
        if not network.walks:
            raise ConfigError(
                f"{kind} hides patches, and {where} cannot be run on a part of them",
                fix="take a plain ViT",
                field=_model(network),
            )
        if network.grid != student.grid:
            of_student, of_teacher = (
                f"{n.grid[0]} x {n.grid[1]} patches of {n.patch_size[0]} x {n.patch_size[1]} pixels"
                for n in (student, network)
            )
            size = f"teachers.{network.name}.image_size"
            raise ConfigError(
                f"{kind} shows the same patches to all, and the student has {of_student},"
                f" {where} {of_teacher}",
                fix=(Set("student.image_size"), Set(size)),
                field=size,
            )
    count, more = masking.count(student.num_patches), masking.teacher_count(student.num_patches)
    if more > count and (not teachers or any(needs.attention for needs in live.values())):
        why = "an objective compares their attention" if teachers else "there is no teacher"
        raise ConfigError(
            f"{kind} shows teachers more patches than the student, and {why}",
            fix="leave masking.teacher_mask_rate out",
            field="masking.teacher_mask_rate",
        )
    for name, objective in objectives.items():
        if objective.needs_masking and count == student.num_patches:
            raise ConfigError(
                f"{name} learns from hidden patches, and {kind} hides none of the student's"
                f" {count}",
                fix=Set("masking.mask_rate", 0.75),
                field="masking.mask_rate",
            )


def chosen_teachers(
    selector: TokenSelector, teachers: Mapping[str, Network], live: Mapping[str, Needs]
) -> Iterable[str]:
    """Return the names of the teachers a selector chooses for; refuse unknown ones, or none."""
    kind = _kind(selector)
    if not live:
        raise ConfigError(
            f"{kind} chooses the patches a teacher sees, but no teacher runs",
            fix=(Set("teachers.teacher.model"), Drop("selector")),
            field="selector",
        )
    for name in selector.teachers:
        if name not in teachers:
            raise ConfigError(
                f"{kind} is to choose for a teacher named {name!r}, and there is none of that name",
                fix=suggest(name, teachers),
                field="selector.teachers",
            )
    return selector.teachers or tuple(live)


def _kind(method: object) -> str:
    return type(method).__name__


def _model(network: Network) -> str:
    return "student.model" if network.name == "student" else f"teachers.{network.name}.model"
