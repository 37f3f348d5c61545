from kdpipe.main import cli

cli()
