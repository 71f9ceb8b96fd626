"""The plan: resolved once from methods, networks and teachers, it says what each network must
compute, and refuses what cannot work.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import ConfigError
from ..labels.layout import Layout
from ..methods.base import Masking, Objective, TeacherObjective, TokenSelector
from ..vit.needs import Needs
from ..vit.network import Network
from .teacher import setting


@dataclass(frozen=True)
class Plan:
    """What a training step computes.

    Attributes:
        student: its description; ``student_needs`` what it records.
        teachers: descriptions by name.
        objectives: losses by name.
        selector: chooses the patches of every live teacher; None: teachers see everything.
        student_needs: what the student records.
        live: what each teacher records in its supervising pass; those whose answers are stored do
            not run.
        stored: what is read of each teacher whose answers are stored; ``labels``: what its records
            hold.
        temperatures: at which each objective reads a stored teacher's logits; None: they are
            complete.
        guides: what each teacher records on the whole image for the selector's sake (an extra
            pass), where it does.
        num_keep: patches each teacher sees; None: all.
        masking: hides patches from the student and its teachers; None: nothing is hidden.
        student_keep: patches the student sees; None: all.
        notes: what each objective has to say of itself between these networks, where it does.
    """

    student: Network
    teachers: dict[str, Network]
    objectives: dict[str, Objective]
    selector: TokenSelector | None
    student_needs: Needs
    live: dict[str, Needs]
    guides: dict[str, Needs]
    num_keep: dict[str, int | None]
    notes: dict[str, str]
    masking: Masking | None = None
    student_keep: int | None = None
    stored: dict[str, Needs] = field(default_factory=dict)
    labels: dict[str, Layout] = field(default_factory=dict)
    temperatures: dict[str, float | None] = field(default_factory=dict)

    def reads(self, teacher: str) -> Needs:
        """What is read of a teacher, live or stored."""
        return self.live[teacher] if teacher in self.live else self.stored[teacher]


def make_plan(
    student: Network,
    teachers: Mapping[str, Network],
    objectives: Mapping[str, Objective],
    selector: TokenSelector | None = None,
    masking: Masking | None = None,
    labels: Mapping[str, Layout] | None = None,
) -> Plan:
    """Resolve what every network must compute; ``labels``: what the records hold of each teacher
    whose answers are stored.

    Raises:
        ConfigError: one sentence, for a combination that is impossible or would silently have no
            effect.
    """
    if not objectives:
        raise ConfigError("there is no objective: give at least one, e.g. ce")
    student_needs = Needs()
    live = {name: Needs() for name in teachers}
    for name, objective in objectives.items():
        teacher = None
        if isinstance(objective, TeacherObjective):
            if objective.teacher not in teachers:
                known = (
                    f"the teachers are {', '.join(sorted(teachers))}"
                    if teachers
                    else "no teacher is given"
                )
                raise ConfigError(
                    f"the objective {name!r} reads a teacher named {objective.teacher!r}, but"
                    f" {known}"
                )
            teacher = teachers[objective.teacher]
        objective.check(student, teacher)
        if objective.needs_masking and masking is None:
            raise ConfigError(
                f"{name} learns from hidden patches, and nothing hides any: add a masking (--with"
                " random_masking)"
            )
        if objective.needs_every_patch and masking is not None:
            raise ConfigError(
                f"{name} reads every patch of the student, and {type(masking).__name__} hides some:"
                " leave one of them out"
            )
        student_needs |= _resolve(objective.student_needs(student), student, name)
        if teacher is not None:
            assert isinstance(objective, TeacherObjective)
            live[objective.teacher] |= _resolve(objective.teacher_needs(teacher), teacher, name)
    for name in teachers:
        if not live[name]:
            raise ConfigError(
                f"no objective reads the teacher {name!r}: add one (e.g. kd), or leave the"
                " teacher out"
            )
    labels = labels or {}
    stored = {name: live.pop(name) for name in labels}
    temperatures = _check_stored(labels, stored, teachers, objectives, selector, masking)
    _check_heads(student, objectives)
    guides: dict[str, Needs] = {}
    num_keep: dict[str, int | None] = dict.fromkeys(teachers)
    student_keep = None
    if masking is not None:
        if selector is not None:
            raise ConfigError(
                f"{type(masking).__name__} and {type(selector).__name__} both choose the patches a"
                " teacher sees: leave one of them out"
            )
        student_keep = _masked(masking, student, teachers, live)
        learner = next(
            (name for name, objective in objectives.items() if objective.needs_masking), None
        )
        if learner is not None and student_keep == student.num_patches:
            raise ConfigError(
                f"{learner} learns from hidden patches, and {type(masking).__name__} hides none of"
                f" the student's {student_keep}: raise its mask_rate (--set masking.mask_rate=0.75)"
            )
        num_keep = {
            name: masking.teacher_count(teacher.num_patches) for name, teacher in teachers.items()
        }
    if selector is not None:
        kind = type(selector).__name__
        if not live:
            raise ConfigError(
                f"{kind} chooses the patches a teacher sees, but no teacher runs: give one, or"
                " leave the selector out"
            )
        for name in selector.teachers:
            if name not in teachers:
                raise ConfigError(
                    f"{kind} is to choose for a teacher named {name!r}, but the teachers are"
                    f" {', '.join(sorted(teachers))}"
                )
        for name in selector.teachers or live:
            teacher = teachers[name]
            selector.check(student, teacher)
            num_keep[name] = selector.count(teacher.num_patches)
            guide = _resolve(selector.teacher_needs(teacher), teacher, kind)
            if guide:
                guides[name] = guide
        student_needs |= _resolve(selector.student_needs(student), student, kind)
    compared = num_keep if student_keep is None else dict.fromkeys(teachers, student_keep)
    notes = {
        name: _note(objective, student, teachers, compared)
        for name, objective in objectives.items()
    }
    return Plan(
        student=student,
        teachers=dict(teachers),
        objectives=dict(objectives),
        selector=selector,
        student_needs=student_needs,
        live=live,
        guides=guides,
        num_keep=num_keep,
        notes={name: note for name, note in notes.items() if note},
        masking=masking,
        student_keep=student_keep,
        stored=stored,
        labels=dict(labels),
        temperatures=temperatures,
    )


def _check_stored(
    labels: Mapping[str, Layout],
    stored: Mapping[str, Needs],
    teachers: Mapping[str, Network],
    objectives: Mapping[str, Objective],
    selector: TokenSelector | None,
    masking: Masking | None,
) -> dict[str, float | None]:
    """The temperature at which each objective reads stored logits; raises `ConfigError` for what
    the records cannot give.
    """
    for name, layout in labels.items():
        needs, where = stored[name], f"the labels of the {name}"
        if masking is not None:
            raise ConfigError(
                f"{where} are its answers to whole images, and {type(masking).__name__} hides"
                " patches: leave the masking or the labels out"
            )
        if selector is not None and name in selector.teachers:
            raise ConfigError(
                f"{type(selector).__name__} is to choose what the {name} sees, but its answers are"
                " stored: leave one of them out"
            )
        if needs.attention or needs.qkv:
            reader = next(
                key for key, o in objectives.items() if _reads_attention(o, name, teachers[name])
            )
            raise ConfigError(
                f"{reader} reads attention of the {name}, which labels do not hold: let it run"
                f" (without teachers.{name}.labels)"
            )
        missing = sorted(needs.hidden - {block for block, _, _ in layout.hidden})
        absent = ["logits"] * (needs.logits and layout.logits is None) + [
            f"hidden states after block {i}" for i in missing
        ]
        absent += ["features after the final norm"] * (needs.features and layout.features is None)
        if absent:
            raise ConfigError(
                f"{where} do not hold its {' and '.join(absent)}: label again with this recipe, or"
                " leave out what reads them"
            )
    return {
        key: _temperature(key, objective, labels[objective.teacher])
        for key, objective in objectives.items()
        if isinstance(objective, TeacherObjective) and objective.teacher in labels
        if objective.teacher_needs(teachers[objective.teacher]).logits
    }


def _reads_attention(objective: Objective, teacher: str, network: Network) -> bool:
    if not isinstance(objective, TeacherObjective) or objective.teacher != teacher:
        return False
    needs = objective.teacher_needs(network)
    return bool(needs.attention or needs.qkv)


def _temperature(key: str, objective: TeacherObjective, layout: Layout) -> float | None:
    logits, where = layout.logits, f"the labels of the {objective.teacher}"
    if logits is None or logits.is_complete:
        return None
    sparse = f"{logits.k} classes an image"
    wanted = objective.teacher_temperatures
    if wanted is None:
        raise ConfigError(
            f"{key} reads complete logits, and {where} hold {sparse}: label with --encoding float16"
        )
    if len(wanted) > 1:
        shown = " and ".join(f"{t:g}" for t in sorted(wanted))
        raise ConfigError(
            f"{key} reads logits at temperatures {shown} together, and {where} hold {sparse}: label"
            " with --encoding float16"
        )
    if wanted and wanted[0] not in logits.temperatures:
        declared = ", ".join(f"{t:g}" for t in logits.temperatures)
        raise ConfigError(
            f"{key} reads logits at temperature {wanted[0]:g}, and {where} hold {sparse}, right at"
            f" {declared} only: set that (--set"
            f" objectives.{key}.temperature={logits.temperatures[0]:g}), or label with"
            f" --temperatures {wanted[0]:g}"
        )
    return wanted[0] if wanted else logits.temperatures[0]


def _masked(
    masking: Masking, student: Network, teachers: Mapping[str, Network], live: Mapping[str, Needs]
) -> int:
    """How many patches the student sees; raises `ConfigError` for networks that cannot see the same
    ones.
    """
    kind = type(masking).__name__
    for network in (student, *teachers.values()):
        where = f"the {network.name} ({network.architecture})"
        if not network.walks:
            raise ConfigError(
                f"{kind} hides patches, and {where} cannot be run on a part of them: take a"
                " plain ViT"
            )
        if network.grid != student.grid:
            ours, its = (
                f"{n.grid[0]} x {n.grid[1]} patches of {n.patch_size[0]} x {n.patch_size[1]} pixels"
                for n in (student, network)
            )
            sizes = f"--img-size PIXELS, {setting(network.name, 'image_size', 'PIXELS')}"
            if any(n.image_size[0] != n.image_size[1] for n in (student, network)):
                sizes = (
                    "--set student.model_args.img_size=[H,W], --set"
                    f" teachers.{network.name}.model_args.img_size=[H,W]"
                )
            raise ConfigError(
                f"{kind} shows the same patches to all, and the student has {ours}, {where} {its}:"
                f" give networks of equal grids ({sizes})"
            )
    count, more = masking.count(student.num_patches), masking.teacher_count(student.num_patches)
    if more != count and not teachers:
        raise ConfigError(
            f"{kind} shows teachers more than the student, but there is no teacher: leave"
            " masking.teacher_mask_rate out"
        )
    for name, needs in live.items():
        if more > count and needs.attention:
            raise ConfigError(
                f"the {name} sees more patches than the student, so that their attention cannot be"
                " compared: mask both alike"
            )
    return count


def _note(
    objective: Objective,
    student: Network,
    teachers: Mapping[str, Network],
    num_keep: Mapping[str, int | None],
) -> str:
    """What the objective says of itself, and what is true of its kind."""
    name = objective.teacher if isinstance(objective, TeacherObjective) else ""
    parts = [objective.describe(student, teachers.get(name), num_keep.get(name))]
    if objective.couples_images:
        parts.append(
            "compares the images of a micro-batch, so accumulation and the number of processes"
            " change it"
        )
    if objective.schedule is not None:
        parts.append(
            f"weight {objective.weight:g} until {objective.schedule.begin:.0%} of the run,"
            f" {objective.schedule.shape} to {objective.schedule.to:g} at"
            f" {objective.schedule.end:.0%}"
        )
    return "; ".join(part for part in parts if part)


def _check_heads(student: Network, objectives: Mapping[str, Objective]) -> None:
    """A head that no objective trains would still be part of the student's prediction."""
    trained = {
        head for objective in objectives.values() for head in objective.trains_heads(student)
    }
    for head in student.answering or student.heads:
        if head not in trained and trained:
            added = {"class": "ce", "distillation": "kd or hard_kd"}.get(
                head, f"one that reads a teacher of that name (--with kd:{head})"
            )
            raise ConfigError(
                f"no objective trains the {head} head of {student.architecture}, which is part of"
                f" its prediction: add {added}, or let the labels train every head (--set"
                " objectives.ce.head=all)"
            )


