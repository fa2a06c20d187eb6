"""``python -m cupy_headnorm``."""

import sys

from cupy_headnorm.cli import main

sys.exit(main())
