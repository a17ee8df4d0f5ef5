"""Short digests of content, for keys and names of files."""

import hashlib


def hex_digest(content: str | bytes, digits: int) -> str:
    """Return the first ``digits`` hexadecimal digits, at most 64, of the SHA-256 of bytes or of UTF-8 text."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:digits]
