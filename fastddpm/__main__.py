"""python -m fastddpm."""

import sys

from fastddpm.cli.main import main

sys.exit(main())
