"""Building blocks of a decoder over the native kernels: linear layers, embeddings, RoPE, attention."""
