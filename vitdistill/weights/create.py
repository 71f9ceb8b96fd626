"""Networks by name: timm's, a folder's or the hub's, offline unless asked otherwise."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo
from timm.layers import to_2tuple
from timm.models import (
    get_arch_pretrained_cfgs,
    get_pretrained_cfg,
    is_model,
    is_model_in_modules,
    list_models,
)
from timm.models._pretrained import PretrainedCfg
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vitdistill.models.advised
import vitdistill.models.involution  # noqa: F401 - their networks get their names in timm's registry

from ..errors import ConfigError, Set, UserError
from ..messages import first_line, printable, suggest
from ..storage.hub import settle_network
from .files import check_finite, load_state_dict
from .folder import Saved, read_folder, read_hub
from .from_torchvision import NAME as TORCHVISION
from .from_torchvision import as_timms, list_torchvision, pretrained_missing, torchvision_weights
from .load import load_into
from .outside import TRANSFORMERS, build_outside, is_outside
from .vit_checkpoints import Target, calm_classifier, classifier_of, is_headless, is_pretraining


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    pretrained: bool | None = None,
    drop_path: float | None = None,
    image_size: int | tuple[int, int] | None = None,
    **model_args: Any,
) -> nn.Module:
    """Build a timm network by name, with its weights if asked for; log what was made of them.

    Args:
        name: timm's, ``torchvision/NAME``, ``hf-hub:ORG/NAME``, ``package.module:factory``, a file
            that runs (ONNX, ``.pt2``, TorchScript), or a folder with a ``config.json``: timm's,
            which `export_timm` writes, or Hugging Face's of a ViT or ViTMAE.
        num_classes: another number than the weights' gives a fresh head. Without it, a plain timm
            name gets the ``checkpoint``'s number, 0 for a plain ViT's file without a classifier.
        checkpoint: a weights file, loaded in place of the network's own.
        pretrained: None: load the weights of a folder or the hub, none for timm's plain names;
            False: never; True: always, so that a plain name downloads.
        image_size: height and width, or one number, pixels.

    Raises:
        ConfigError: a name or an argument does not exist.
        DataError: weights cannot be loaded, do not fit, or are not finite.
    """
    if checkpoint is not None and pretrained:
        what = f"{name} has both pretrained weights and a checkpoint"
        fixes = "leave pretrained out", "leave checkpoint out"
        raise ConfigError(what, fixes, field="checkpoint")
    build = {key: value for key, value in model_args.items() if value is not None}
    given = {"drop_path_rate": drop_path, "img_size": image_size, "num_classes": num_classes}
    for key, value in given.items():
        if value is not None and build.setdefault(key, value) != value:
            raise ConfigError(f"{key} is given twice", f"leave {key} out", field="model_args")
    saved, own = read_saved(name), name.startswith(TORCHVISION)
    architecture, build = as_timms(name, build)
    if saved is None:
        model = _build(architecture, build, pretrained=bool(pretrained) and not own)
        if own and pretrained:
            fresh = bool(model.num_classes != 1000)
            load_into(Target(model, name, fresh), torchvision_weights(name))
    else:
        model = _build(saved.architecture, {**saved.args, **build}, saved.cfg)
        if checkpoint is None and pretrained is not False:
            _load_saved(model, saved)
    if checkpoint is None:
        return model
    state, notes = load_state_dict(checkpoint, model.state_dict()), []
    if saved is None:
        num_classes = _num_answers(model, state)
        if "num_classes" not in build and num_classes not in (None, model.num_classes):
            model = _build(architecture, {**build, "num_classes": num_classes})
        notes = _set_normalisation(model, state, name)
    fresh = "num_classes" in build or not getattr(model, "num_classes", 1)
    load_into(Target(model, printable(checkpoint), fresh), state, notes)
    return model


def class_names(model: nn.Module) -> tuple[str, ...] | None:
    """Return a network's classes as saved with it, or ImageNet's synsets; None: not known."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    num_classes = getattr(model, "num_classes", None)
    names = cfg.get("label_names")
    if names is None and num_classes == cfg.get("num_classes") == 1000:
        names = ImageNetInfo().label_names()  # timm's own heads
    return tuple(names) if names is not None and len(names) == num_classes else None


def carries_weights(name: str) -> bool:
    """Return whether this name comes with weights; also True if unknown, which fails later."""
    if name.startswith(TORCHVISION):
        return False
    return _split(name)[0] != "timm" or not is_model(name.partition(".")[0])


