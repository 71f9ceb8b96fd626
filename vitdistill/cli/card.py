"""A model card: what the README.md of an export says, as the Hugging Face hub reads it."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from timm.models import model_entrypoint
from torch import nn

from .. import __version__
from ..data.model_input import input_spec_of
from ..errors import UserError
from ..explain.ahead import forecast
from ..messages import format_count, format_duration, listed, plural
from ..recipes.config import Recipe
from ..recipes.convert import to_dict
from ..recipes.yaml import load_recipe
from ..runs.folder import ENVIRONMENT
from ..runs.identity import RECIPE, SUMMARY, read_record
from ..runs.preflight import NUM_IMAGES
from ..vit.flops import forward_flops
from ..weights.create import class_names
from ..weights.folder import Saved
from ..weights.origin import Origin, ancestors
from ..weights.outside import is_outside

CARD = "README.md"
METHOD = {"method": None, "teacher": "teacher", "head": "auto"}
"""Settings of a method not to list at these values; None: at any value."""


def model_card(model: nn.Module, weights: Path, name: str, saved: Saved, origin: Origin) -> str:
    """Return the card of the network in the folder ``weights``; of a run's ``best/`` or ``last/``,
    with its data, method, cost and accuracy.
    """
    run = weights.resolve().parent
    recipe = load_recipe(run / RECIPE) if (run / RECIPE).is_file() else None
    summary = read_record(run / SUMMARY) or {}
    scores = dict(summary.get("scores") or {})
    count, chosen = scores.pop("num_samples", None), weights.name == "best"
    if chosen and summary.get("best_top1") is not None:
        scores = {"top1": summary["best_top1"]}
    names, size = class_names(model) or (), input_spec_of(model).image_size
    classes = int(model.num_classes)  # type: ignore[arg-type]
    parameters = format_count(sum(p.numel() for p in model.parameters()), "").strip()
    flops = format_count(forward_flops(model, size))
    task = f"image-{'classification' if classes else 'feature-extraction'}"
    data = "" if recipe is None else _data_name(recipe.data.dir)
    shown = data
    if recipe is not None and recipe.data.unlabelled is not None:
        shown += f", and without labels {_data_name(recipe.data.unlabelled)}"
    built = _settings({k: v for k, v in saved.args.items() if k != "num_classes"})
    sections = [
        *_front_matter(name, task, data, scores),
        f"# {name}",
        f"`{saved.architecture}`{f' with {built}' if built else ''}: {parameters} parameters,"
        f" {flops} an image of {size[0]} x {size[1]} pixels, {plural(classes, 'logit')}. Written by"
        f" vitdistill {__version__}.",
        *([f"Classes, in the order of the logits: {listed(names, 100)}."] if names else []),
        f"```python\n{_code(saved.architecture, name)}\n```",
        *_origins(origin, shown),
        *(() if recipe is None else _training(recipe, shown, summary, run)),
        *_results(scores, summary.get("teachers") or {}, count, chosen),
    ]
    return "\n\n".join(sections) + "\n"


def loading(architecture: str, place: str, scheme: str = "local-dir") -> tuple[str, str]:
    """Return the call that loads an export, and the module to import first."""
    if is_outside(architecture):
        return f"vitdistill.create_model({place!r})", "vitdistill"
    file = model_entrypoint(architecture.partition(".")[0]).__module__
    call = f"timm.create_model({f'{scheme}:{place}'!r}, pretrained=True)"
    return call, "" if file.startswith("timm.") else file


def _code(architecture: str, name: str) -> str:
    call, module = loading(architecture, name, "hf-hub" if "/" in name else "local-dir")
    imports = "\n".join(f"import {needed}" for needed in ("timm", module) if needed)
    config = "timm.data.resolve_model_data_config(model)"
    return (
        f"{imports}\n\nmodel = {call}.eval()\n"
        f"transform = timm.data.create_transform(**{config}, is_training=False)"
    )


def _data_name(location: str) -> str:
    """Return where the images are, without the folders of this machine."""
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


def _origins(origin: Origin, data: str) -> list[str]:
    """Name every network and data set that the weights come from, and what is known of licences."""
    rows = [
        (
            role,
            f"`{found['model']}`" + (f", {found['weights']}" if "weights" in found else ""),
            _licence(found),
            str(found.get("network_sha256", found.get("weights_sha256", "")))[:16],
        )
        for role, found in ancestors(origin)
    ]
    if "began_from" not in origin:
        rows.insert(0, ("initial weights", "random", "none needed", ""))
    rows.append(("training images", data or "not known", "not recorded", ""))
    return [
        "## Where it comes from",
        "No licence is claimed for these weights: whoever publishes them fills in `license` above."
        " Before you use them, read the terms of all that is listed here. Whether those bind a"
        " network that learnt from it is not decided by this card.",
        _table(("part", "what", "licence", "digest (whole in config.json)"), *rows),
    ]


def _licence(found: Origin) -> str:
    said = found.get("license")
    if said is None:
        usual = found.get("registry_license")
        said = "unknown" + (f" (timm's own weights of that name: {usual})" if usual else "")
    return said + (f" ({found['url']})" if "url" in found else "")


def _training(recipe: Recipe, data: str, summary: Mapping[str, Any], run: Path) -> list[str]:
    """Say the data, the method and the cost of a run."""
    ahead = None
    with suppress(UserError):  # images and teachers may be gone
        ahead = forecast(recipe)[""]
    images = "" if ahead is None else f", {plural(ahead.num_images, 'image')} an epoch"
    chosen = {**recipe.objectives, "selector": recipe.selector, "masking": recipe.masking}
    methods = [
        f"- {name}: {type(method).paper}; {_settings(to_dict(method), known=METHOD)}"
        for name, method in chosen.items()
        if method is not None
    ]
    optim, train = recipe.optim, recipe.train
    loop = (
        f"{plural(train.epochs, 'epoch')} of batches of {train.batch_size}; {optim.opt}, peak"
        f" learning rate {optim.lr:g}, weight decay {optim.weight_decay:g}; seed {train.seed}."
    )
    cost = [] if ahead is None else [f"{format_count(ahead.flops)} for the whole training"]
    if "seconds" in summary:
        last = list((read_record(run / ENVIRONMENT) or {"0": {}}).values())[-1]
        device = last.get("device", "cpu")
        if device == "cpu":  # older runs recorded GPUs instead of a device
            device = ", ".join(dict.fromkeys(last.get("gpus") or [last.get("processor", "")]))
        took = format_duration(summary["seconds"])
        cost.append(f"{took} on {device} (processes: {summary['processes']})")
    return [
        "## Data",
        f"{data or 'not named'}{images}; views: {_settings(recipe.data.augment.effective())}.",
        "## Method",
        "\n".join(methods),
        loop,
        "## Cost",
        (", ".join(cost) or "not known") + ".",
    ]


def _results(
    scores: Mapping[str, Any], teachers: Mapping[str, float], count: float | None, chosen: bool
) -> list[str]:
    """Tabulate what was measured on the validation images."""
    rows = [("student", key, f"{value:.4f}") for key, value in scores.items()]
    rows += [
        (f"{name} (at most {NUM_IMAGES} of them)", "top1", f"{value:.4f}")
        for name, value in teachers.items()
    ]
    if not rows:
        return []
    said = f"On the {plural(int(count), 'validation image')}." if count else ""
    if chosen:
        said += " By these the best weights of the run were chosen, so expect less on other images."
    said += " Nothing else was measured."
    return ["## Results", said.strip(), _table(("network", "measure", "value"), *rows)]


def _settings(values: Mapping[str, Any], known: Mapping[str, Any] | None = None) -> str:
    """List settings that are on, but for ``known`` ones."""
    known = known or {}
    said = {k: v for k, v in values.items() if v and (k not in known or known[k] not in (None, v))}
    return ", ".join(f"{key} {value}" for key, value in said.items())


def _table(*rows: tuple[str, ...]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])
