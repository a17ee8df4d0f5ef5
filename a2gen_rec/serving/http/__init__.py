"""The HTTP layer of the service: schema, routes, request guard, connections and the server process.

Imports the engine and the stores; nothing of torch.
"""
