"""Event stores: the protocol, and its implementations in SQLite and Redis.

Imports only the plain types of ranking.
"""
