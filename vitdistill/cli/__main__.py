"""``python -m vitdistill.cli``: the older spelling of ``python -m vitdistill``."""

import sys

from . import main

sys.exit(main())
