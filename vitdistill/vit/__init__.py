"""See: what one forward pass of an unmodified ViT records, on any patches and up to any block."""

from .needs import Needs as Needs
from .output import ViTOutput as ViTOutput
from .walk import run_vit as run_vit
