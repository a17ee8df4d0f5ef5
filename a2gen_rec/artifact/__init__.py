"""The exported model: its files on disk, checks of their contents, and the model in memory.

Imports from data, models, config and utils only; nothing of training or serving.
"""
