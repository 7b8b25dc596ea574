"""What is measured of sources and of merged models, and how it is kept."""
