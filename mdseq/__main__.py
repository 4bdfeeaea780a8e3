"""`python -m mdseq` is `mdseq`."""

import sys

from mdseq.cli import main

sys.exit(main())
