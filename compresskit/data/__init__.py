"""The door to data: readers, the embedded ``stdlib:`` corpus, packing, the token cache.

Packing needs torch and is imported from its own module: ``compresskit.data.pack``.
"""

from __future__ import annotations

from compresskit.data.corpus import Corpus, check, documents, open_corpus

__all__ = ["Corpus", "check", "documents", "open_corpus"]