def _resolve(needs: Needs, network: Network, reader: str) -> Needs:
    where = f"the {network.name} ({network.architecture})"
    if (needs.hidden or needs.features) and not (network.walks or network.dims):
        raise ConfigError(
            f"{reader} reads feature maps, and {where} gives none: take a timm model with"
            " forward_intermediates"
        )
    if (needs.attention or needs.qkv) and network.attention_source is None:
        raise ConfigError(
            f"{reader} reads attention, and {where} has none that can be recorded: take a plain ViT"
        )
    if needs.logits and network.num_classes == 0:
        raise ConfigError(
            f"{reader} reads logits, and {where} has no classifier: take one with a head, or"
            " objectives that read features"
        )
    try:
        return needs.resolve(network.depth)
    except IndexError as error:
        raise ConfigError(f"{reader} reads from {where}, where {error}") from None


def describe_needs(network: Network, needs: Needs, num_keep: int | None) -> str:
    """One line: patches, blocks and what is recorded, e.g. ``98 of 196 patches; 12 of 12 blocks;
    records logits``.
    """
    parts = []
    if network.walks:
        seen = network.num_patches if num_keep is None else num_keep
        parts.append(f"{seen} of {network.num_patches} patches")
    blocks = needs.num_blocks(network.depth)
    if network.walks:
        parts.append(f"{blocks} of {network.depth} blocks")
    recorded = []
    if needs.logits:
        recorded.append("logits")
    if needs.hidden:
        recorded.append(f"hidden states after block {', '.join(map(str, sorted(needs.hidden)))}")
    if needs.features:
        normed = (
            "features after the final norm"
            if network.final_norm
            else "features before any norm, which is after its pool"
        )
        recorded.append(normed if network.walks else "the last feature map")
    if needs.attention:
        source = {
            "class": "class-token attention",
            "pool": "attention-pool attention",
            "mean": "mean attention",
        }
        recorded.append(
            f"{source[network.attention_source or 'mean']} of block"
            f" {', '.join(map(str, sorted(needs.attention)))}"
        )
        if (
            network.attention_source == "class"
            and not network.reads_class_token
            and network.depth - 1 in needs.attention
        ):
            recorded[-1] += (
                " (whose class token its prediction does not read: that of an earlier block is"
                " trained)"
            )
    if needs.qkv:
        recorded.append(
            f"queries, keys and values of block {', '.join(map(str, sorted(needs.qkv)))}"
        )
    parts.append("records " + " and ".join(recorded))
    return "; ".join(parts)
