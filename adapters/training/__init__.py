"""Training: the bundled model from nothing. Reads text corpora that the product does not need."""
