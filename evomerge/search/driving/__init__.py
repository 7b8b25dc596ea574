"""The driver: it asks, dispatches, tells and confirms. It knows nothing about models and files."""
