"""What a run's networks make of images of one's own: one sheet, a row for each way to look."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ..data.augment import InputSpec
from ..data.batch import Batch
from ..data.sources.decode import decode_image
from ..data.views.single import eval_view, normalize
from ..distill.step import Distillation
from ..distill.teacher import Teacher
from ..errors import ConfigError, DataError, UserError
from ..messages import printable
from ..methods.maskedkd import patch_saliency
from ..recipes.config import Recipe, TeacherConfig
from ..recipes.yaml import load_recipe
from ..runs.identity import RECIPE, resolve_run
from ..runs.networks import build_teacher, build_teacher_model, plan_of, runs
from ..runs.pictures import GAP, MARGIN, draw_sheet, size_in_sheet, stack, write_below
from ..runs.stored import describe_proof, open_labels, proof_of, with_teachers
from ..storage import checkpoint
from ..vit.needs import Needs
from ..vit.walk import run_vit
from ..weights.create import class_names
from ..world import World

NUM_CLASSES = 3
WIDEST = 1400  # pixels of a sheet; more images are below each other


@dataclass(frozen=True)
class Shown:
    """A sheet, and what each network says of each image: its likeliest classes, in words.

    ``notes``: notes on the teachers that cannot be asked.
    """

    sheet: Image.Image
    said: list[dict[str, list[str]]]
    notes: list[str]


@torch.no_grad()
def show(run: Path, images: Sequence[Path], world: World) -> Shown:
    """Return what a run's last student and its teachers see and say of images.

    Rows are the input, what the step shows of it (the patches a selector leaves each teacher, what
    a decoder predicts of hidden ones), and where the student attends to.

    Raises:
        UserError: an image, a teacher, or a decoder's checkpoint is not there or damaged.
    """
    weights = Path(resolve_run(str(run), ("last",)))
    if weights == run:
        raise ConfigError(f"{run} is not a run folder", "give what training wrote", field="run")
    run = weights.parent
    recipe = load_recipe(run / RECIPE)
    built = build_teacher_model(TeacherConfig(model=str(weights)), "student")
    model, classes = built.model.to(world.device).eval(), class_names(built.model) or ()
    place = classes, built.spec, world.device
    asked, notes = _build_teachers(recipe, *place)
    teachers = {name: teacher for name, teacher in asked.items() if runs(recipe.teachers[name])}
    pixels = torch.stack([eval_view(_decode(path), built.spec) for path in images])
    ids = torch.arange(len(images), device=world.device)
    shown = normalize(pixels, built.spec).to(world.device)
    batch = Batch(shown, ids * 0 - 1, ids, ids * 0, 0, seed=recipe.train.seed)
    plan = plan_of(recipe, built.network, {n: teacher.network for n, teacher in teachers.items()})
    distillation = Distillation(model, plan).to(world.device)
    has_attention = built.network.attention_source is not None
    seen = frozenset({built.network.depth - 1} if has_attention else ())
    needs = Needs(logits=bool(built.network.num_classes), attention=seen)
    output = run_vit(model, batch.images, needs)
    rows: dict[str, Tensor] = {"input": batch.images}
    for attention in output.attention.values():
        saliency = patch_saliency(attention, output.num_prefix_tokens)
        # Stretch each image to its own range: a little-trained student's patches differ little.
        least, most = saliency.aminmax(dim=1, keepdim=True)
        heat = (saliency - least) / (most - least).clamp_min(1e-12)
        heat = heat.view(-1, 1, *output.grid)
        heat = F.interpolate(heat, batch.images.shape[-2:], mode="bilinear")
        rows["the student\nattends to"] = batch.images * heat
    answers = {"student": output.logits}
    for name, teacher in asked.items():
        count = teacher.network.num_classes  # others than the student's, if it reads features alone
        if count and count == len(classes or range(count)):
            answers[name] = teacher(batch.images, Needs(logits=True)).logits
    known = {name: logits for name, logits in answers.items() if logits is not None}
    said = [
        {name: _likeliest(logits[i], classes) for name, logits in known.items()}
        for i in range(len(images))
    ]
    _load_adapters(distillation, run)  # and the student they were trained with
    rows = {**distillation.eval().pictures(batch, teachers), **rows}
    columns = max((WIDEST - MARGIN) // (size_in_sheet(built.spec)[1] + GAP), 1)
    bands = []
    for i in range(0, len(images), columns):
        part = slice(i, i + columns)
        band = draw_sheet({name: pixels[part] for name, pixels in rows.items()}, built.spec)
        bands.append(write_below(band, said[part]))
    return Shown(stack(bands), said, notes)


def _build_teachers(
    recipe: Recipe, classes: tuple[str, ...], spec: InputSpec, device: torch.device
) -> tuple[dict[str, Teacher], list[str]]:
    """Return a run's teachers, also those behind stored labels, and notes on missing ones.

    Raises:
        UserError: one that ran in training cannot be built.
    """
    found, notes = {}, []
    try:
        stores, recipe = open_labels(recipe), with_teachers(recipe)
    except UserError as error:
        return {}, [f"no teacher is asked, for stored labels are gone: {error.what}"]
    for name, config in recipe.teachers.items():
        try:
            built = build_teacher(config, name, classes, spec, device, recipe.objectives)
            found[name] = built[0]
        except UserError as error:
            if runs(config):
                raise
            store, proof = stores[name], proof_of(stores[name])
            network = str(store.manifest.identity.get("teacher.architecture", "a network"))
            notes.append(
                f"{name} is not asked: training read its labels from {store.path}, and"
                f" {error.what}; by these labels it is {network}"
                + (f", {describe_proof(proof)}" if proof else "")
            )
    return found, notes


def _decode(path: Path) -> Image.Image:
    if not path.is_file():
        raise DataError(f"there is no image file {path}", field="images")
    try:
        return decode_image(path, str(path))
    except DataError as error:
        raise DataError(error.what, "give another image", field="images") from error


def _load_adapters(distillation: Distillation, run: Path) -> None:
    """Load decoders and the student they were trained with, where the run has any."""
    if not len(distillation.adapters):
        return
    saved = checkpoint.load_latest(run)
    if saved is None:
        what = f"the run {run} has no checkpoint, which holds its decoder"
        raise DataError(what, "train it again", field="run")
    tensors, prefix = saved[1][0], "distillation."
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    distillation.load_state_dict(own)


def _likeliest(logits: Float[Tensor, " C"], classes: tuple[str, ...]) -> list[str]:
    top = logits.float().softmax(0).topk(min(NUM_CLASSES, len(logits)))
    names = [printable(classes[i]) if classes else f"class {i}" for i in top.indices.tolist()]
    return [f"{n} {p:.0%}" for n, p in zip(names, top.values.tolist(), strict=True)]
