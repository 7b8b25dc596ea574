"""The service: an HTTP API and a page over searches. It starts drivers and reads stores; it scores nothing itself."""
