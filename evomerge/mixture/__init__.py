"""Plain mixtures of experts, made of dense fine-tunes or of other mixtures."""
