"""Models of routed recipes: adapters of one base as experts, whose outputs are mixed by routers for every token."""
