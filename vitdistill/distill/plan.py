"""The plan: what each network must compute, resolved once from methods, networks and teachers."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..errors import Add, ConfigError
from ..labels.layout import Layout
from ..methods.base import Masking, Objective, TeacherObjective, TokenSelector
from ..vit.needs import Needs
from ..vit.network import Network
from . import checks


@dataclass(frozen=True)
class Plan:
    """What a training step computes. Mappings are by the name of a teacher or an objective."""

    student: Network
    teachers: dict[str, Network]
    objectives: dict[str, Objective]
    selector: TokenSelector | None  # chooses patches of live teachers; None: they see everything
    student_needs: Needs  # what the student records
    live: dict[str, Needs]  # what each running teacher records in its supervising pass
    guides: dict[str, Needs]  # what one records in an extra pass on whole images, for the selector
    num_keep: dict[str, int | None]  # patches each teacher sees; None: all
    notes: dict[str, str]  # what each objective says of these networks
    masking: Masking | None = None  # hides patches from student and teachers
    student_keep: int | None = None  # patches the student sees; None: all
    stored: dict[str, Needs] = field(default_factory=dict)  # what is read of stored labels
    labels: dict[str, Layout] = field(default_factory=dict)  # what their records hold
    # At which temperature an objective reads stored logits; None: complete ones.
    temperatures: dict[str, float | None] = field(default_factory=dict)

    def reads(self, teacher: str) -> Needs:
        """Return what objectives read of a teacher, live or stored."""
        return self.live[teacher] if teacher in self.live else self.stored[teacher]


def make_plan(
    student: Network,
    teachers: Mapping[str, Network],
    objectives: Mapping[str, Objective],
    selector: TokenSelector | None = None,
    masking: Masking | None = None,
    labels: Mapping[str, Layout] | None = None,
) -> Plan:
    """Resolve what every network must compute.

    ``labels`` has the layout of the records of each teacher whose answers are stored.

    Raises:
        ConfigError: the combination is impossible, or part of it would silently have no effect.
    """
    if not objectives:
        raise ConfigError("there is no objective", fix=Add("ce"), field="objectives")
    student_needs, live = Needs(), {name: Needs() for name in teachers}
    for name, objective in objectives.items():
        teacher = checks.teacher_of(name, objective, teachers)
        student_needs |= checks.resolve(objective.student_needs(student), student, name)
        if isinstance(objective, TeacherObjective) and teacher is not None:
            needs = checks.resolve(objective.teacher_needs(teacher), teacher, name)
            live[objective.teacher] |= needs
        checks.check_objective(name, objective, student, teacher, masking)
    checks.check_teachers_read(live)
    checks.check_heads(student, objectives)
    labels = dict(labels or {})
    stored = {name: live.pop(name) for name in labels}
    checks.check_stored(labels, stored, selector, masking)
    num_keep: dict[str, int | None] = dict.fromkeys(teachers)
    student_keep = None
    if masking is not None:
        checks.check_masking(masking, student, teachers, objectives, live, selector)
        student_keep = masking.count(student.num_patches)
        num_keep = {name: masking.teacher_count(t.num_patches) for name, t in teachers.items()}
    guides: dict[str, Needs] = {}
    if selector is not None:
        kind = type(selector).__name__
        for name in checks.chosen_teachers(selector, teachers, live):
            teacher = teachers[name]
            selector.check(student, teacher)
            num_keep[name] = selector.count(teacher.num_patches)
            guides[name] = checks.resolve(selector.teacher_needs(teacher), teacher, kind)
        student_needs |= checks.resolve(selector.student_needs(student), student, kind)
    compared = num_keep if student_keep is None else dict.fromkeys(teachers, student_keep)
    notes = {name: _note(o, student, teachers, compared) for name, o in objectives.items()}
    return Plan(
        student=student,
        teachers=dict(teachers),
        objectives=dict(objectives),
        selector=selector,
        student_needs=student_needs,
        live=live,
        guides={name: needs for name, needs in guides.items() if needs},
        num_keep=num_keep,
        notes={name: note for name, note in notes.items() if note},
        masking=masking,
        student_keep=student_keep,
        stored=stored,
        labels=labels,
        temperatures=checks.stored_temperatures(labels, teachers, objectives),
    )


def _note(
    objective: Objective,
    student: Network,
    teachers: Mapping[str, Network],
    num_keep: Mapping[str, int | None],
) -> str:
    """Return the objective's own note, and notes on its patches, batches and schedule."""
    name = objective.teacher if isinstance(objective, TeacherObjective) else ""
    teacher, count = teachers.get(name), num_keep.get(name)
    parts = [objective.describe(student, teacher, count)]
    if teacher is not None and replace(objective.teacher_needs(teacher), logits=False):
        parts += _alignment(student, teacher, count)
    if objective.couples_images:
        parts.append(
            "compares the images of a micro-batch, so accumulation and the number of processes"
            " change it"
        )
    schedule = objective.schedule
    if schedule is not None:
        parts.append(
            f"weight {objective.weight:g} until {schedule.begin:.0%} of the run, {schedule.shape}"
            f" to {schedule.to:g} at {schedule.end:.0%}"
        )
    return "; ".join(part for part in parts if part)


def _alignment(student: Network, teacher: Network, num_keep: int | None) -> list[str]:
    """Say how patches of unequal networks meet: ``compared at the 98 of 196 patches both see``."""
    parts = []
    if num_keep is not None and num_keep < teacher.num_patches:
        parts.append(f"compared at the {num_keep} of {teacher.num_patches} patches both see")
    if student.walks and teacher.walks and student.grid != teacher.grid:
        of_student, of_teacher = (f"{n.grid[0]} x {n.grid[1]}" for n in (student, teacher))
        parts.append(f"the student's patches resampled from {of_student} to {of_teacher}")
    elif student.walks != teacher.walks:
        parts.append("the student's features resampled to the teacher's map by position")
    return parts
