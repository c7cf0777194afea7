"""python -m ternary_ssm: the command, as torchrun starts it."""

import sys

from .cli import main

sys.exit(main())
