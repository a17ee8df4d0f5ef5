"""The report of a dataset: statistics, sections, charts, template, files. May import ``data`` and ``reporting``."""
