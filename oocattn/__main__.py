"""`python -m oocattn`."""

from oocattn.cli import main

raise SystemExit(main())
