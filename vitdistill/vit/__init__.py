"""See: what one forward pass of an unmodified ViT records, on any patches and up to any block."""

from .families import describe_network as describe_network
from .families import family_of as family_of
from .needs import Needs as Needs
from .network import Network as Network
from .output import QKV as QKV
from .output import ViTOutput as ViTOutput
from .patches import PatchMap as PatchMap
from .walk import run_vit as run_vit
