"""`python -m longfire` is `longfire`."""

import sys

from longfire.cli import main

sys.exit(main())
