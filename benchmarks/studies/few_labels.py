"""Run the study `few_labels.yaml`: images, teacher, labels, every row, and the report.

    python benchmarks/studies/few_labels.py cifar100.tar tf_efficientnet_lite0.safetensors FOLDER

CIFAR-100's archive holds PNG files in ``cifar100/{train,test}/CLASS``; the weights are those of
timm's ``tf_efficientnet_lite0.in1k``. FOLDER gets these as ``pretrained.safetensors``,
``fifty/train/CLASS`` (fifty images a class, drawn with a fixed seed and listed in
``fifty/labelled.json``), ``fifty/val/CLASS`` (the test images), ``fifty/rest`` (the other training
images, without labels), ``every`` (all of them with labels), ``teacher``, ``labels``, ``study`` and
``report.md``. The same command resumes where it was stopped; ``--until images`` stops before the
teacher, ``--until labels`` before the study.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

STUDY = Path(__file__).with_suffix(".yaml").resolve()
LABELLED = 50
TEACHER = "train finetune_cnn --data-dir fifty --model tf_efficientnet_lite0"
TEACHER += " --model-path pretrained.safetensors --img-size 96 --epochs 8 --output teacher"
TEACHER += " --set train.eval_every=4 data.workers=0"
# One command stores all that the rows read: logits, and the stages that guide.
LABELS = "label small_images_standardized_kd --with guidance --data-dir fifty"
LABELS += " --unlabelled-dir fifty/rest --views 4 --output labels/all"
LABELS += " --teacher-model teacher --teacher-img-size 96 --encoding float16"
LABELS += " --set student.model_args.patch_size=8 data.seed=0 objectives.guidance.blocks=[0,3,5]"
LABELS += " objectives.guidance.stages=[2,3,4]"


def split(archive: Path, to: Path) -> None:
    """Write the image folders, unless they are whole already."""
    if (to / "labelled.json").is_file():
        return
    with tarfile.open(archive) as tar:
        members = [m for m in tar.getmembers() if m.isfile() and m.name.endswith(".png")]
        of_class: dict[str, list[str]] = {}
        for member in sorted(members, key=lambda m: m.name):
            part, folder, name = member.name.split("/")[-3:]
            if part == "train":
                of_class.setdefault(folder, []).append(name)
        rng = random.Random(0)
        labelled = {folder: sorted(rng.sample(of_class[folder], LABELLED)) for folder in of_class}
        for member in members:
            part, folder, name = member.name.split("/")[-3:]
            whole = to.with_name("every") / ("val" if part == "test" else "train") / folder / name
            if part == "test":
                path = to / "val" / folder / name
            elif name in labelled[folder]:
                path = to / "train" / folder / name
            else:
                path = to / "rest" / f"{folder}_{name}"
            for place in (path, whole):
                place.parent.mkdir(parents=True, exist_ok=True)
            file = tar.extractfile(member)
            assert file is not None
            path.write_bytes(file.read())
            whole.unlink(missing_ok=True)
            whole.hardlink_to(path)
    (to / "labelled.json").write_text(json.dumps(labelled, indent=1))


def main() -> None:
    """Do what is not done yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("archive", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--until", choices=("images", "teacher", "labels", "study", "report"), default="report"
    )
    args = parser.parse_args()

    def run(command: str) -> None:
        print(f"vitdistill {command}", flush=True)
        subprocess.run(
            [sys.executable, "-m", "vitdistill", *command.split()], cwd=args.folder, check=True
        )

    split(args.archive, args.folder / "fifty")
    shutil.copyfile(args.weights, args.folder / "pretrained.safetensors")
    steps = {
        "images": [],
        "teacher": [TEACHER],
        "labels": [LABELS],
        "study": [f"study {STUDY} --output study"],
        "report": ["report study --format md --output report.md"],
    }
    for name, commands in steps.items():
        for command in commands:
            run(command)
        if name == args.until:
            break


if __name__ == "__main__":
    main()
