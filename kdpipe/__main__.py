import sys

try:
    from kdpipe.main import cli  # seconds, in which somebody may change their mind
except KeyboardInterrupt:
    sys.exit(130)

cli()
