"""Backtests: a log is replayed day by day, and training policies are compared on the following day. May import
``experiments`` and what that imports."""
