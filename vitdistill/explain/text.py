"""A plan and its cost as a printed page."""

import textwrap

from ..distill.plan import Plan
from ..messages import format_bytes, format_count, format_table, plural
from ..vit.needs import Needs
from ..vit.network import Network
from .cost import Cost, vit_macs


def explain(
    plan: Plan, cost: Cost, num_images: int, epochs: int, image_side: int = 0, kinds: str = ""
) -> str:
    """Write down what each network computes, its FLOPs an image, and those of the whole run.

    ``num_images`` are an epoch's, ``image_side`` is the shorter side of a typical one, pixels (0:
    unknown), ``kinds`` what an epoch shows of labelled and unlabelled ones, see `Order.describe`.
    """
    run = f"{plural(num_images, 'image')} x {plural(epochs, 'epoch')}"
    num_shown = num_images * epochs
    skips = cost.student < cost.student_plain or any(
        cost.teachers[name] < plain for name, plain in cost.teachers_plain.items()
    )
    sections = [
        [
            "What each network computes for a training image",
            *format_table(_costs(plan, cost, num_shown)),
            f"  {_plain(plan)}: every network whole, on whole images",
            *(["  a share below 100%: what nothing reads is not computed"] if skips else []),
            f"  whole run: {run} (1 multiply-accumulate = 2 FLOPs)",
            *([f"  {kinds}"] if kinds else []),
        ],
        _networks(plan, image_side),
        _memory(plan, cost),
        *_as_the_paper_counts(plan, num_shown),
        _objectives(plan),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections)


def describe_needs(network: Network, needs: Needs, num_keep: int | None) -> str:
    """Say what a network computes: ``98 of 196 patches; 12 of 12 blocks; records logits``."""
    parts, recorded = [], ["logits"] if needs.logits else []
    if network.walks:
        seen = network.num_patches if num_keep is None else num_keep
        parts.append(f"{seen} of {network.num_patches} patches")
        parts.append(f"{needs.num_blocks(network.depth)} of {network.depth} blocks")
    if needs.hidden:
        recorded.append(f"hidden states after block {_numbers(needs.hidden)}")
    if needs.features and not network.walks:
        token = "the class token and " if network.has_class_token else ""
        recorded.append(f"{token}the last feature map")
    elif needs.features:
        before = ", before its norm, which follows the pool"
        recorded.append("final features" + ("" if network.final_norm else before))
    if needs.attention:
        source = network.attention_source or "mean"
        of = {"class": "class-token", "pool": "attention-pool", "mean": "mean"}[source]
        recorded.append(f"{of} attention of block {_numbers(needs.attention)}")
        # Of a network that pools its patches, the last block's class token is never trained.
        last = network.depth - 1 in needs.attention
        if source == "class" and not network.reads_class_token and last:
            recorded[-1] += " (whose class token its prediction does not read: take an earlier one)"
    if needs.qkv:
        recorded.append(f"queries, keys and values of block {_numbers(needs.qkv)}")
    return "; ".join([*parts, "records " + " and ".join(recorded)])


def _trained(plan: Plan) -> str:
    """Name the network that is trained; without a teacher it is nobody's student."""
    return "student" if plan.teachers else "network"


def _plain(plan: Plan) -> str:
    """Name what the cost of a plan is compared with."""
    return "plain KD" if plan.teachers else "plain training"


def _numbers(blocks: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(blocks)))


