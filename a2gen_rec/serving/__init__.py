"""The ranking service: HTTP API, batching engine, event stores, web page and backfill.

Imports from ranking, artifact and the layers below; nothing of training. Only a loaded model imports torch.
"""
