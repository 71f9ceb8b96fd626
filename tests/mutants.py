"""Break the package in fifty ways, one at a time, and see which the tests notice.

``python tests/mutants.py [--path TREE] [--only WORD] [--dry]``: prints a line a mutant. A mutant is
found by its tokens, in whatever file and line breaks they stand. One whose code is nowhere to be
found is to be written anew: say the same fault in the words of the code as it is now.
"""

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT}


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Args:
        name: what goes wrong, by room.
        changes: (code, code in its place); the first whose code stands in the tree just once.
        tests: patterns below tests/ of those that should notice.
    """

    name: str
    changes: tuple[tuple[str, str], ...]
    tests: str


def mutant(name: str, *texts: str, tests: str) -> Mutant:
    """``texts``: code, code in its place, and so on for other wordings of the same code."""
    return Mutant(name, tuple(zip(texts[::2], texts[1::2], strict=True)), tests)


VIT = "test_vit.py vit/test_*.py"
PLAN = "test_plan.py distill/test_plan.py"
STEP = "test_distill.py distill/test_step.py test_teacher.py distill/test_teacher.py"
LOADER = "data/test_loader.py data/test_order.py data/test_batch.py"
STORE = "test_durable.py storage/test_*.py"
SAVED = "train/test_checkpoint.py storage/test_checkpoint.py storage/test_optimizer.py"
TRAIN = "train/test_loop.py runs/test_train.py runs/test_state.py"
OPTIM = "train/test_optim.py runs/test_optim.py"
LABELS = "labels/test_*.py"
WEIGHTS = "test_weights.py weights/test_create.py weights/test_files.py weights/test_*.py"
FOLDER = "train/test_run_folder.py runs/test_folder.py"
METRICS = "test_metrics.py evaluate/test_metrics.py evaluate/test_accuracy.py"

MUTANTS = [
    # --- vit ---
    mutant(
        "vit: every block runs, needed or not",
        "last = needs.num_blocks(family.depth) - 1",
        "last = family.depth - 1",
        "last = needs.num_blocks(network.depth) - 1",
        "last = network.depth - 1",
        tests=VIT,
    ),
    mutant(
        "vit: rows and columns of kept patches are swapped",
        "[batch, keep // columns, keep % columns]",
        "[batch, keep % columns, keep // columns]",
        tests=VIT,
    ),
    mutant(
        "vit: attention without its scale",
        "((q * attn.scale) @ k.transpose(-2, -1)).float()",
        "(q @ k.transpose(-2, -1)).float()",
        tests=VIT,
    ),
    mutant(
        "vit: kept patches get positions of their neighbours",
        "positions[0, prefix:][keep]",
        "positions[0][keep]",
        tests=VIT,
    ),
    mutant(
        "vit: a recorded block is cut to the rows the head reads",
        "i < last or i in needs.hidden or (at_end",
        "i < last or (at_end",
        "i < last or i in needs.hidden or needs.features",
        "i < last or needs.features",
        tests=VIT,
    ),
    mutant(
        "vit: grids are resampled without antialiasing",
        'mode="bilinear", align_corners=False, antialias=True',
        'mode="bilinear", align_corners=False, antialias=False',
        tests="test_align.py vit/test_patches.py",
    ),
    mutant(
        "vit: a walked block forgets its layer scale",
        "block.drop_path1(block.ls1(out))",
        "block.drop_path1(out)",
        tests=VIT,
    ),
    mutant(
        "vit: a block beyond the last is taken for one",
        "if not -depth <= block < depth:",
        "if not -depth <= block <= depth:",
        tests=VIT + " " + PLAN,
    ),
    mutant(
        "vit: queries are recorded before their norm",
        "return attn.q_norm(q), attn.k_norm(k), v",
        "return q, attn.k_norm(k), v",
        tests=VIT,
    ),
    # --- methods ---
    mutant(
        "kd: without T^2",
        "return temperature**2 * F.kl_div(student, teacher,",
        "return F.kl_div(student, teacher,",
        tests="methods/test_kd.py",
    ),
    mutant(
        "kd: the divergence the other way round",
        "temperature**2 * F.kl_div(student, teacher,",
        "temperature**2 * F.kl_div(teacher, student,",
        tests="methods/test_kd.py",
    ),
    mutant(
        "nkd: the label stays among the other classes",
        "others + (others >= labels[:, None])",
        "others + (others > labels[:, None])",
        tests="methods/test_nkd.py",
    ),
    mutant(
        "nkd: T in place of T^2",
        "return -target - gamma * temperature**2 * rest.sum(-1)",
        "return -target - gamma * temperature * rest.sum(-1)",
        tests="methods/test_nkd.py",
    ),
    mutant(
        "maskedkd: prefix tokens are taken for patches",
        "patches = attention[:, :, num_prefix_tokens:]",
        "patches = attention[:, :, 1:]",
        tests="methods/test_maskedkd.py",
    ),
    mutant(
        "maskedkd: keeps what the student looks at least",
        "resample_saliency(saliency, student.grid, grid).topk(num_keep, dim=-1)",
        "resample_saliency(saliency, student.grid, grid).topk(num_keep, dim=-1, largest=False)",
        tests="methods/test_maskedkd.py",
    ),
    mutant(
        "dmae: one block too late",
        "return max(3 * depth // 4 - 1, 0)",
        "return 3 * depth // 4",
        tests="methods/test_dmae.py",
    ),
    mutant(
        "dmae: the student's features are not scaled",
        "student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)",
        "student, teacher = student, F.normalize(teacher, dim=-1)",
        tests="methods/test_dmae.py",
    ),
    mutant(
        "dkd: without T^2",
        "return temperature**2 * (alpha * target + beta * rest)",
        "return alpha * target + beta * rest",
        tests="methods/test_dkd.py",
    ),
    mutant(
        "dist: beta and gamma are swapped",
        "(beta * over_classes + gamma * over_images)",
        "(gamma * over_classes + beta * over_images)",
        tests="methods/test_dist.py",
    ),
    mutant(
        "wttm: the weight is taken at temperature 1",
        "(F.log_softmax(theirs, dim=-1) / temperature).exp()",
        "F.log_softmax(theirs, dim=-1).exp()",
        "(F.log_softmax(logits, dim=-1) / temperature).exp()",
        "F.log_softmax(logits, dim=-1).exp()",
        tests="methods/test_wttm.py",
    ),
    mutant(
        "vitkd: sums over few patches are not scaled up",
        "1.0 if places.keep is None else places.keep.shape[1] / (places.grid[0] * places.grid[1])",
        "1.0",
        "1.0 if keep is None else keep.shape[1] / (grid[0] * grid[1])",
        "1.0",
        tests="methods/test_vitkd.py",
    ),
    mutant(
        "vitkd: generates from too many patches",
        "noise.argsort(dim=1, stable=True).argsort(dim=1) >= num_visible",
        "noise.argsort(dim=1, stable=True).argsort(dim=1) > num_visible",
        tests="methods/test_vitkd.py",
    ),
    mutant(
        "mae: pixels are never normalised",
        "pixel_targets(batch.images.to(dtype), adapter.patch_size, self.norm_pix)",
        "pixel_targets(batch.images.to(dtype), adapter.patch_size, False)",
        tests="methods/test_mae.py models/test_mae.py contract/test_methods.py",
    ),
    mutant(
        "masking: the order for its own inverse",
        "return keep, order.argsort(dim=1), mask",
        "return keep, order, mask",
        tests="methods/test_masking.py methods/test_dmae.py",
    ),
    mutant(
        "ce: a mixed image weighs its labels the other way round",
        "return (lam * first + (1 - lam) * second).mean()",
        "return (lam * second + (1 - lam) * first).mean()",
        tests="methods/test_cross_entropy.py",
    ),
    # --- models ---
    mutant(
        "involution: a step too far",
        "[..., p : p + stride * (rows - 1) + 1 : stride, :]",
        "[..., p : p + stride * rows + 1 : stride, :]",
        tests="models/test_involution.py",
    ),
    # --- distill ---
    mutant(
        "step: the mean of the losses in place of their sum",
        "torch.stack(list(losses.values())).sum()",
        "torch.stack(list(losses.values())).mean()",
        tests=STEP,
    ),
    mutant(
        "step: a teacher's NaN goes unseen",
        "~live.logits.isfinite().all()",
        "live.logits.isnan().any() & False",
        tests=STEP,
    ),
    mutant(
        "step: weights do not follow their schedule",
        "objective.weight_at(progress) *",
        "objective.weight *",
        tests=STEP,
    ),
    mutant(
        "step: a teacher sees no more than the student",
        "order[:, : plan.num_keep[name]]",
        "order[:, : plan.student_keep]",
        tests=STEP,
    ),
    mutant(
        "step: the mask draws from the objectives' stream",
        "batch.uniforms(self.plan.student.num_patches, keyed.Stream.PATCHES)",
        "batch.uniforms(self.plan.student.num_patches, keyed.Stream.OBJECTIVE)",
        tests=STEP + " runs/test_train.py oracle/test_oracle.py",
    ),
    mutant(
        "plan: a second objective's needs replace the first's",
        "live[objective.teacher] |= _resolve(",
        "live[objective.teacher] = _resolve(",
        "live[objective.teacher] |= needs",
        "live[objective.teacher] = needs",
        tests=PLAN,
    ),
    mutant(
        "plan: a teacher nobody reads is accepted",
        "if not live[name]:",
        "if not live[name] and False:",
        "if not of_teacher:",
        "if not of_teacher and False:",
        tests=PLAN,
    ),
    mutant(
        "teacher: classes in another order are left there",
        "index = tuple(position[label] for label in ours)",
        "index = tuple(range(len(ours)))",
        "index = tuple(position[label] for label in wanted)",
        "index = tuple(range(len(wanted)))",
        tests=STEP,
    ),
    # --- data ---
    mutant(
        "keyed: sines for cosines",
        "numbers: F64 = radius * np.cos(2.0 * np.pi * pairs[..., 1])",
        "numbers: F64 = radius * np.sin(2.0 * np.pi * pairs[..., 1])",
        "return radius * np.cos(2.0 * np.pi * pairs[..., 1])",
        "return radius * np.sin(2.0 * np.pi * pairs[..., 1])",
        tests="data/test_keyed.py test_keyed.py data/views/test_mixing.py oracle/test_oracle.py",
    ),
    mutant(
        "keyed: every sample has the same numbers",
        "return _torch_mix((state ^ sample_ids) + golden)",
        "return _torch_mix((state ^ sample_ids[:1].expand_as(sample_ids)) + golden)",
        tests="data/test_keyed.py test_keyed.py",
    ),
    mutant(
        "loader: processes share their images",
        "first = k * self._batch_size + self._rank * share",
        "first = k * self._batch_size",
        "first = k * batch_size + world.rank * share",
        "first = k * batch_size",
        tests=LOADER,
    ),
    mutant(
        "order: stored views come in an order that never changes",
        "couples[keyed.permutation(seed, epoch, len(couples), Stream.PAIRS)].flatten()",
        "couples[keyed.permutation(seed, 0, len(couples), Stream.PAIRS)].flatten()",
        tests=LOADER,
    ),
    mutant(
        "order: repeats are the same view",
        "views = epoch * repeats + np.arange(repeats, dtype=np.int64)[None, :, None]",
        "views = epoch * repeats + 0 * np.arange(repeats, dtype=np.int64)[None, :, None]",
        tests=LOADER,
    ),
    mutant(
        "mixing: the weight is not that of the area pasted",
        "return np.where(cut, 1.0 - area / float(height * width), lam), cut, boxes",
        "return lam, cut, boxes",
        tests="data/views/test_mixing.py",
    ),
    mutant(
        "mixing: the partner's label is the image's own",
        "return mixed, labels.unflatten(0, (-1, 2)).flip(1).flatten(), weight",
        "return mixed, labels, weight",
        tests="data/views/test_mixing.py",
    ),
    mutant(
        "views: mirrored images are off by one pixel",
        "torch.where(flip[:, None] == 1, width - 1 - x, x)",
        "torch.where(flip[:, None] == 1, width - x, x)",
        tests="data/views/test_*.py",
    ),
    # --- labels ---
    mutant(
        "labels: another view's labels are taken",
        "wrong = np.flatnonzero(present & (records['pixels'] != checksums))".replace("'", '"'),
        "wrong = np.flatnonzero(present & False)",
        tests="labels/test_store.py labels/test_*.py train/test_labelling.py runs/test_label.py runs/test_stored.py",
    ),
    mutant(
        "labels: the live answer is not put in its rows",
        "stored[rows] = live.to(stored.dtype)",
        "stored[rows] = stored[rows]",
        "stored[self.targets.missing] = answer.to(stored.dtype)",
        "pass",
        tests=STEP + " train/test_labelling.py runs/test_label.py runs/test_stored.py " + LABELS,
    ),
    mutant(
        "labels: a tail of one class too many",
        "math.log(encoding.num_classes - encoding.k)",
        "math.log(encoding.num_classes)",
        "math.log(self.num_classes - self.k)",
        "math.log(self.num_classes)",
        tests="labels/test_encoding.py",
    ),
    mutant(
        "labels: class numbers of two bytes for too many classes",
        'ids = "<u2" if self.num_classes <= 2**16 else "<u4"',
        'ids = "<u2"',
        tests="labels/test_encoding.py",
    ),
    # --- storage ---
    mutant(
        "storage: a file is published without fsync",
        "os.fsync(fd)\nfinally:\nos.close(fd)\nreturn sink.hexdigest()",
        "pass\n        finally:\n            os.close(fd)\n    return sink.hexdigest()",
        "left = left[os.write(fd, left) :]\nos.fsync(fd)",
        "left = left[os.write(fd, left) :]",
        tests=STORE,
    ),
    mutant(
        "storage: a folder's new name is not synced",
        "os.rename(temp, final)\n        fsync_dir(Path(final).parent)",
        "os.rename(temp, final)",
        "os.rename(temporary, final)\nfsync_dir(final.parent)",
        "os.rename(temporary, final)",
        tests=STORE,
    ),
    mutant(
        "storage: an existing file is replaced without notice",
        "os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC",
        "os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC",
        tests=STORE,
    ),
    mutant(
        "checkpoint: not read back",
        "_read_back(temp, final)\n    _prune(final, keep)",
        "pass\n    _prune(final, keep)",
        "verify_dir(temporary)",
        "pass",
        tests=SAVED,
    ),
    mutant(
        "checkpoint: one too many is kept",
        "if kept < keep and _step(folder) < step:",
        "if kept <= keep and _step(folder) < step:",
        "if kept < keep and _step(folder) < _step(newest):",
        "if kept <= keep and _step(folder) < _step(newest):",
        tests=SAVED,
    ),
    mutant(
        "checkpoint: strides of the optimizer's state are lost",
        "if not value.is_contiguous() and _is_dense(value):",
        "if not value.is_contiguous() and _is_dense(value) and False:",
        tests=SAVED,
    ),
    # --- runs ---
    mutant(
        "train: the moving average begins anew",
        'self.ema.module.load_state_dict(under("ema."))',
        "pass",
        "for name, module in state.modules.items():\nmodule.load_state_dict(",
        "for name, module in list(state.modules.items())[:1]:\n            module.load_state_dict(",
        tests=TRAIN,
    ),
    mutant(
        "train: the optimizer's state begins anew",
        'self.optimizer.load_state_dict(checkpoint.unpack_optimizer(tensors, state["optimizer"]))',
        "pass",
        'state.optimizer.load_state_dict(unpack_optimizer(tensors, numbers["optimizer"]))',
        "pass",
        tests=TRAIN,
    ),
    mutant(
        "train: the sums of the log begin anew",
        "self.sums.copy_(sums[self.world.rank] if len(sums) == self.world.size else sums.mean(0))",
        "pass",
        "state.sums.copy_(sums[world.rank] if len(sums) == world.size else sums.mean(0))",
        "pass",
        tests=TRAIN,
    ),
    mutant(
        "train: every step draws the same dropout",
        "keyed.keys(self.recipe.train.seed, self.step, place, keyed.Stream.DROPOUT)",
        "keyed.keys(self.recipe.train.seed, 0, place, keyed.Stream.DROPOUT)",
        "keyed.keys(self.recipe.train.seed, step, place, keyed.Stream.DROPOUT)",
        "keyed.keys(self.recipe.train.seed, 0, place, keyed.Stream.DROPOUT)",
        tests=TRAIN + " oracle/test_oracle.py",
    ),
    mutant(
        "train: micro-batches are added up in place of averaged",
        'total = losses["loss"] / count',
        'total = losses["loss"]',
        'loss = losses["loss"] / count',
        'loss = losses["loss"]',
        tests=TRAIN,
    ),
    mutant(
        "train: the last of equals is the best",
        'best = scores.get("top1", -math.inf) >',
        'best = scores.get("top1", -math.inf) >=',
        tests=TRAIN,
    ),
    mutant(
        "train: a run of another recipe is resumed",
        'if state["recipe"] != self.fingerprint:',
        'if state["recipe"] != self.fingerprint and False:',
        "lines = differences(recipe, replace_fields(saved, same) if same else saved)",
        "lines: list[str] = []",
        tests=TRAIN + " " + FOLDER,
    ),
    mutant(
        "optim: gradients are clipped to half of what was asked",
        "clip_grads_with_norm_(module.parameters(), max_norm, norm)",
        "clip_grads_with_norm_(module.parameters(), 0.5 * max_norm, norm)",
        tests=OPTIM,
    ),
    mutant(
        "optim: the schedule is as long as the run, warm-up before it or not",
        "epochs - config.warmup_epochs if config.warmup_prefix else epochs",
        "epochs",
        tests=OPTIM,
    ),
    # --- evaluate ---
    mutant(
        "metrics: ties go to the label",
        "rank = ((logits > own) | (logits == own) & earlier).sum(dim=1)",
        "rank = (logits > own).sum(dim=1)",
        tests=METRICS,
    ),
    mutant(
        "metrics: KL with its sign turned",
        "teacher.exp() * (teacher - student)",
        "teacher.exp() * (student - teacher)",
        tests=METRICS,
    ),
    mutant(
        "linear: twice the penalty",
        "loss = 0.5 * l2 * weight.double().square().sum()",
        "loss = l2 * weight.double().square().sum()",
        tests="test_features.py evaluate/test_linear.py evaluate/test_features.py",
    ),
    # --- weights ---
    mutant(
        "weights: a file's code is executed",
        'torch.load(file, map_location="cpu", weights_only=True)',
        'torch.load(file, map_location="cpu", weights_only=False)',
        tests=WEIGHTS,
    ),
    mutant(
        "weights: resampled positions stand in reverse",
        "torch.cat([prefix, moved.to(table.dtype)], dim=1)",
        "torch.cat([prefix, moved.flip(1).to(table.dtype)], dim=1)",
        "torch.cat([prefix, moved], dim=1)",
        "torch.cat([prefix, moved.flip(1)], dim=1)",
        tests=WEIGHTS,
    ),
    # --- recipes, explain ---
    mutant(
        "recipes: where labels lie changes what a run is",
        r'return path in VOLATILE or bool(re.fullmatch(r"teachers\.\w+\.labels", path))',
        "return path in VOLATILE",
        tests="test_recipe.py recipes/test_*.py "
        + FOLDER
        + " train/test_labelling.py runs/test_label.py runs/test_stored.py",
    ),
    mutant(
        "explain: objectives are counted twice",
        "student=total - sum(objectives.values())",
        "student=total",
        "student=total // batch_size - sum(objectives.values())",
        "student=total // batch_size",
        tests="test_cost.py explain/test_cost.py explain/test_*.py",
    ),
    mutant(
        "explain: a teacher's second pass costs nothing",
        "live[name] += forward_flops(model, size, plan.guides[name])",
        "live[name] += 0",
        "counts[name] += counter.get_total_flops()",
        "counts[name] = counter.get_total_flops()",
        tests="test_cost.py explain/test_cost.py explain/test_*.py",
    ),
]


@dataclass(frozen=True)
class Token:
    text: str
    start: int
    end: int


def tokens(text: str) -> list[Token]:
    """Return what a text says, whatever its line breaks: no comments, no comma before a bracket."""
    starts = [0]
    for line in io.StringIO(text):
        starts.append(starts[-1] + len(line))
    found: list[Token] = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in LAYOUT or not token.string:
                continue
            if token.string in ")]}" and found and found[-1].text == ",":
                found.pop()
            begin, end = (starts[row - 1] + column for row, column in (token.start, token.end))
            found.append(Token(token.string, begin, end))
    except tokenize.TokenError:  # a part of an expression: all of it has been given by now
        pass
    except IndentationError:
        pass
    return found


def places(root: Path, code: str) -> Iterator[tuple[Path, int, int]]:
    """Give every place of some code below a folder."""
    wanted = [token.text for token in tokens(code)]
    for path in sorted(root.rglob("*.py")):
        found = tokens(path.read_text())
        texts = [token.text for token in found]
        for i in range(len(texts) - len(wanted) + 1):
            if texts[i] == wanted[0] and texts[i : i + len(wanted)] == wanted:
                yield path, found[i].start, found[i + len(wanted) - 1].end


def apply(mutant: Mutant, package: Path) -> tuple[Path, str] | None:
    """Change the file and return it with what it held before; None where its code is not found."""
    for code, instead in mutant.changes:
        found = list(places(package, code))
        if len(found) == 1:
            path, start, end = found[0]
            before = path.read_text()
            path.write_text(before[:start] + instead + before[end:])
            return path, before
    return None


def noticed_by(mutant: Mutant, tree: Path, command: list[str]) -> str:
    """Return the first failing test, or what else the run came to."""
    patterns = mutant.tests.split()
    files = dict.fromkeys(path for p in patterns for path in sorted((tree / "tests").glob(p)))
    if not files:
        return "NO TESTS"
    flags = ["-x", "-o", "addopts=--import-mode=importlib", "-p", "no:randomly", "--tb=no"]
    done = subprocess.run(
        [*command, *map(str, files), *flags],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    for line in done.stdout.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            return line.partition(" - ")[0]
    return "SURVIVED" if done.returncode == 0 else f"?? {done.stdout[-200:]!r}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--path", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--only", default="", help="mutants whose names hold this word")
    parser.add_argument("--dry", action="store_true", help="only say which mutants are not found")
    parser.add_argument("--command", default=f"{sys.executable} -m pytest -q", help="runs pytest")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if options.only in mutant.name]
    killed = lost = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        skipped = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", ".hypothesis")
        shutil.copytree(options.path, tree, ignore=skipped)
        for number, mutant in enumerate(chosen, 1):
            changed = apply(mutant, tree / "vitdistill")
            if changed is None:
                lost += 1
                print(f"{number:3}  NOT FOUND  {mutant.name}", flush=True)
                continue
            path, before = changed
            begun = time.monotonic()
            compile(path.read_text(), str(path), "exec")
            answer = "" if options.dry else noticed_by(mutant, tree, options.command.split())
            path.write_text(before)
            killed += answer.startswith(("FAILED", "ERROR"))
            seconds = time.monotonic() - begun
            print(f"{number:3}  {mutant.name}: {answer} ({seconds:.0f} s)", flush=True)
    print(f"{len(chosen)} mutants, {lost} not found, {killed} noticed")


if __name__ == "__main__":
    main()
