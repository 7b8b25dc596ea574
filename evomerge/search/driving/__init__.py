"""The driver: it asks, dispatches, tells and confirms. It knows neither models nor files."""
