"""python -m fastddpm."""

import sys

from fastddpm.cli import main

sys.exit(main())
