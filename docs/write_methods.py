"""Write docs/methods.md: what every method reads, costs and is for (``make docs``).

All of it comes from the code: the table `METHODS`, the classes' docstrings and class variables, and
FLOPs and bytes counted on networks without weights. A new method needs nothing here.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import cast

import timm
import torch
from torch import nn

from vitdistill.distill.plan import Plan, make_plan
from vitdistill.explain import cost
from vitdistill.explain.text import describe_needs
from vitdistill.messages import format_bytes, format_count
from vitdistill.methods import METHODS, method_class
from vitdistill.methods.base import (
    Masking,
    Objective,
    TeacherObjective,
    TokenSelector,
    WeightSchedule,
)
from vitdistill.methods.cross_entropy import CrossEntropy
from vitdistill.methods.kd import SoftKD
from vitdistill.option import options_of
from vitdistill.vit.families import describe_network
from vitdistill.vit.flops import forward_flops, training_flops
from vitdistill.vit.needs import Needs
from vitdistill.vit.network import Network

PAGE = Path(__file__).with_name("methods.md")
STUDENT, TEACHER = "deit_tiny_patch16_224", "deit_small_patch16_224"
SIZE = (224, 224)
RATES = (0.5, 0.25)
MASK_RATES = (0.75, 0.9)
ADAMW = 16  # bytes a trained parameter: weight, gradient and two moments
COMMON = (Objective, TeacherObjective, TokenSelector, Masking)
Method = type[Objective] | type[TokenSelector] | type[Masking]

INTRO = """# Methods

<!-- Written by `make docs` (docs/write_methods.py) from the code: do not edit. -->

What a run learns from and what that costs are separate choices. **Objectives** are losses: any number of them add up, each with its
weight. At most one **patch selector** decides which patches of each image a teacher sees. A **masking** in its place hides patches from the
student too, for pre-training without labels. Any objective combines with any of them unless the plan refuses; the tables below say what
each is for and what it costs.

```bash
# add objectives to a recipe; a selector replaces the recipe's own
vitdistill explain kd --teacher-model {teacher} --with {feature} {selector}
# one objective in place of another, with its weight, and the fraction of patches the teacher sees
vitdistill explain kd --teacher-model {teacher} --without kd --with {logit} {selector} \\
  --set objectives.{logit}.weight=2 --keep-rate 0.25
# a second teacher, named after the colon
vitdistill explain kd --teacher-model {teacher} --with kd:second --set teachers.second.model=deit_base_patch16_224
# a weight that falls to 0 over the second half of the run
vitdistill explain kd --teacher-model {teacher} --set objectives.kd.schedule='{{to: 0, begin: 0.5}}'
```

Each line prints what a run with these networks computes and costs. `vitdistill train` takes the same words and, given images
(`--data-dir`) and the teacher's weights, runs it.

**Couples images** means that the loss of an image depends on the others in its micro-batch, so `--accumulate` and the number of processes
change what is learned, and small micro-batches weaken it. All other losses are means over images, whatever shares a batch.

The numbers are for one pair, DeiT-Ti from DeiT-S (`{student}` from `{teacher}`, {size} pixels, {classes} classes), in
float32, with each method's defaults. An objective is counted beside `ce`, a loss of masked pre-training beside the methods its paragraph
names, a selector with `ce` and `kd`, a masking with `mae` and `dmae`.

- **teacher**: FLOPs of its forward pass, in percent of a whole pass ({teacher_flops} an image). It can be less than 100 % without a
  selector: blocks nobody reads do not run, and the last one computes only the tokens that are read.
- **own part**: FLOPs an image of the loss itself, forward and backward. Matrix products are counted, element-wise work is not.
- **step**: FLOPs of the whole training step, in percent of plain distillation by the networks' own forward passes ({kd_flops} an image).
- **memory**: bytes kept an image for the backward pass, on top of training with the labels alone ({ce_bytes}), and the weights, gradients
  and AdamW moments of a trainable adapter, once. Counted in micro-batches of 64, which matters to methods that couple images and to `mae`.
