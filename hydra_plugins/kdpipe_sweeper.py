"""Hydra only accepts sweepers that are defined in this package; `kdpipe.sweeps.sweep` does the work."""

from importlib.util import find_spec

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper


class GridSweeper(BasicSweeper):
    """Hydra's own grid (`hydra.sweeper.params` and the command line), run by `kdpipe.sweeps.sweep`, or with
    `search.trials` a search in it, by `kdpipe.sweeps.search`."""

    def __init__(self, params: dict[str, str] | None = None) -> None:
        super().__init__(max_batch_size=None, params=params)

    def sweep(self, arguments: list[str]) -> None:
        assert self.config is not None
        words = [*self._parse_config(), *arguments]
        # Imported here, because every Hydra program imports this file.
        if self.config.search.trials is None:
            from kdpipe.sweeps.sweep import run_sweep

            run_sweep(self, words)
            return
        if find_spec("optuna") is None:
            from kdpipe.settings.errors import ConfigError

            problem = "Optuna is not installed; pip install 'kdpipe[search]'"
            raise ConfigError("search.trials", self.config.search.trials, problem=problem)

        from kdpipe.sweeps.search import run_search

        run_search(self, words)
