"""Stored labels that a run reads: opened, compared with the run, and their views adopted."""

from dataclasses import replace
from typing import Any

from ..errors import ConfigError, DataError, Fix, Say, Set, UserError
from ..labels.identity import differing, network_from_json, of_views
from ..labels.store import LabelStore
from ..messages import plural
from ..recipes.config import Recipe, TeacherConfig
from ..recipes.convert import from_dict, to_dict
from ..vit.network import Network
from .preflight import describe_accuracy


def open_labels(recipe: Recipe) -> dict[str, LabelStore]:
    """Open the label stores of a recipe's teachers, by the teacher's name."""
    return {
        name: LabelStore.open(config.labels)
        for name, config in recipe.teachers.items()
        if config.labels is not None
    }


def stored_network(store: LabelStore, name: str) -> Network:
    """Describe the teacher behind stored labels, under its name in this run."""
    return network_from_json(store.manifest.about.get("network", {}), name)


def proof_of(store: LabelStore) -> tuple[float, int] | None:
    """Return the accuracy of the teacher behind stored labels when it wrote them, and on how many
    validation images; None: not recorded, or not known.
    """
    found = store.manifest.about.get("proof")
    return (float(found[0]), int(found[1])) if found else None


def describe_proof(proof: tuple[float, int]) -> str:
    """Say what `proof_of` returns."""
    return f"{describe_accuracy(*proof)} when its labels were written"


def with_teachers(recipe: Recipe) -> Recipe:
    """Return a recipe that also names the networks of the teachers that wrote its stored labels;
    `UserError` if the labels are gone.
    """
    found = dict(recipe.teachers)
    for name, store in open_labels(recipe).items():
        about, config = store.manifest.about, found[name]
        if not config.model and "recipe" in about:
            wrote = from_dict(about["recipe"]).teachers[about["teacher"]]
            found[name] = replace(wrote, labels=config.labels, missing=config.missing)
    return replace(recipe, teachers=found)


def with_views_of_labels(recipe: Recipe, began: Recipe | None = None) -> Recipe:
    """Take the number of views and their seed from the recipe's labels, unless it sets them.

    With several label stores, use the smallest view count among the required ones. A run that
    ``began`` goes on with the views it had, whatever has been labelled or deleted since.

    Raises:
        ConfigError: the recipe wants more views than are labelled.
    """
    data = recipe.data
    try:
        stores = open_labels(recipe)
    except UserError:
        if began is None:
            raise
        views, seed = began.data.views, began.data.seed
        views, seed = data.views or views, seed if data.seed is None else data.seed
        return replace(recipe, data=replace(data, views=views, seed=seed))
    if not stores:
        return recipe
    needed = {name: s for name, s in stores.items() if recipe.teachers[name].missing == "error"}
    fewest = min(store.manifest.num_views for store in (needed or stores).values())
    if began is not None:
        views, seed = began.data.views, began.data.seed
    else:
        # Beside unlabelled images, an epoch shows labelled ones in more than one view.
        few = fewest < recipe.train.epochs or data.unlabelled is not None
        views = fewest if few else None
        seeds = [store.manifest.identity.get("view.seed") for store in stores.values()]
        seed = next((s for s in seeds if s not in (None, recipe.train.seed)), None)
    views = views if data.views is None else data.views
    if needed and views is not None and views > fewest:
        what = f"the recipe shows {views} views of each image, and labels are of {fewest}"
        raise ConfigError(what, (Set("data.views", fewest), "label more"))
    seed = seed if data.seed is None else data.seed
    return replace(recipe, data=replace(data, views=views, seed=seed))


def made_by(store: LabelStore, config: TeacherConfig) -> bool:
    """Return whether a teacher of exactly this configuration wrote the labels."""
    recipe = store.manifest.about.get("recipe") or {}
    then = recipe.get("teachers", {}).get(store.manifest.about.get("teacher"))
    ignored = dict.fromkeys(("labels", "missing", "accept_unproven"))
    fresh, now = to_dict(TeacherConfig()), to_dict(config)
    return then is not None and fresh | then | ignored == now | ignored


def check_labels(recipe: Recipe, views: dict[str, Any], digests: dict[str, str], say: Say) -> None:
    """Raise `DataError` unless every label store is of these views and these teachers.

    ``views``: the identity of the run's views. ``digests``: of the weights to be compared.
    """
    for name, store in open_labels(recipe).items():
        manifest, field = store.manifest, f"teachers.{name}.labels"
        run, labels = dict(views), of_views(manifest.identity)
        if name in digests:
            run["teacher.weights"] = digests[name]
            labels["teacher.weights"] = manifest.identity["teacher.weights"]
        if not views["view.augment.reprob"]:
            # Views are made before normalisation, and every teacher applies its own. Only the noise
            # of random erasing is drawn in the student's.
            labels |= {key: run[key] for key in ("view.mean", "view.std")}
        changed = differing(labels, run)
        if changed:
            fixes: tuple[Fix, ...] = ("make the recipe agree", "label again")
            if "images." in changed:
                fixes = (Set("data.dir"), Set("data.unlabelled"), "label again")
            if "view.mean" in changed or "view.std" in changed:
                fixes += ("label with data.augment.reprob=0, for students of any normalisation",)
            what = f"the labels of the {name} ({store.path}) are not for this run: {changed}"
            raise DataError(what, fixes, field=field)
        num_views = recipe.num_views
        absent = sum(view < num_views for view, _ in store.missing_parts())
        if absent and recipe.teachers[name].missing == "error":
            parts = f"{plural(absent, 'part')} of {num_views * store.num_parts}"
            fixes = "label the rest", Set("data.views"), Set(f"teachers.{name}.missing", "online")
            raise DataError(f"the labels of the {name} lack {parts}", fixes, field=field)
        proof = proof_of(store)
        say(
            f"{name}: {manifest.about['network']['architecture']}, stored labels,"
            f" {store.status().records:,} of {manifest.num_samples * manifest.num_views:,} records,"
            f" {plural(num_views, 'view')} used"
            f"{f'; it was {describe_proof(proof)}' if proof else ''}"
        )
