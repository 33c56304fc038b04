"""`python -m longfire.cli` is `longfire`."""

import sys

from longfire.cli.entry import main

sys.exit(main())