def _costs(plan: Plan, cost: Cost, num_shown: int) -> list[tuple[str, ...]]:
    """FLOPs by network and objective, beside what they would be without this plan."""

    def row(name: str, parameters: int, flops: int, plain: int | None) -> tuple[str, ...]:
        size = format_count(parameters, "") if parameters else ""
        if plain == 0 and name not in stored:  # it may compute anything anywhere
            return name, size, "not counted", "", ""
        share = f"{flops / plain:.0%} of {format_count(plain)}" if plain else ""
        return name, size, format_count(flops), share, format_count(flops * num_shown)

    stored = [f"{name} (stored)" for name in plan.stored]
    rows = [
        ("", "parameters", "FLOPs", f"share of {_plain(plan)}", "whole run"),
        row(_trained(plan), plan.student.num_parameters, cost.student, cost.student_plain),
    ]
    for name, teacher in plan.teachers.items():
        shown = f"{name} (stored)" if name in plan.stored else name
        flops, plain = cost.teachers[name], cost.teachers_plain[name]
        rows.append(row(shown, teacher.num_parameters, flops, plain))
    for name, flops in cost.objectives.items():
        if flops or name in cost.adapters:
            rows.append(row(f"{name}, its own part", cost.adapters.get(name, 0), flops, None))
    if plan.teachers:
        rows.append(row("together", 0, cost.step, cost.plain_kd))
    return rows


def _networks(plan: Plan, image_side: int) -> list[str]:
    """What each network sees, runs and records."""
    student = plan.student
    lines = {_trained(plan): describe_needs(student, plan.student_needs, plan.student_keep)}
    for name, teacher in plan.teachers.items():
        if name in plan.stored:
            size = format_bytes(plan.labels[name].record_bytes)
            lines[name] = f"does not run; its labels are read, {size} an image"
            continue
        lines[name] = describe_needs(teacher, plan.live[name], plan.num_keep[name])
        if name in plan.guides:
            lines[name] += "; and once more on the whole image, to choose its patches"
    found = []
    for name, network in {_trained(plan): student, **plan.teachers}.items():
        height, width = network.image_size
        size = f"{height} x {width} pixels"
        if 0 < 2 * image_side < min(height, width) and name not in plan.stored:
            times = f"{height * width / image_side**2:.0f} times the pixels, no detail more"
            field = f"{'student' if network is student else f'teachers.{name}'}.image_size"
            size += f" (images of {image_side} are enlarged to that: {times}; {field} sets it)"
        found += _wrapped(f"{name}, {network.architecture}, {size}: {lines[name]}")
    return found


def _memory(plan: Plan, cost: Cost) -> list[str]:
    trained = plan.student.num_parameters + sum(cost.adapters.values())
    kept, alone = format_bytes(cost.activations), format_bytes(cost.activations_plain)
    size, count = format_bytes(16 * trained), format_count(trained, "").strip()
    return [
        "Training memory",
        f"  kept for the backward pass: {kept} an image; as timm trains it: {alone}",
        f"  weights, gradients and AdamW's two moments: {size} ({count} parameters)",
    ]


def _as_the_paper_counts(plan: Plan, num_shown: int) -> list[list[str]]:
    """The cost of each teacher whose logits are read, as the MaskedKD paper counts it."""
    sections = []
    for name, needs in plan.live.items():
        teacher, keep = plan.teachers[name], plan.num_keep[name]
        if plan.selector is None or not (teacher.walks and needs.logits):
            continue
        masked, whole = (vit_macs(teacher, count) * num_shown for count in (keep, None))
        saved = f" against {format_count(whole, 'MACs')} for plain distillation"
        saved += f" ({masked / whole - 1:+.0%})"
        heading = f"The {name} as the MaskedKD paper counts it (blocks whole, all patches embedded)"
        line = f"  {format_count(masked, 'MACs')}{saved if masked < whole else ''}"
        sections.append([heading, line])
    return sections


def _objectives(plan: Plan) -> list[str]:
    lines = ["What every loss weight multiplies"]
    for name, objective in plan.objectives.items():
        note = f" ({plan.notes[name]})" if name in plan.notes else ""
        lines += _wrapped(f"{objective.weight:g} x {name}: {objective.formula}{note}")
    return lines


def _wrapped(text: str) -> list[str]:
    indents = {"initial_indent": "  ", "subsequent_indent": "    "}
    return textwrap.wrap(text, 78, break_on_hyphens=False, **indents)  # type: ignore[arg-type]
