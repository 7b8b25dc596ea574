"""The service: an HTTP API and web pages for searches. It starts drivers and reads stores; it scores nothing itself."""
