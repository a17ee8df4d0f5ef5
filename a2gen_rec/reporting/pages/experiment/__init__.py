"""The report of an experiment: tables, charts, template, files. May import ``experiments`` and ``reporting``."""
