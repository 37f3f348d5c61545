"""`python -m kdpipe`."""

import sys

try:
    from kdpipe.main import cli  # takes seconds, in which a user may press Ctrl-C
except KeyboardInterrupt:
    sys.exit(130)

cli()
