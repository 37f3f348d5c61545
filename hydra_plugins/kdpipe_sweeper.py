"""Hydra only accepts sweepers that are defined in this package; `kdpipe.sweeps.sweep` does the work."""

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper


class GridSweeper(BasicSweeper):
    """Hydra's own grid (`hydra.sweeper.params` and the command line), run by `kdpipe.sweeps.sweep`."""

    def __init__(self, params: dict[str, str] | None = None) -> None:
        super().__init__(max_batch_size=None, params=params)

    def sweep(self, arguments: list[str]) -> None:
        from kdpipe.sweeps.sweep import run_sweep  # here, because every Hydra program imports this file

        run_sweep(self, [*self._parse_config(), *arguments])
