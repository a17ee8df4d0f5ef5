"""The report of a backtest: charts, sections, files. May import ``experiments`` and ``reporting``."""
