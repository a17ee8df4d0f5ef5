"""The page of a sharding plan: shapes of its charts, template, rendering. May import ``sharding.report`` and ``reporting``."""
