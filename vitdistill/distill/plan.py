"""The plan: what each network must compute, resolved once from methods, networks and teachers."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import Add, ConfigError
from ..labels.layout import Layout
from ..methods.base import Masking, Objective, TeacherObjective, TokenSelector
from ..vit.needs import Needs
from ..vit.network import Network
from . import checks


@dataclass(frozen=True)
class Plan:
    """What a training step computes.

    Attributes:
        student: its description.
        teachers: descriptions by name.
        objectives: losses by name.
        selector: chooses the patches of live teachers; None: teachers see everything.
        student_needs: what the student records.
        live: what each running teacher records in its supervising pass.
        guides: what a teacher records in an extra pass on the whole image, for the selector.
        num_keep: patches each teacher sees; None: all.
        notes: what each objective says of itself between these networks, if anything.
        masking: hides patches from student and teachers; None: nothing is hidden.
        student_keep: patches the student sees; None: all.
        stored: what is read of each teacher whose answers are stored.
        labels: what the records of each stored teacher hold.
        temperatures: at which each objective reads a stored teacher's logits; None: complete ones.
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
        """Return what is read of a teacher, live or stored."""
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

    ``labels`` says what the records hold, for each teacher whose answers are stored.

    Raises:
        ConfigError: the combination is impossible, or part of it would silently have no effect.
    """
    if not objectives:
        raise ConfigError("there is no objective", fix=Add("ce"), field="objectives")
    student_needs, live = Needs(), {name: Needs() for name in teachers}
    for name, objective in objectives.items():
        checks.check_objective(name, objective, student, teachers, masking)
        student_needs |= checks.resolve(objective.student_needs(student), student, name)
        if isinstance(objective, TeacherObjective):
            teacher = teachers[objective.teacher]
            needs = checks.resolve(objective.teacher_needs(teacher), teacher, name)
            live[objective.teacher] |= needs
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
    """Return what the objective says of itself, and what is true of its kind."""
    name = objective.teacher if isinstance(objective, TeacherObjective) else ""
    parts = [objective.describe(student, teachers.get(name), num_keep.get(name))]
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
