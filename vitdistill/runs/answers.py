"""Run a recipe's teachers on this process, and turn their answers into records."""

import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..data.batch import TeacherBatch
from ..errors import NonFiniteError, Say, Set
from ..labels.identity import network_to_json, versions
from ..labels.layout import Layout, NonFinite, Records
from ..labels.manifest import Manifest
from ..labels.writing import Unit
from ..memory import SMALLER_EVALUATION, memory_errors
from ..recipes.config import Recipe
from ..recipes.convert import to_dict
from ..vit.flops import forward_flops
from ..vit.network import Network
from ..vit.output import ViTOutput
from ..weights import create as weights
from ..world import World
from .identity import origin_of_config, resolve_run
from .networks import name_precision
from .prepare import Prepared, build, prove_teachers
from .stop import StopRequest


def prepare_teachers(recipe: Recipe, world: World, say: Say) -> Prepared:
    """Build and prove a recipe's teachers, and the views of its student, on this process."""
    # Labelling makes batches of its own: any that divide among the processes will do.
    small, data = replace(recipe.train, batch_size=2 * world.size, accumulate=1), recipe.data
    if data.unlabelled is not None:
        small = replace(small, batch_size=4 * world.size)
        data = replace(data, labelled_share=0.5)
    student = replace(recipe.student, pretrained=False)  # only its input spec is needed
    with world.together(), memory_errors("while the teachers were built", SMALLER_EVALUATION):
        prepared = build(replace(recipe, train=small, data=data, student=student), world, say)
        prepared = replace(prepared, recipe=recipe)
    return replace(prepared, proofs=prove_teachers(prepared, say))


@dataclass
class LabelRun:
    """Running teachers, and the layout of each one's records by name."""

    prepared: Prepared
    layouts: dict[str, Layout] = field(default_factory=dict)

    @property
    def batch_size(self) -> int:
        """Images that a teacher answers together; the last bits of an answer depend on it."""
        return self.prepared.recipe.train.eval_batch_size

    def answers(
        self, view: int, first: int, last: int
    ) -> Iterator[tuple[TeacherBatch, dict[str, ViTOutput]]]:
        """Yield batches of samples ``first`` to ``last - 1`` in a view, and the answers to them."""
        prepared = self.prepared
        for batch in prepared.loaders.train.teacher_batches(view, first, last, self.batch_size):
            with prepared.world.autocast(prepared.amp_dtype):
                answers = {
                    name: teacher(batch.images, prepared.plan.live[name])
                    for name, teacher in prepared.teachers.items()
                }
            yield batch, answers

    def records(self, name: str, view: int, batch: TeacherBatch, answer: ViTOutput) -> Records:
        """Return a teacher's answer to a batch as records; `NonFiniteError` if it is not finite."""
        try:
            return self.layouts[name].encode(
                answer.logits, answer.hidden, answer.features, batch.checksums
            )
        except NonFinite as error:
            sample = int(batch.ids[error.index])
            place = f"view {view} of sample {sample} ({self.prepared.images.train.key(sample)})"
            what = f"the answer of the {name} to {place} cannot be stored ({error})"
            fixes = "check its weights", Set(f"teachers.{name}.precision", "float32")
            raise NonFiniteError(what, fixes) from error

    def make(
        self, unit: Unit, stop: StopRequest, tell: Callable[[float], None]
    ) -> list[Records] | None:
        """Return the records of a part for each of its stores; None when asked to stop.

        ``tell`` is called with the share of the part that is made, after every batch.
        """
        names = [store.path.name for store in unit.stores]
        made: dict[str, list[Records]] = {name: [] for name in names}
        for batch, answers in self.answers(unit.view, unit.lo, unit.hi):
            if stop:
                return None
            for name in names:
                made[name].append(self.records(name, unit.view, batch, answers[name]))
            tell((int(batch.ids[-1]) + 1 - unit.lo) / (unit.hi - unit.lo))
        return [np.concatenate(made[name]) for name in names]

    def identity(self, name: str) -> dict[str, Any]:
        """Return what the labels of this teacher depend on."""
        prepared, config = self.prepared, self.prepared.recipe.teachers[name]
        teacher = prepared.teachers[name]
        architecture, args = weights.describe(resolve_run(config.model), config.model_args)
        index = teacher.class_index
        return {
            **prepared.identity_of_views(),
            "teacher.architecture": architecture.partition(".")[0],
            "teacher.model_args": args,
            "teacher.classes_taken": None if index is None else index.tolist(),
            "teacher.weights": prepared.networks.digests[name],
            "teacher.image_size": list(teacher.spec.image_size),
            "teacher.mean": list(teacher.spec.mean),
            "teacher.std": list(teacher.spec.std),
            "teacher.precision": name_precision(teacher.dtype or prepared.amp_dtype),
            "teacher.batch_size": self.batch_size,
        }

    def manifest(self, name: str, network: Network, part_size: int) -> Manifest:
        """Return the manifest of a teacher's labels; ``network`` describes the teacher."""
        teacher, recipe = self.prepared.teachers[name], self.prepared.recipe
        flops = forward_flops(teacher.model, teacher.spec.image_size)
        proof = self.prepared.proofs.get(name)
        return Manifest(
            identity=self.identity(name),
            layout=self.layouts[name],
            num_samples=len(self.prepared.images.train),
            num_views=recipe.num_views,
            part_size=part_size,
            about={
                "teacher": name,
                "proof": None if proof is None else [proof.accuracy, proof.num_images],
                "versions": versions(),
                "network": network_to_json(replace(network, flops=flops)),
                "recipe": to_dict(recipe),
                "classes": list(self.prepared.networks.classes),
                "origin": origin_of_config(recipe.teachers[name]),
                "command": shlex.join(["vitdistill", *sys.argv[1:]]),
            },
        )
