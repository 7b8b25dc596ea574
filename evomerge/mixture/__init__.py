"""Plain mixtures of experts, made from dense fine-tunes or from other mixtures."""
