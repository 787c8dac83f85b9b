"""Turn requests into tokens, vectors and scores: the protocol, and one engine per library."""
