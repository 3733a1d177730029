"""Run the command line as ``python -m mats_hub``."""

import sys

from mats_hub.cli import main

sys.exit(main())
