"""A model card: what the README.md of an export says, as the Hugging Face hub reads it."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from .. import __version__
from ..data.model_input import input_spec_of
from ..errors import UserError
from ..explain.ahead import forecast
from ..messages import format_count, format_duration, plural
from ..recipes.config import Recipe
from ..recipes.convert import to_dict
from ..recipes.yaml import load_recipe
from ..runs.folder import ENVIRONMENT
from ..runs.identity import RECIPE, SUMMARY, read_record
from ..vit.flops import forward_flops
from ..weights.origin import ancestors

CARD = "README.md"


def model_card(model: nn.Module, weights: Path, name: str, origin: Mapping[str, Any]) -> str:
    """Write the card of the network in the folder ``weights``: ``best/`` or ``last/`` of a run, of
    which the card then says the data, the method, the cost and the accuracy.
    """
    run = weights.resolve().parent
    recipe = load_recipe(run / RECIPE) if (run / RECIPE).is_file() else None
    summary = read_record(run / SUMMARY) or {}
    scores = dict(summary.get("scores") or {})
    if weights.name == "best" and summary.get("best_top1") is not None:
        scores = {"top1": summary["best_top1"]}
    classes, size = int(model.num_classes), input_spec_of(model).image_size  # type: ignore[arg-type]
    parameters = format_count(sum(p.numel() for p in model.parameters()), "").strip()
    flops = format_count(forward_flops(model, size))
    kind = model.pretrained_cfg["architecture"]  # type: ignore[index]
    task = f"image-{'classification' if classes else 'feature-extraction'}"
    data = "" if recipe is None else _data_name(recipe.data.dir)
    place = f"{'hf-hub' if '/' in name else 'local-dir'}:{name}"
    load = f'import timm\n\nmodel = timm.create_model("{place}", pretrained=True)'
    sections = [
        *_front_matter(name, task, data, scores),
        f"# {name}",
        f"`{kind}`: {parameters} parameters, {flops} an image of {size[0]} x {size[1]} pixels,"
        f" {plural(classes, 'logit')}. Trained with vitdistill {__version__}.",
        f"```python\n{load}\n```",
        *_origins(origin),
        *(() if recipe is None else _training(recipe, data, summary, run)),
        *_results(scores, summary.get("teachers") or {}),
    ]
    return "\n\n".join(sections) + "\n"


def _data_name(location: str) -> str:
    """Return what others may know of where the images are: not the folders of this machine."""
    return location if location.startswith(("hfds/", "torchvision/")) else Path(location).name


def _front_matter(name: str, task: str, data: str, scores: Mapping[str, Any]) -> list[str]:
    tags = ["timm", "vitdistill", "knowledge-distillation", task]
    lines = ["library_name: timm", f"pipeline_tag: {task}", f"tags: {json.dumps(tags)}"]
    lines.append("# license: yours to choose, see 'Where it comes from'")
    if data.startswith("hfds/"):
        lines.append(f"datasets: {json.dumps([data.removeprefix('hfds/')])}")
    if data and "top1" in scores:
        found = {
            "task": {"type": task},
            "dataset": {"name": data, "type": data},
            "metrics": [{"type": "accuracy", "value": round(scores["top1"], 5)}],
        }
        # JSON is YAML.
        lines.append(f"model-index: {json.dumps([{'name': name, 'results': [found]}])}")
    return ["\n".join(["---", *lines, "---"])]


def _origins(origin: Mapping[str, Any]) -> list[str]:
    """Name every network that the weights come from, and what is known of its licence."""
    rows = [
        (
            role,
            f"`{found['model']}`" + (f", {found['weights']}" if "weights" in found else ""),
            found.get("license", "unknown") + (f" ({found['url']})" if "url" in found else ""),
            str(found.get("network_sha256", found.get("weights_sha256", "")))[:16],
        )
        for role, found in ancestors(origin)
    ]
    said = "No licence is claimed for these weights: fill in `license` above."
    if not rows:
        return ["## Where it comes from", f"Trained from random weights, without a teacher. {said}"]
    said += " Whether those below bind a network that learnt from them is for you to find out."
    table = _table(("network", "weights", "licence", "sha256"), *rows)
    return ["## Where it comes from", said, table]


def _training(recipe: Recipe, data: str, summary: Mapping[str, Any], run: Path) -> list[str]:
    """Say the data, the method and the cost of a run."""
    augment = to_dict(recipe.data.augment)
    chosen = {**recipe.objectives, "selector": recipe.selector, "masking": recipe.masking}
    methods = []
    for name, method in chosen.items():
        if method is not None:
            settings = {key: value for key, value in to_dict(method).items() if value}
            methods.append(f"- {name}: {_settings(settings)}")
    optim, train = recipe.optim, recipe.train
    loop = (
        f"{plural(train.epochs, 'epoch')} of batches of {train.batch_size}; {optim.opt}, peak"
        f" learning rate {optim.lr:g}, weight decay {optim.weight_decay:g}; seed {train.seed}."
    )
    cost = []
    with suppress(UserError):  # images and teachers may be gone
        cost.append(f"{format_count(forecast(recipe)[''].flops)} in all")
    if "seconds" in summary:
        took = f"{format_duration(summary['seconds'])}, processes: {summary['processes']}"
        last = list((read_record(run / ENVIRONMENT) or {"0": {}}).values())[-1]
        device = last.get("device", "cpu")
        if device == "cpu":  # a run of before has no device, and its GPUs
            device = ", ".join(dict.fromkeys(last.get("gpus") or [last.get("processor", "")]))
        cost.append(f"{took} ({device})")
    return [
        "## Data",
        f"{data or 'not named'}; views: {_settings(augment)}.",
        "## Method",
        "\n".join(methods),
        loop,
        "## Cost",
        (", ".join(cost) or "not known") + ".",
    ]


def _results(scores: Mapping[str, Any], teachers: Mapping[str, float]) -> list[str]:
    """Tabulate what was measured on the validation images."""
    shares = {f"{name} (a few hundred images)": value for name, value in teachers.items()}
    rows = [
        ("student", key, f"{value:.4f}") for key, value in scores.items() if key != "num_samples"
    ]
    rows += [(name, "top1", f"{value:.4f}") for name, value in shares.items()]
    return ["## Results", _table(("network", "validation", ""), *rows)] if rows else []


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _table(*rows: tuple[str, ...]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])