"""


@dataclass(frozen=True)
class Pair:
    """The two networks everything is counted on, without weights."""

    models: Mapping[str, nn.Module]
    student: Network
    teacher: Network

    def plan(
        self,
        objectives: Mapping[str, Objective],
        selector: TokenSelector | None = None,
        masking: Masking | None = None,
    ) -> Plan:
        """Plan these methods; a teacher whose logits nobody reads has no classifier."""
        reading = [
            objective
            for objective in objectives.values()
            if isinstance(objective, TeacherObjective)
        ]
        headless = not any(objective.teacher_needs(self.teacher).logits for objective in reading)
        teacher = replace(self.teacher, num_classes=0) if headless else self.teacher
        return make_plan(
            self.student, {"teacher": teacher} if reading else {}, objectives, selector, masking
        )

    def count(
        self,
        objectives: Mapping[str, Objective],
        selector: TokenSelector | None = None,
        masking: Masking | None = None,
    ) -> cost.Cost:
        """Count what these methods cost together."""
        plan = self.plan(objectives, selector, masking)
        with counting_once():
            return cost.cost_of(
                plan, self.models["student"], {name: self.models[name] for name in plan.teachers}
            )


@cache
def the_pair() -> Pair:
    """Return DeiT-Ti and DeiT-S."""
    with torch.device("meta"):
        student, teacher = timm.create_model(STUDENT), timm.create_model(TEACHER)
    networks = (
        describe_network(student, "student", STUDENT, SIZE),
        describe_network(teacher, "teacher", TEACHER, SIZE),
    )
    return Pair({"student": student, "teacher": teacher}, *networks)


@cache
def labels_alone() -> cost.Cost:
    """Count what the student costs without a teacher."""
    return the_pair().count({"ce": CrossEntropy()})


ONCE = cache(forward_flops), cache(training_flops)


@contextmanager
def counting_once() -> Iterator[None]:
    """Count passes that many plans share once; do not read ``activations_plain`` of a `Cost`."""
    functions = cost.forward_flops, cost.training_flops
    cost.forward_flops, cost.training_flops = ONCE
    try:
        yield
    finally:
        cost.forward_flops, cost.training_flops = functions


def plain_kd() -> int:
    """Count FLOPs an image of plain distillation by the networks' own forward passes."""
    pair = the_pair()
    size = pair.student.image_size
    return ONCE[1](pair.models["student"], size) + ONCE[0](pair.models["teacher"], size)


# --- cells ---------------------------------------------------------------------------------------


