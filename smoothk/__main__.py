"""`python -m smoothk` is the command `smoothk`."""

from smoothk.cli import main

raise SystemExit(main())
