"""A plan and its cost as a printed page."""

import textwrap

from ..distill.plan import Plan
from ..messages import format_bytes, format_count, format_table, plural
from ..vit.needs import Needs
from ..vit.network import Network
from .cost import Cost, vit_macs

_Rows = list[tuple[str, ...]]


def explain(plan: Plan, cost: Cost, num_images: int, epochs: int) -> str:
    """Write down what each network computes, its FLOPs an image, and those of the whole run.

    Args:
        plan: of the run.
        cost: its cost, as `cost_of` counts it.
        num_images: training images an epoch.
        epochs: of the run.
    """
    sections = [
        ["What each network computes", *format_table(_an_image(plan, cost))],
        _networks(plan),
        _memory(plan, cost),
        [
            f"The whole run, {plural(num_images, 'image')} x {plural(epochs, 'epoch')} (1"
            " multiply-accumulate = 2 FLOPs)",
            *format_table(_whole_run(plan, cost, num_images * epochs)),
        ],
        *_as_the_paper_counts(plan, num_images * epochs),
        _objectives(plan),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections)


def describe_needs(network: Network, needs: Needs, num_keep: int | None) -> str:
    """Say what a network computes: ``98 of 196 patches; 12 of 12 blocks; records logits``."""
    parts = []
    if network.walks:
        seen = network.num_patches if num_keep is None else num_keep
        parts.append(f"{seen} of {network.num_patches} patches")
        parts.append(f"{needs.num_blocks(network.depth)} of {network.depth} blocks")
    recorded = ["logits"] if needs.logits else []
    if needs.hidden:
        recorded.append(f"hidden states after block {_numbers(needs.hidden)}")
    if needs.features and not network.walks:
        recorded.append("the last feature map")
    elif needs.features:
        before = "features before its norm, which follows the pool"
        recorded.append("features after the final norm" if network.final_norm else before)
    if needs.attention:
        source = {"class": "class-token", "pool": "attention-pool", "mean": "mean"}
        of = source[network.attention_source or "mean"]
        recorded.append(f"{of} attention of block {_numbers(needs.attention)}")
        untrained = network.attention_source == "class" and not network.reads_class_token
        if untrained and network.depth - 1 in needs.attention:
            recorded[-1] += (
                " (whose class token its prediction does not read: that of an earlier block is"
                " trained)"
            )
    if needs.qkv:
        recorded.append(f"queries, keys and values of block {_numbers(needs.qkv)}")
    return "; ".join([*parts, "records " + " and ".join(recorded)])


def _numbers(blocks: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(blocks)))


def _against(plan: Plan) -> str:
    return "plain distillation" if plan.teachers else "plain training"


def _of(part: int, whole: int) -> str:
    return f"{part / whole:.0%} of {format_count(whole)}"


def _an_image(plan: Plan, cost: Cost) -> _Rows:
    """FLOPs an image, by network and objective."""
    student = plan.student
    rows: _Rows = [
        ("an image", "parameters", "FLOPs", f"against {_against(plan)}"),
        (
            "student, trained",
            format_count(student.num_parameters, ""),
            format_count(cost.student),
            _of(cost.student, cost.student_plain),
        ),
    ]
    if cost.stems:
        share = f"({cost.stems / cost.student:.0%} of the student)"
        rows.append(("of which the stems (patch embedding)", "", format_count(cost.stems), share))
    for name, teacher in plan.teachers.items():
        count, plain = cost.teachers[name], cost.teachers_plain[name]
        rows.append(
            (
                name,
                format_count(teacher.num_parameters, ""),
                format_count(count),
                _of(count, plain) if plain else "stored",
            )
        )
    for name, count in cost.objectives.items():
        if count or name in cost.adapters:
            added = cost.adapters.get(name, 0)
            size = format_count(added, "") if added else ""
            rows.append((f"{name}, its own part", size, format_count(count), ""))
    if plan.teachers:
        rows.append(("together", "", format_count(cost.step), _of(cost.step, cost.plain_kd)))
    return rows


def _networks(plan: Plan) -> list[str]:
    """What each network sees, runs and records."""
    student = plan.student
    lines = {"student": describe_needs(student, plan.student_needs, plan.student_keep)}
    for name, teacher in plan.teachers.items():
        if name in plan.stored:
            size = format_bytes(plan.labels[name].record_bytes)
            lines[name] = f"does not run; its labels are read, {size} an image"
            continue
        lines[name] = describe_needs(teacher, plan.live[name], plan.num_keep[name])
        if name in plan.guides:
            lines[name] += "; and once more on the whole image, to choose its patches"
    networks = {"student": student, **plan.teachers}
    return [
        line
        for name, text in lines.items()
        for line in _wrapped(f"{name}, {networks[name].architecture}: {text}")
    ]


def _memory(plan: Plan, cost: Cost) -> list[str]:
    trained = plan.student.num_parameters + sum(cost.adapters.values())
    return [
        "Training memory",
        f"  kept for the backward pass: {format_bytes(cost.activations)} an image in float32; the"
        f" student alone keeps {format_bytes(cost.activations_plain)}",
        f"  weights, gradients and AdamW's two moments: {format_bytes(16 * trained)}"
        f" ({format_count(trained, '').strip()} trained parameters)",
    ]


def _whole_run(plan: Plan, cost: Cost, num_images: int) -> _Rows:
    """FLOPs of ``num_images`` views, beside those of plain training."""

    def row(name: str, count: int, plain: int | None) -> tuple[str, ...]:
        other = "" if plain is None else format_count(plain * num_images)
        return name, format_count(count * num_images), other

    rows: _Rows = [
        ("", "this plan", _against(plan)),
        row("student", cost.student, cost.student_plain),
        *(row(name, cost.teachers[name], cost.teachers_plain[name]) for name in plan.teachers),
    ]
    own = sum(cost.objectives.values())
    if own:
        rows.append(row("objectives", own, None))
    if plan.teachers:
        rows.append(row("together", cost.step, cost.plain_kd))
    return rows


def _as_the_paper_counts(plan: Plan, num_images: int) -> list[list[str]]:
    """The cost of each teacher whose logits are read, as the MaskedKD paper counts it."""
    sections = []
    for name, needs in plan.live.items():
        teacher = plan.teachers[name]
        if not (teacher.walks and needs.logits):
            continue
        masked, whole = (
            vit_macs(teacher, keep) * num_images for keep in (plan.num_keep[name], None)
        )
        saved = (
            f" against {format_count(whole, 'MACs')} for plain distillation"
            f" ({masked / whole - 1:+.0%})"
        )
        sections.append(
            [
                f"The {name} as the MaskedKD paper counts it (blocks whole, all patches embedded)",
                f"  {format_count(masked, 'MACs')}{saved if masked < whole else ''}",
            ]
        )
    return sections


def _objectives(plan: Plan) -> list[str]:
    lines = ["What every loss weight multiplies"]
    for name, objective in plan.objectives.items():
        note = f" ({plan.notes[name]})" if name in plan.notes else ""
        lines += _wrapped(f"{objective.weight:g} x {name}: {objective.formula}{note}")
    return lines


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text,
        78,
        initial_indent="  ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
