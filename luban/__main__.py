"""`python -m luban`."""

import sys

from luban.cli.main import main

sys.exit(main())
