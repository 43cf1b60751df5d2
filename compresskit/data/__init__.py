"""The door to data: readers, the embedded ``stdlib:`` corpus, packing, the token cache."""