def describe(name: str, model_args: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return timm's architecture and arguments of ``create_model(name, **model_args)``."""
    saved = read_saved(name)
    if saved is None:
        architecture, args = as_timms(name, model_args)
        return architecture, {k: v for k, v in args.items() if k != "pretrained_cfg_overlay"}
    return saved.architecture, {**saved.args, **model_args}


def _split(name: str) -> tuple[str, str]:
    """Return a network's source (``timm``, ``outside``, ``folder``, ``hub``) and place there."""
    scheme, colon, rest = name.partition(":")
    if colon and scheme in ("hf-hub", "hf_hub"):
        return "hub", rest
    if colon and scheme == "local-dir":
        return "folder", rest
    if is_outside(name) and not name.startswith(TRANSFORMERS):
        return "outside", name
    # A plain timm name stays one, even where a folder happens to be called the same.
    is_path = os.sep in name or name.startswith(("~", "."))
    if is_path or (not is_model(name.partition(".")[0]) and Path(name).is_dir()):
        return "folder", name
    return "timm", name


def is_timm_name(name: str) -> bool:
    """Whether a model's name is one of timm's, even where a folder is called the same."""
    return _split(name)[0] == "timm" and is_model(name.partition(".")[0])


def read_saved(name: str) -> Saved | None:
    """Return what is saved in a folder or on the hub; None for any other name."""
    source, place = _split(name)
    if source == "folder":
        return read_folder(Path(place))
    return read_hub(place) if source == "hub" else None


# -- building -------------------------------------------------------------------------------------


def _check_name(name: str, pretrained: bool) -> None:
    """Raise `ConfigError` unless timm has a network, and weights, of this name."""
    architecture, _, tag = name.partition(".")
    if not is_model(architecture):
        what = f"timm {timm.__version__} has no network {name!r}"
        raise ConfigError(what, _near(architecture))
    tags = [key.partition(".")[2] for key in get_arch_pretrained_cfgs(architecture)]
    if tag and tag not in tags:
        raise ConfigError(f"{architecture} has no weights {tag!r}: {suggest(tag, tags)}")
    if pretrained and not _default_cfg(name).has_weights:
        fixes = ("name one of its tags", Set("checkpoint"))
        raise ConfigError(f"timm has no pretrained weights for {name}", fixes, field="pretrained")


def _near(name: str) -> str:
    """Return a hint for a name that timm does not know."""
    if name in list_torchvision():
        return f"name torchvision's by {TORCHVISION}{name}"
    start = name.lower().replace("-", "_")
    begun = [other for other in list_models() if other.startswith(start)]
    if begun:
        return f"did you mean {begun[0]!r}?"
    # Names are long and much alike: what shares most of its letters may be of another kind.
    return suggest(start, list_models(), "timm.list_models() lists them", closeness=0.8)


def _default_cfg(name: str) -> PretrainedCfg:
    return get_pretrained_cfg(name) or PretrainedCfg()


def _build(
    name: str,
    build: Mapping[str, Any],
    cfg: Mapping[str, Any] | None = None,
    pretrained: bool = False,
) -> nn.Module:
    """Have a network built, and put the image size into its configuration."""
    try:
        if is_outside(name):
            model = build_outside(name, build, cfg)
        else:
            model = _build_timm(name, build, cfg, pretrained)
    except UserError:
        raise
    except Exception as error:  # whatever a network's own code raises for such arguments
        if pretrained and isinstance(error, RuntimeError | OSError):
            raise pretrained_missing(name, error) from error
        raise _cannot_build(name, build, error) from error
    if pretrained:
        check_finite(model.state_dict(), f"what was downloaded for {name}")
        if getattr(model, "num_classes", None) != _default_cfg(name).num_classes:
            calm_classifier(model)
    _record_input(model, build.get("img_size"), build.get("in_chans"))
    _check_grid(name, model)
    return model


def _build_timm(
    name: str, build: Mapping[str, Any], cfg: Mapping[str, Any] | None, pretrained: bool
) -> nn.Module:
    _check_name(name, pretrained)
    fixed = (cfg or {}).get("fixed_input_size", _default_cfg(name).fixed_input_size)
    # timm says that Sapiens2 takes any size, but builds it for one.
    fixed = fixed or is_model_in_modules(name.partition(".")[0], ("eva",))
    if not fixed and not build.keys() & {"strict_img_size", "dynamic_img_size"}:
        # Fully convolutional: it takes any size, and no argument for it.
        build = {key: value for key, value in build.items() if key != "img_size"}
    if cfg:
        build = {**build, "pretrained_cfg": cfg}
    if pretrained:
        settle_network()
    return timm.create_model(name, pretrained=pretrained, **build)


def _cannot_build(name: str, build: Mapping[str, Any], error: Exception) -> ConfigError:
    asked = re.search(r"(?:unexpected|multiple values for) keyword argument '(\w+)'", str(error))
    if asked is None:
        spelled = ", ".join(f"{key}={value!r}" for key, value in build.items()) or "its defaults"
        what = f"{name} cannot be built with {spelled}: {first_line(error)}"
        return ConfigError(what, field="model_args")
    what = f"{name} takes no argument {asked[1]!r}"
    fix = "leave it out of the model's arguments"
    return ConfigError(what, fix, field=f"model_args.{asked[1]}")


def _record_input(model: nn.Module, size: Any, in_chans: int | None) -> None:
    """Put the input size into the configuration, where evaluation looks for it."""
    cfg = getattr(model, "pretrained_cfg", None)
    if not isinstance(cfg, dict):
        return
    channels, *spatial = cfg.get("input_size") or (3, 224, 224)
    if size is not None:
        spatial = [size, size] if isinstance(size, int) else list(size)
        cfg["fixed_input_size"] = cfg.get("fixed_input_size") or isinstance(model, Eva)
        cfg.pop("test_input_size", None)
    cfg["input_size"] = (in_chans or channels, *spatial)


def _check_grid(name: str, model: nn.Module) -> None:
    embed: Any = getattr(model, "patch_embed", None)
    patch, size = getattr(embed, "patch_size", None), getattr(embed, "img_size", None)
    if isinstance(model, NaFlexVit):  # built for any size
        cfg: Any = model.pretrained_cfg
        embed, patch, size = model.embeds, model.embeds.patch_size, cfg["input_size"][1:]
    if not patch or not size or getattr(embed, "dynamic_img_pad", False):
        return
    patch, size = to_2tuple(patch), to_2tuple(size)
    if any(side % step for side, step in zip(size, patch, strict=True)):
        parts, whole = (f"{sides[0]} x {sides[1]}" for sides in (patch, size))
        what = f"{name} cuts images into patches of {parts}, which do not fill {whole}"
        fix = "choose an image size that is a multiple of the patch size"
        raise ConfigError(what, fix, field="image_size")


# -- weights --------------------------------------------------------------------------------------


def _load_saved(model: nn.Module, saved: Saved) -> None:
    state, place = saved.load_weights(model.state_dict())
    same_head = getattr(model, "num_classes", None) == saved.num_classes
    fresh_head = not (same_head and saved.num_classes)
    load_into(Target(model, place, fresh_head, saved.image_size), state, saved.notes)
    if not same_head:
        model.pretrained_cfg.pop("label_names", None)  # type: ignore[union-attr, operator]


def _num_answers(model: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """Return a file's number of classes, 0 for a ViT's without a head; None: not known."""
    if isinstance(model, VisionTransformer):
        if any(key.startswith("visual.") for key in state):  # open_clip's: its embedding answers
            proj, head = state.get("visual.proj"), state.get("visual.head.proj.weight")
            return len(head) if head is not None else 0 if proj is None else proj.shape[1]
        if is_headless(state):
            return 0
    heads = [state[f"{name}weight"] for name in classifier_of(model) if f"{name}weight" in state]
    return len(heads[0]) if heads else None


def _set_normalisation(model: nn.Module, state: Mapping[str, Tensor], name: str) -> list[str]:
    """Normalise as ImageNet for a masked autoencoder's or torchvision's file; return notes."""
    # A timm name decides the normalisation, but a plain ViT's file without a classifier need not be
    # of the network that the name stands for, and torchvision's is not.
    cfg = getattr(model, "pretrained_cfg", None) or {}
    imagenet = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    has_it = all(tuple(cfg.get(key) or value) == value for key, value in imagenet.items())
    of_torchvision = "conv_proj.weight" in state
    is_vit = isinstance(model, VisionTransformer)
    if has_it or not is_vit or not (is_headless(state) or of_torchvision):
        return []
    if is_pretraining(state) or of_torchvision:
        cfg.update(imagenet)
        whose = "torchvision's networks" if of_torchvision else "masked autoencoders"
        return [f"images are normalised as ImageNet's, as for {whose}, not as for {name}"]
    return [
        f"images are normalised as for {name} (mean {cfg['mean']}, std {cfg['std']}); if it was"
        " trained with ImageNet's, name a network that has them, such as deit's or one tagged mae"
    ]
