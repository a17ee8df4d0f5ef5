"""Online ranking with an exported model, in one process: raw impressions and candidates in, a ranked list out.

Imports from artifact and the layers below; nothing of training or serving.
"""
