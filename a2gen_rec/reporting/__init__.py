"""Presentation of results: terminal tables, HTML and Markdown pages, charts and number formatting.

May import every package except ``cli``.
"""
