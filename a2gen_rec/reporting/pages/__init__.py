"""HTML and Markdown reports with their templates: datasets, experiments and sharding plans.

May import ``reporting.console`` and the modules of ``reporting``; reports do not import each other.
"""
