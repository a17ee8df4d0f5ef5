"""The engine of the service: batching, ranking workers, cached histories and model reloads.

Imports the stores; knows nothing of HTTP, and torch only once a model is loaded.
"""
