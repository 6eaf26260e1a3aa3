"""`python -m gemel` is the `gemel` command."""

import sys

from gemel.cli.main import main

sys.exit(main())
