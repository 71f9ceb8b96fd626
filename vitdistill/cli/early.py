"""What is refused before torch and timm are imported, which takes seconds."""

import os
from typing import Any

from ..errors import DataError
from ..methods import check_method
from ..option import options_of, unknown_field
from ..recipes import RECIPES, find_file
from ..recipes.settings import PARTS, TeacherConfig
from .arguments import ExplainArguments, RecipeArguments

IMAGES = ("data.dir", "data_dir", "data.unlabelled")
WEIGHTS = ("student.checkpoint", "teachers.teacher.checkpoint", "model_path", "teacher_path")


def refuse_early(args: Any) -> None:
    """Raise `UserError` for a recipe, a method, a field or a file that does not exist."""
    given = {**vars(args), **getattr(args, "settings", {})}
    for name in IMAGES if isinstance(args, ExplainArguments) else (*IMAGES, *WEIGHTS, "store"):
        path = given.get(name)
        if path and not path.startswith(("hfds/", "torchvision/")) and not os.path.exists(path):
            what = f"there is no file or folder {path}"
            raise DataError(what, "check the path", field=name)
    if not isinstance(args, RecipeArguments):
        return
    find_file(args.recipe)
    for word in args.with_:
        check_method(word.rpartition(".")[2].partition(":")[0])
    if args.recipe not in RECIPES:
        return  # its stages may be called like parts of a recipe
    for item in args.set:
        place, _, name = item.partition("=")[0].rpartition(".")
        teacher = place.startswith("teachers.") and place.count(".") == 1
        part = TeacherConfig if teacher else PARTS.get(place)
        elsewhere = any(name in options_of(other) for other in PARTS.values())
        if part is not None and name not in options_of(part) and not elsewhere:
            raise unknown_field(f"{place}.{name}", options_of(part))