def prose(text: str) -> str:
    """Turn a docstring's sentence into Markdown."""
    parts = " ".join(text.split()).replace("``", "`").split("`")
    parts[::2] = [re.sub(r"([*<])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def paper(cls: Method) -> str:
    """Return whose method it is, with links."""
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", cls.paper)


def table(rows: list[list[str]]) -> str:
    """Write a Markdown table; the first row is the heading."""
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def reads(network: Network, needs: Needs, *more: str) -> str:
    """Say what a method records of a network, and what else it reads."""
    words = (
        [describe_needs(network, needs.resolve(network.depth), None).rpartition("records ")[2]]
        if needs
        else []
    )
    return ", ".join((*words, *more)) or "nothing"


def percent(part: int, whole: int) -> str:
    """Write a share in percent, without decimals."""
    return f"{part / whole:.0%}".replace("%", " %")


def amount(number: int, unit: str, sign: str = "") -> str:
    """Write a count with its unit, or 0."""
    return f"{sign}{format_count(number, unit)}" if number else "0"


def name_cell(name: str, couples: bool = False) -> str:
    """Write a method's name as a link to its paragraph."""
    return f"[`{name}`](#{name})" + (" (couples images)" if couples else "")


# --- one method ----------------------------------------------------------------------------------


def beside(name: str, cls: type[Objective]) -> tuple[dict[str, Objective], Masking | None]:
    """Return an objective with the methods it is counted beside."""
    objectives: dict[str, Objective] = {} if cls.goes_with else {"ce": CrossEntropy()}
    masking = None
    for other in cls.goes_with:
        method = method_class(other)()
        if isinstance(method, Objective):
            objectives[other] = method
        else:
            masking = cast(Masking, method)
    return {**objectives, name: cls()}, masking


def objective_row(name: str, cls: type[Objective]) -> list[str]:
    """Return the row of an objective."""
    pair, objective = the_pair(), cls()
    objectives, masking = beside(name, cls)
    found = labels_alone() if cls is CrossEntropy else pair.count(objectives, masking=masking)
    of_teacher = found.teachers.get("teacher", 0)
    added, adapter = found.activations - labels_alone().activations, found.adapters.get(name, 0)
    return [
        name_cell(name, objective.couples_images),
        percent(of_teacher, found.teachers_plain["teacher"]) if of_teacher else "none",
        amount(found.objectives[name], "FLOPs"),
        percent(found.step, plain_kd()),
        (amount(added, "B", "+") if added >= 0 else amount(-added, "B", "-"))
        + (f", adapter {amount(ADAMW * adapter, 'B')}" if adapter else ""),
        prose(objective.use_when),
    ]


def selector_row(name: str, cls: type[TokenSelector]) -> list[str]:
    """Return the row of a selector, at each of `RATES`."""
    counts = [
        the_pair().count({"ce": CrossEntropy(), "kd": SoftKD()}, cls(keep_rate=rate))
        for rate in RATES
    ]
    return [
        name_cell(name),
        " / ".join(
            percent(found.teachers["teacher"], found.teachers_plain["teacher"]) for found in counts
        ),
        " / ".join(percent(found.step, plain_kd()) for found in counts),
        amount(counts[0].activations - labels_alone().activations, "B", "+"),
        prose(cls.use_when),
    ]


def masking_row(name: str, cls: type[Masking]) -> list[str]:
    """Return the row of a masking, at each of `MASK_RATES`."""
    objectives = {other: cast(Objective, method_class(other)()) for other in ("mae", "dmae")}
    counts = [the_pair().count(objectives, masking=cls(mask_rate=rate)) for rate in MASK_RATES]  # type: ignore[call-arg]
    return [
        name_cell(name),
        " / ".join(percent(found.student, found.student_plain) for found in counts),
        " / ".join(
            percent(found.teachers["teacher"], found.teachers_plain["teacher"]) for found in counts
        ),
        " / ".join(percent(found.step, plain_kd()) for found in counts),
        prose(cls.use_when),
    ]


def paragraph(name: str, cls: Method) -> str:
    """Write a method's description, formula, and the fields it does not share with others."""
    lines = [
        f"### `{name}`",
        "",
        f"{paper(cls)}. {reading(cls)}".strip() + f" In Python: `{cls.__name__}`.",
        "",
    ]
    lines.append("\n\n".join(prose(part) for part in description(cls)))
    if issubclass(cls, Objective):
        lines += ["", f"Loss: `{cls.formula}`."]
        objectives, masking = beside(name, cls)
        lines[-1] += (
            f" Goes with {' and '.join(name_cell(other) for other in cls.goes_with)}."
            if cls.goes_with
            else ""
        )
        note = the_pair().plan(objectives, masking=masking).notes.get(name)
        lines += ["", f"Of the pair above, `explain` says: {prose(note)}."] if note else []
    shared = {field.name for base in COMMON if issubclass(cls, base) for field in fields(base)}
    return "\n".join([*lines, "", *(field_list(cls, shared) or ["No fields of its own."])])


def reading(cls: Method) -> str:
    """Say what a method reads of student and teacher; nothing of a masking, which reads neither."""
    if issubclass(cls, Masking):
        return ""
    pair, method, more = the_pair(), cls(), []
    if isinstance(method, Objective) and method.reads_labels:
        more = ["labels"]
    if isinstance(method, TokenSelector) and method.reads_noise:
        more = ["random numbers"]
    ours = reads(pair.student, method.student_needs(pair.student), *more)
    needs = method.teacher_needs(pair.teacher)
    whole = ", on the whole image" if needs and isinstance(method, TokenSelector) else ""
    its = reads(pair.teacher, needs)
    return f"It reads, of the student: {ours}; of the teacher: {its}{whole}."


def description(cls: type) -> list[str]:
    """Return the paragraphs of a docstring that precede its sections."""
    text = re.split(
        r"^(?:Args|Attributes|Source|Example|Raises):",
        inspect.getdoc(cls) or "",
        maxsplit=1,
        flags=re.MULTILINE,
    )[0]
    return [part for part in text.split("\n\n") if part.strip()]


def field_list(cls: type, without: set[str] | frozenset[str] = frozenset()) -> list[str]:
    """Write one line a field: name, default, meaning."""
    shown = [field for field in fields(cls) if field.name not in without]
    return [
        f"- `{field.name}` ({default(cls, field.name)}): {prose(meaning(cls, field.name))}"
        for field in shown
    ]


def default(cls: type, name: str) -> str:
    """Return a field's default as YAML writes it."""
    (field,) = (field for field in fields(cls) if field.name == name)
    if field.default is not MISSING:
        value = field.default
    elif field.default_factory is not MISSING:
        value = field.default_factory()
    else:
        return "required"
    return f"`{value if isinstance(value, str) else json.dumps(value, default=asdict)}`"


def meaning(cls: type, name: str) -> str:
    """Return the help of a field, with its bounds."""
    about = options_of(cls)[name]
    bounds = about.describe_bounds()
    return f"{about.help} ({bounds})" if bounds else about.help


# --- the page ------------------------------------------------------------------------------------


def groups() -> tuple[list[str], list[str], list[str], list[str], list[str]]:
    """Group methods: losses of logits, of features, of pre-training, selectors, maskings."""
    pair = the_pair()
    logits: list[str] = []
    features: list[str] = []
    pretraining: list[str] = []
    selectors: list[str] = []
    maskings: list[str] = []
    for name in METHODS:
        cls = method_class(name)
        if issubclass(cls, TokenSelector):
            selectors.append(name)
        elif issubclass(cls, Masking):
            maskings.append(name)
        elif cls.goes_with:
            pretraining.append(name)
        else:
            needs = cls().student_needs(pair.student) | cls().teacher_needs(pair.teacher)
            (features if replace(needs, logits=False) else logits).append(name)
    return logits, features, pretraining, selectors, maskings


def introduction() -> str:
    """Write what the page is about, and how its numbers are counted."""
    pair, (logits, features, _, selectors, _) = the_pair(), groups()
    return INTRO.format(
        student=STUDENT,
        teacher=TEACHER,
        logit=next(
            name
            for name in logits
            if issubclass(method_class(name), TeacherObjective) and method_class(name) is not SoftKD
        ),
        feature=features[0],
        selector=selectors[0],
        size=pair.student.image_size[0],
        classes=pair.student.num_classes,
        teacher_flops=format_count(ONCE[0](pair.models["teacher"], pair.teacher.image_size)),
        kd_flops=format_count(plain_kd()),
        ce_bytes=format_bytes(labels_alone().activations),
    )


def loss_table(heading: str, names: list[str]) -> str:
    """Write a section of objectives."""
    head = ["method", "teacher", "own part", "step", "memory an image", "use it"]
    return f"## {heading}\n\n{table([head, *(objective_row(name, cast(type[Objective], method_class(name))) for name in names)])}\n"


def selector_table(heading: str, names: list[str]) -> str:
    """Write the section of selectors."""
    rates = " / ".join(percent(round(rate * 100), 100) for rate in RATES)
    head = ["method", f"teacher at {rates}", f"step at {rates}", "memory an image", "use it"]
    return f"## {heading}\n\n{table([head, *(selector_row(name, cast(type[TokenSelector], method_class(name))) for name in names)])}\n"


def masking_table(heading: str, names: list[str]) -> str:
    """Write the section of maskings."""
    rates = " / ".join(percent(round(rate * 100), 100) for rate in MASK_RATES)
    head = ["method", f"student at {rates} masked", "teacher", "step", "use it"]
    return f"## {heading}\n\n{table([head, *(masking_row(name, cast(type[Masking], method_class(name))) for name in names)])}\n"


def one_by_one(heading: str) -> str:
    """Write what all methods have in common, and a paragraph on each."""
    parts = [
        f"## {heading}\n",
        (
            "Fields are set with `--set objectives.NAME.FIELD=VALUE`, `--set selector.FIELD=VALUE`"
            " and `--set masking.FIELD=VALUE`, or in the recipe's YAML.\n"
        ),
        "Every objective has:\n",
        *field_list(TeacherObjective),
        "\nA schedule has:\n",
        *field_list(WeightSchedule),
        "\nEvery selector has:\n",
        *field_list(TokenSelector),
        *(f"\n{paragraph(name, method_class(name))}" for group in groups() for name in group),
    ]
    return "\n".join(parts) + "\n"


def sections() -> list[Callable[[], str]]:
    """Return the writers of the page's sections, in order."""
    logits, features, pretraining, selectors, maskings = groups()
    return [
        introduction,
        partial(loss_table, "Logit losses", logits),
        partial(loss_table, "Feature losses", features),
        partial(loss_table, "Losses of masked pre-training", pretraining),
        partial(selector_table, "Patch selectors", selectors),
        partial(masking_table, "Maskings", maskings),
        partial(one_by_one, "One by one"),
    ]


if __name__ == "__main__":
    PAGE.write_text("\n".join(write() for write in sections()), encoding="utf-8")
